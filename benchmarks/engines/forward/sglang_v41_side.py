"""SGLang's index layers of DeepSeek-V4.1: its own code beside the plugin, on the same tensors.

It runs decode of one row, verification of six rows of a request, and the prefill of one request.
The eight layers run one after the other as the model calls them. ``us`` is the time of all of them.
``layers`` has the first plain layer, the source and the first consumer alone. SGLang's own code
makes the queries and head weights once, outside of all times.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from kits.sglang_v41 import (
    LAYERS,
    SOURCE,
    STANDS_IN,
    STANDS_IN_ON_GPU,
    Forward,
    K,
    Model,
    start,
)

import dsv4_plugin
from benchmarks.engines.forward.parts import ForwardSide, agreement, settings, stands_in
from benchmarks.engines.forward.variants import OFF
from benchmarks.engines.part import Part, Row, eager_us
from dsv4_plugin.cli.bench.cells import DIRTY
from dsv4_plugin.cli.checks.timing import time_graph
from dsv4_plugin.state import state

__all__ = ["Side"]

ON = "plugin"
SETTINGS = {"DSV4_TOPK": "bf16", "DSV4_LOGITS": "plugin"}
CONSUMER = SOURCE + 4
CONTEXT = {"cuda": 1 << 20, "cpu": 1024}  # of the engine: --context-length
HELD = {"cuda": 2048, "cpu": 64}
DECODE = {
    "cuda": [(rows, keys) for rows in (1, 6) for keys in (2048, 65_536, 262_144, 1 << 20)],
    "cpu": [(1, 530), (2, 530)],
}
# Rows of the last chunk, and the keys that its last row sees.
PREFILL = {"cuda": [(8192, 8192), (8192, 32_768), (8192, 131_072)], "cpu": [(4, 540)]}
JUDGED = 8  # rows of a prefill whose answers are checked


class Side(ForwardSide):
    """The parts. All parts without the plugin run before the plugin is loaded."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        settings({}, self.device)
        self.v41 = start(self.device)
        self.engine = self.v41.engine
        self.model = Model(self.v41, CONTEXT[self.device], 1, held=HELD[self.device])
        self.decode = arguments.shapes or DECODE[self.device]
        self.prefill = arguments.prefill or PREFILL[self.device]
        self.off: dict[tuple[str, int], torch.Tensor] = {}
        self.seen: list[torch.Tensor] = []
        self._spy()

    def about(self) -> Row:
        """Return which parts are the engine's own and which are replaced."""
        known = STANDS_IN_ON_GPU if self.device == "cuda" else STANDS_IN
        made_once = {"queries and weights": "SGLang's own, made once, not in the times"}
        return {
            "version": f"SGLang {self.engine.version}",
            "context": self.model.context,
            "stands_in": stands_in({**known, **made_once}, self.engine.stood_in),
        }

    def seams(self) -> Any:
        """Return the plugin's seams as ``status()`` shows them."""
        return dsv4_plugin.status()["seams"]

    def parts(self) -> Iterator[Part]:
        """Give all parts in their order."""
        made = {}
        for mode, shapes in (("decode", self.decode), ("prefill", self.prefill)):
            for rows, keys in shapes:
                name = f"{mode} {rows}x{keys}"
                made[name] = functools.cache(functools.partial(self._forward, mode, rows, keys))
        for variant in (OFF, ON):
            if variant == ON:
                yield Part("load the plugin", self._load)
            for name, make in made.items():
                yield Part(f"{name} {variant}", functools.partial(self._one, name, variant, make))

    def _forward(self, mode: str, rows: int, keys: int) -> Forward:
        mode = "verify" if mode == "decode" and rows > 1 else mode
        forward = self.model.forward(self.model.batch((keys,), rows, mode))
        forward.prepare()
        return forward

    def _load(self) -> list[Row]:
        settings(SETTINGS, self.device)
        plugins: Any = importlib.import_module("sglang.srt.plugins")
        plugins._plugins_loaded = False
        plugins.load_plugins()
        self.model.build()
        found = type(self.model.attn.decode_candidates).__module__.startswith("dsv4_plugin")
        return [{"part": "load the plugin", "variant": ON, "right": found}]

    def _spy(self) -> None:
        """Keep the scores that SGLang's decode selects on."""
        real = self.v41.scoring.fp4_index_logits_paged

        def spy(*args: Any) -> torch.Tensor:
            out: torch.Tensor = real(*args)
            if not (out.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.seen[:] = [out]
            return out

        self.v41.scoring.fp4_index_logits_paged = spy

    # --- one shape ------------------------------------------------------------------------------

    def _one(self, name: str, variant: str, make: Any) -> list[Row]:
        forward = make()
        state.counters.clear()
        row: Row = {"right": True, "graph": False}
        said = [self._layer(name, variant, forward, layer) for layer in (2, SOURCE, CONSUMER)]
        row["layers"] = {str(found.pop("layer")): found for found in said}
        row["right"] = all(found["right"] for found in said)
        shares = [found["agreement"] for found in said if "agreement" in found]
        if shares:
            row["agreement"] = min(shares)
        row |= self._cost(forward)
        if variant == ON:
            row["counters"] = dict(dsv4_plugin.status()["counters"])
            waits = forward.batch.mode == "prefill" and row.get("host_waits")
            row["right"] = row["right"] and not waits
        return [{"part": name, "variant": variant, **row}]

    def _layer(self, name: str, variant: str, forward: Forward, layer: int) -> Row:
        """Run a layer into dirty buffers, check the answer, and time the layer alone."""
        prefill = forward.batch.mode == "prefill"
        ratio = LAYERS[layer]
        self._soil(forward)
        self.seen.clear()
        forward.run(layer, copy=False)
        held = forward.raw[ratio] if prefill else forward.out[ratio]
        assert held is not None
        out = held.clone()
        row: Row = {"layer": layer, "right": True}
        at = torch.linspace(0, len(out) - 1, min(len(out), JUDGED)).long().tolist()
        wrong = [why for r in at for why in self._judge(variant, forward, layer, out[r], r)]
        if wrong:
            row |= {"right": variant == OFF, "why": wrong[0]}
        found = out.sort(dim=1).values
        if variant == OFF:
            self.off[name, layer] = found
        elif (name, layer) in self.off:
            row |= agreement(self.off[name, layer], found)
        if self.device == "cuda" and not prefill:
            row["us"] = round(
                time_graph(
                    [lambda: forward.run(layer, copy=False)],
                    launches=self.arguments.launches, replays=self.arguments.replays,
                ), 3,
            )  # fmt: skip
        return row

    def _soil(self, forward: Forward) -> None:
        for out in (*forward.out.values(), *forward.raw.values()):
            if out is not None:
                out.fill_(DIRTY)

    def _judge(
        self, variant: str, forward: Forward, layer: int, out: torch.Tensor, r: int
    ) -> list[str]:
        """Return what is wrong with a row, by the scores that it was selected on, where known.

        SGLang's answer must have the best scores. The plugin's answer must also have the lowest
        positions among equal scores, in ascending order.
        """
        ratio, prefill = LAYERS[layer], forward.batch.mode == "prefill"
        n = int((forward.batch.positions[r] + 1) // ratio)
        positions = out[out >= 0].long()
        if not prefill:
            positions = forward.positions_of(layer, out[out >= 0])
        scores = forward.reference(layer, r, n)
        if variant == OFF and self.seen:
            scores = self.seen[0][r, :n]
        elif variant == OFF:
            return []  # SGLang's scores of a prefill are not kept
        blocks = forward.metadata.candidate_metadata
        if layer == CONSUMER and blocks is not None:
            allowed = torch.zeros(-(-n // 8), dtype=torch.bool, device=out.device)
            kept = blocks.blocks[r]
            allowed[kept[kept >= 0].long()] = True
            scores = scores.masked_fill(~allowed.repeat_interleave(8)[:n], -torch.inf)
        want = torch.sort(scores.float(), descending=True, stable=True).indices
        want = want[: min(K, int((scores > -torch.inf).sum()))].sort().values
        wrong = []
        if len(positions) != len(want) or len(positions.unique()) != len(want):
            return [f"layer {layer}, row {r}: {len(positions)} positions, not {len(want)}"]
        got = scores[positions].float().sort().values
        if not torch.equal(got, scores[want].float().sort().values):
            wrong.append(f"layer {layer}, row {r}: not the best scores")
        if variant == ON and not torch.equal(positions, want):
            wrong.append(f"layer {layer}, row {r}: not the oracle's list")
        return wrong

    def _cost(self, forward: Forward) -> Row:
        """Time all eight layers, in a graph whose replay must give what the calls gave."""
        prefill = forward.batch.mode == "prefill"
        if self.device != "cuda":
            return {"us": round(eager_us(forward.every, "cpu"), 3)}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward.every()
        torch.cuda.synchronize()
        row: Row = {"mib": round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)}
        if prefill:
            torch.cuda.set_sync_debug_mode("error")
            try:
                forward.every()
                row["host_waits"] = False
            except RuntimeError as error:
                row["host_waits"] = True
                row["waits"] = str(error)[:200]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            row["us"] = round(eager_us(forward.every, "cuda"), 3)
            return row
        first = {ratio: out.clone() for ratio, out in forward.out.items()}
        held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held):
            forward.every()
        self._soil(forward)
        held.replay()
        torch.cuda.synchronize()
        same = all(
            torch.equal(out.sort(1).values, first[ratio].sort(1).values)
            for ratio, out in forward.out.items()
        )
        row |= {"graph": True, "same_in_graph": same}
        row["us"] = round(
            time_graph(
                [forward.every], launches=max(1, self.arguments.launches // 8),
                replays=self.arguments.replays,
            ), 3,
        )  # fmt: skip
        return row
