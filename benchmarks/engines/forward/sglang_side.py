"""SGLang: its plugin loader, hook registry, metadata, indexer forward, DeepGEMM and top-k."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kits.engine_tensors import in_row
from kits.sglang_engine import STANDS_IN, STANDS_IN_ON_GPU, Engine, Layer, Problem

import dsv4_plugin
from benchmarks.engines.forward.parts import (
    ForwardSide,
    agreement,
    measured,
    settings,
    stands_in,
    use,
)
from benchmarks.engines.forward.variants import OFF, VARIANTS
from benchmarks.engines.kernels.cells import Scores
from benchmarks.engines.part import Part, Row
from dsv4_plugin.cli.bench.cells import DIRTY
from dsv4_plugin.cli.checks.topk_cases import Problem as Case

__all__ = ["Side"]

DECODE = {"cuda": [(1, 8192), (8, 65_536), (32, 16_384)], "cpu": [(2, 700)]}
PREFILL = {"cuda": [(512, 8192)], "cpu": [(4, 700)]}


class Side(ForwardSide):
    """The parts of SGLang. All parts without the plugin run before the plugin is loaded."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        settings({}, self.device)
        self.engine = Engine(self.device)
        self.decode = arguments.shapes or DECODE[self.device]
        self.prefill = arguments.prefill or PREFILL[self.device]
        self.off: dict[str, torch.Tensor] = {}  # the selection without the plugin
        self.projected = self.device == "cuda"
        self._spy()

    def about(self) -> Row:
        """Return which parts are the engine's own and which are replaced."""
        known = STANDS_IN_ON_GPU if self.device == "cuda" else STANDS_IN
        return {
            "version": f"SGLang {self.engine.version}",
            "stands_in": stands_in(known, self.engine.stood_in),
            "deep_gemm": {
                "version": getattr(self.engine.deep_gemm, "__version__", None),
                "names": [n for n in dir(self.engine.deep_gemm) if "mqa_logits" in n],
            },
        }

    def seams(self) -> Any:
        """Return the plugin's seams as ``status()`` shows them."""
        return dsv4_plugin.status()["seams"]

    def parts(self) -> Iterator[Part]:
        """Give all parts in their order."""
        calls = [
            (f"{kind} {rows}x{columns} k{k}{' v1' if not v2 else ''}{' raw' if raw else ''}",
             kind, rows, columns, k, v2, raw)
            for k in self.arguments.k
            for kind, shapes in (("decode", self.decode), ("prefill", self.prefill))
            for rows, columns in shapes
            for v2, raw in ((True, False), (True, True), (False, False))
            if v2 or (rows, columns) == shapes[0]
        ]  # fmt: skip
        made: dict[str, Callable[[], tuple[Layer, Problem]]] = {}
        yield Part("queries", self._queries)
        for name, kind, rows, columns, k, v2, raw in calls:
            make = functools.partial(self._layer, kind, rows, columns, k, v2, raw)
            made[name] = functools.cache(make)  # the same layer for every variant
            yield Part(f"{name} {OFF}", functools.partial(self._one, name, OFF, made[name]))
        yield Part("load the plugin", self._load)
        for name in made:
            for variant in VARIANTS:
                do = functools.partial(self._with, name, variant, made[name])
                yield Part(f"{name} {variant}", do)

    def _queries(self) -> list[Row]:
        """Try the indexer's own projections and fused kernel; if they fail, queries are random."""
        if not self.projected:
            return []
        self.projected = False
        problem = self.engine.problem((700, 600))
        layer = Layer(self.engine, problem, self._backend(), projected=True)
        q, folded = layer.queries(torch.arange(len(layer.x), device=self.device))
        finite = bool(q.float().isfinite().all() and folded.isfinite().all())
        self.projected = finite
        return [{"part": "queries", "variant": OFF, "right": finite and q.dtype.itemsize == 1}]

    def _backend(self) -> Any:
        kind = getattr(self.engine.dsa, "DSATopKBackend", None)
        return kind("sgl-kernel") if kind is not None else None

    def _layer(
        self, kind: str, rows: int, columns: int, k: int, v2: bool, raw: bool
    ) -> tuple[Layer, Problem]:
        prefill = kind == "prefill"
        lengths = range(columns - rows + 1, columns + 1) if prefill else [columns] * rows
        problem = self.engine.problem(tuple(lengths), k=k, raw=raw, prefill=prefill)
        self.engine.envs.SGLANG_OPT_USE_TOPK_V2.set(v2)
        return Layer(self.engine, problem, self._backend(), self.projected), problem

    def _load(self) -> list[Row]:
        settings(next(iter(VARIANTS.values())), self.device)
        plugins: Any = importlib.import_module("sglang.srt.plugins")
        plugins._plugins_loaded = False
        plugins.load_plugins()
        seams = self.seams()
        found = bool(seams) and any(seam.get("where") for seam in seams.values())
        return [{"part": "load the plugin", "variant": "on", "right": found}]

    def _with(self, name: str, variant: str, make: Callable[[], Any]) -> list[Row]:
        from dsv4_plugin.engines.shared import adapter

        use(variant, adapter.current().forget_decisions, self.device)
        return self._one(name, variant, make)

    def _spy(self) -> None:
        """Note what DeepGEMM returns to SGLang itself."""
        self.seen: list[torch.Tensor] = []
        for name in ("fp8_paged_mqa_logits", "fp8_mqa_logits"):
            real = getattr(self.engine.deep_gemm, name)

            def spy(*args: Any, real: Any = real, **kwargs: Any) -> torch.Tensor:
                out: torch.Tensor = real(*args, **kwargs)
                if not (out.is_cuda and torch.cuda.is_current_stream_capturing()):
                    self.seen[:] = [out]
                return out

            setattr(self.engine.deep_gemm, name, spy)

    def _one(self, name: str, variant: str, make: Callable[[], Any]) -> list[Row]:
        layer, problem = make()
        scores = Scores()
        call = layer.run if variant == OFF else scores.watching(layer.run)

        def soil() -> None:
            problem.out.fill_(DIRTY)
            if problem.raw is not None:
                problem.raw.fill_(DIRTY)

        def local() -> torch.Tensor:
            return in_row(problem.out, problem.table).sort(dim=1).values

        def judge(found: torch.Tensor) -> Row:
            if variant == OFF:
                scores.problem = Case(self.seen[0], problem.lengths)
            row = scores.judge(found)
            if variant == OFF and row["exact"]:  # ties have no defined order
                row.pop("why", None)
            if variant == OFF:
                row.pop("lowest_index")
            if problem.raw is not None and not torch.equal(problem.slots(problem.raw), problem.out):
                row |= {"exact": False, "why": "slots are not the raw indices' slots"}
            row["scores"] = str(scores.problem.logits.dtype) if scores.problem else None
            # Without the plugin the answer is SGLang's own, which need not be exact.
            row["right"] = variant == OFF or (row["exact"] and row["lowest_index"])
            return row

        row, found = measured(call, soil, local, judge, self.arguments, plugin=variant != OFF)
        if variant == OFF:
            self.off[name] = found
        else:
            row |= agreement(self.off.get(name), found)
        return [{"part": name, "variant": variant, **row}]
