"""TokenSpeed: its plugin loaders, kernel registry, facades, Triton kernels and readers."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kits.engine_tensors import ARENA, PAGE, Decode, Prefill, in_row, key_values, plane
from kits.inputs import slot_list
from kits.tokenspeed_engine import STANDS_IN, STANDS_IN_ON_GPU, Engine

import dsv4_plugin
from benchmarks.engines.forward import tokenspeed_v41
from benchmarks.engines.forward.parts import (
    ForwardSide,
    agreement,
    measured,
    settings,
    stands_in,
    use,
)
from benchmarks.engines.forward.variants import OFF, VARIANTS
from benchmarks.engines.kernels.cells import Scores, recall
from benchmarks.engines.part import Part, Row
from dsv4_plugin.cli.bench.cells import DIRTY

__all__ = ["Side"]

# No width between these two: a kernel of TokenSpeed's compiles for minutes there. See
# benchmarks/engines/kernels/tokenspeed.py.
DECODE = {"cuda": [(1, 8192), (8, 65_536)], "cpu": [(2, 700)]}
PREFILL = {"cuda": [(512, 8192)], "cpu": [(4, 1400)]}
READ = {"cuda": 1024, "cpu": 40}
SCALE = 0.1
PLUGIN = ("bf16 plugin",)  # the plugin serves V4.1 on its own logits


class Side(ForwardSide):
    """The parts of TokenSpeed. For each call: without the plugin, load it, with it, unload it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        settings({}, self.device)
        self.engine = Engine(self.device)
        self.decode = arguments.shapes or DECODE[self.device]
        self.prefill = arguments.prefill or PREFILL[self.device]
        self.v41 = tokenspeed_v41.Layers(self.engine, arguments)
        self.off: dict[str, torch.Tensor] = {}
        self.engine_read: Any = None
        self._seams: Row = {}

    def about(self) -> Row:
        """Return which parts are the engine's own and which are replaced."""
        known = STANDS_IN_ON_GPU if self.device == "cuda" else STANDS_IN
        version = importlib.metadata.version("tokenspeed")
        kernel = importlib.metadata.version("tokenspeed-kernel")
        return {
            "version": f"TokenSpeed {version} (tokenspeed-kernel {kernel})",
            "stands_in": stands_in(known, self.engine.stood_in),
            "platform": str(self.engine.platform.current_platform()),
        }

    def seams(self) -> Any:
        """Return the plugin's seams as ``status()`` shows them; engaged: in any of its loads."""
        for name, seam in dsv4_plugin.status()["seams"].items():
            if seam["engaged"] or name not in self._seams:
                self._seams[name] = seam
        return self._seams

    def parts(self) -> Iterator[Part]:
        """Give all parts in their order."""
        if "v41" in self.arguments.model:
            for name, run in self.v41.cells():
                yield from self._beside(name, run, PLUGIN)
        if "v4" in self.arguments.model:
            yield from self._v4()

    def _v4(self) -> Iterator[Part]:
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
            yield from self._beside(name, run, tuple(VARIANTS))
        yield Part(f"read {OFF}", functools.partial(self._read, OFF))
        yield Part("load the plugin for read", self._load)
        yield Part("read on", functools.partial(self._read, "on"))

    def _beside(
        self, name: str, run: Callable[[str], list[Row]], variants: Sequence[str]
    ) -> Iterator[Part]:
        """Give one call without the plugin and in its variants."""
        if self.device == "cuda":  # TokenSpeed's Triton kernels take tensors on a GPU only
            yield Part(f"{name} {OFF}", functools.partial(run, OFF))
        yield Part(f"load the plugin for {name}", self._load)
        for variant in variants:
            yield Part(f"{name} {variant}", functools.partial(self._with, variant, run))
        yield Part(f"take the plugin out after {name}", self._take_out)

    def _plugin(self) -> list[str]:
        return sorted(n for n in self.engine.registry._by_name if n.startswith("dsv4_plugin"))

    def _load(self) -> list[Row]:
        settings(next(iter(VARIANTS.values())), self.device)
        self.engine.plugins.reset_plugins()
        before = self._plugin()
        self.engine.load_runtime_plugins()
        new = self._plugin()
        return [{"part": "load the plugin", "variant": "on", "right": not before and len(new) == 5,
                 "kernel": ", ".join(new)}]  # fmt: skip

    def _take_out(self) -> list[Row]:
        """Unload the plugin from TokenSpeed, for the next call without it."""
        from dsv4_plugin.engines import tokenspeed

        self.seams()
        tokenspeed.unregister()
        settings({}, self.device)
        return [{"part": "take the plugin out", "variant": OFF, "right": not self._plugin()}]

    def _with(self, variant: str, run: Callable[[str], list[Row]]) -> list[Row]:
        from dsv4_plugin.engines.shared import adapter

        use(variant, adapter.current().forget_decisions, self.device)
        return run(variant)

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
            plugin = row["kernel"].startswith("dsv4_plugin")
            if variant == OFF:  # need not be exact, but must be TokenSpeed's own
                row["right"] = not plugin
            else:
                row["right"] = plugin and row["exact"] and row["lowest_index"]
            return row

        row, found = measured(
            call, lambda: out.fill_(DIRTY), lambda: local().sort(dim=1).values, judge,
            self.arguments, plugin=variant != OFF,
        )  # fmt: skip
        if variant == OFF:
            self.off[name] = found
        else:
            row |= agreement(self.off.get(name), found)
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
        """Read by slot: TokenSpeed's loop, and the function that replaces it with the plugin."""
        tokens = READ[self.device]
        cache = plane(max(8, tokens // 8), ARENA, self.device)
        slots = slot_list(tokens, len(cache) * PAGE).to(self.device)
        keep = slots >= 0
        want = torch.where(keep[:, None], key_values(cache, slots.clamp_min(0)), 0.0)
        settings({} if variant == OFF else {"DSV4_TOPK": "fp32"}, self.device)
        read = self.engine.runtime().read_deepseek_v4_indexer_fp8_cache
        if variant == OFF:
            self.engine_read = read
        held: list[torch.Tensor] = []

        def call() -> None:
            held[:] = [read(cache, slots, PAGE)]

        def soil() -> None:  # a replay writes the tensor that the captured call returned
            for out in held:
                out.fill_(float("nan"))

        def judge(found: torch.Tensor) -> Row:
            same = torch.equal(found, want)
            return {"exact": same, "right": same and (read is self.engine_read) == (variant == OFF)}

        row, _ = measured(call, soil, lambda: held[0], judge, self.arguments, graph=variant != OFF)
        return [{"part": f"read {tokens} tokens", "variant": variant, **row}]
