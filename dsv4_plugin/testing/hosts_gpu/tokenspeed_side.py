"""TokenSpeed: its plugin loaders, kernel registry, facades, Triton kernels and readers."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch

import dsv4_plugin
from dsv4_plugin.testing.adapters.cells import DIRTY, Scores, recall
from dsv4_plugin.testing.host_tensors import (
    ARENA,
    PAGE,
    Decode,
    Prefill,
    in_row,
    key_values,
    plane,
)
from dsv4_plugin.testing.hosts_gpu.parts import (
    OFF,
    VARIANTS,
    Part,
    Row,
    measured,
    settings,
    variants,
)
from dsv4_plugin.testing.inputs import slot_list
from dsv4_plugin.testing.logits.chain import shared
from dsv4_plugin.testing.tokenspeed_host import STANDS_IN, STANDS_IN_ON_GPU, Engine

__all__ = ["Side"]

DECODE = {"cuda": [(1, 8192), (8, 65_536), (32, 16_384)], "cpu": [(2, 700)]}
PREFILL = {"cuda": [(512, 8192)], "cpu": [(4, 1400)]}
READ = {"cuda": 14_338, "cpu": 40}
SCALE = 0.1


class Side:
    """The parts of TokenSpeed. The plugin is loaded after all that runs without it has run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        settings({}, self.device)
        self.engine = Engine(self.device)
        self.decode = arguments.shapes or DECODE[self.device]
        self.prefill = arguments.prefill or PREFILL[self.device]
        self.off: dict[str, torch.Tensor] = {}

    def about(self) -> Row:
        """Say what is the engine's own here and what is not."""
        stands_in = dict(STANDS_IN_ON_GPU if self.device == "cuda" else STANDS_IN)
        for name in self.engine.stood_in:
            stands_in[name] = "an empty module: nothing of it is called"
        version = importlib.metadata.version("tokenspeed")
        kernel = importlib.metadata.version("tokenspeed-kernel")
        return {
            "version": f"TokenSpeed {version} (tokenspeed-kernel {kernel})",
            "stands_in": stands_in,
            "platform": str(self.engine.platform.current_platform()),
        }

    def seams(self) -> Any:
        """Return the plugin's seams as ``status()`` shows them."""
        return dsv4_plugin.status()["seams"]

    def parts(self) -> Iterator[Part]:
        """Give all parts in their order."""
        made: dict[str, Callable[[str], list[Row]]] = {}
        for k in self.arguments.k:
            for rows, columns in self.decode:
                for layout in ("logical_offsets", "global_slots"):
                    name = f"decode {rows}x{columns} k{k} {layout.partition('_')[0]}"
                    made[name] = functools.partial(self._decode, name, rows, columns, k, layout)
            for rows, columns in self.prefill:
                name = f"prefill {rows}x{columns} k{k}"
                made[name] = functools.partial(self._prefill, name, rows, columns, k)
        for name, run in made.items():
            if self.device == "cuda":  # its Triton kernels take tensors on a GPU only
                yield Part(f"{name} {OFF}", functools.partial(run, OFF))
        yield Part(f"read {OFF}", functools.partial(self._read, OFF))
        yield Part("load the plugin", self._load)
        for name, run in made.items():
            for variant in VARIANTS:
                yield Part(f"{name} {variant}", functools.partial(self._with, variant, run))
        yield Part("read on", functools.partial(self._read, "on"))

    def _load(self) -> list[Row]:
        settings(next(iter(VARIANTS.values())), self.device)
        engine = self.engine
        engine.plugins.reset_plugins()
        before = set(engine.registry._by_name)
        engine.load_runtime_plugins()
        new = sorted(set(engine.registry._by_name) - before)
        return [{"part": "load the plugin", "variant": "on", "right": len(new) == 4,
                 "kernel": ", ".join(new)}]  # fmt: skip

    def _with(self, variant: str, run: Callable[[str], list[Row]]) -> list[Row]:
        from dsv4_plugin.integrations.tokenspeed import guard

        for one in variants(guard.forget, self.device):
            if one == variant:
                return run(variant)
        raise KeyError(variant)

    def _measured(
        self,
        name: str,
        variant: str,
        facade: Callable[[], Any],
        out: torch.Tensor,
        local: Callable[[], torch.Tensor],
        truth: tuple[list[torch.Tensor], list[int]],
        columns: int,
        mode: str,
    ) -> list[Row]:
        scores = Scores()
        call = facade if variant == OFF else scores.watching(facade)

        def judge(found: torch.Tensor) -> Row:
            row = {} if variant == OFF else scores.judge(found)
            row |= recall(*truth, found)
            row["kernel"] = self.engine.chosen(mode, k=out.shape[1])
            row["right"] = variant == OFF or (
                row["exact"] and row["lowest_index"] and row["kernel"].startswith("dsv4_plugin")
            )
            return row

        row, found = measured(
            call, lambda: out.fill_(DIRTY), lambda: local().sort(dim=1).values, judge,
            self.arguments, ours=variant != OFF,
        )  # fmt: skip
        if variant == OFF:
            self.off[name] = found
        elif name in self.off:
            mean, worst = shared(self.off[name], found, columns)
            row |= {"agreement": round(mean, 6), "agreement_worst": round(worst, 6)}
        return [{"part": name, "variant": variant, **row}]

    def _decode(
        self, name: str, rows: int, columns: int, k: int, layout: str, variant: str
    ) -> list[Row]:
        t = Decode.make(rows, columns, self.device)
        out = torch.empty(rows, k, dtype=torch.int32, device=self.device)
        lens = torch.empty(rows, dtype=torch.int32, device=self.device)

        def facade() -> None:
            self.engine.dsa.dsa_decode_topk(
                t.q, t.weights, t.lengths, t.table, page_size=PAGE, topk=k, softmax_scale=SCALE,
                index_k_cache=t.cache, topk_layout=layout, batch_invariant=False,
                slot_order="selection", out=out, lens_out=lens,
            )  # fmt: skip

        def local() -> torch.Tensor:
            return out if layout == "logical_offsets" else in_row(out, t.table)

        return self._measured(
            name, variant, facade, out, local, t.truth(), columns, "dsa_decode_topk"
        )

    def _prefill(self, name: str, rows: int, columns: int, k: int, variant: str) -> list[Row]:
        t = Prefill.make(rows, columns, self.device)
        out = torch.empty(rows, k, dtype=torch.int32, device=self.device)
        lens = torch.empty(rows, dtype=torch.int32, device=self.device)

        def facade() -> None:
            self.engine.dsa.dsa_prefill_topk(
                t.q, t.weights, t.slots, t.starts, t.ends, topk=k, softmax_scale=SCALE,
                batch_invariant=False, page_size=PAGE, index_k_cache=t.cache,
                slot_order="selection", out=out, lens_out=lens,
            )  # fmt: skip

        def local() -> torch.Tensor:
            return torch.where(out < 0, out, out - t.starts[:, None])

        return self._measured(
            name, variant, facade, out, local, t.truth(), columns, "dsa_prefill_topk"
        )

    def _read(self, variant: str) -> list[Row]:
        """Read by slot: TokenSpeed's loop, and what stands in its place with the plugin."""
        tokens = READ[self.device]
        cache = plane(max(8, tokens // 8), ARENA, self.device)
        slots = slot_list(tokens, len(cache) * PAGE).to(self.device)
        keep = slots >= 0
        want = torch.where(keep[:, None], key_values(cache, slots.clamp_min(0)), 0.0)
        settings({} if variant == OFF else {"DSV4_TOPK": "fp32"}, self.device)
        read = self.engine.runtime().read_deepseek_v4_indexer_fp8_cache
        held: list[torch.Tensor] = []

        def call() -> None:
            held[:] = [read(cache, slots, PAGE)]

        def judge(found: torch.Tensor) -> Row:
            same = torch.equal(found, want)
            return {"exact": same, "right": same}

        row, _ = measured(
            call, held.clear, lambda: held[0], judge, self.arguments, graph=variant != OFF
        )
        return [{"part": f"read {tokens} tokens", "variant": variant, **row}]
