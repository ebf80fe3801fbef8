"""Timing of the top-k's cases, one after the other, beside the peers.

Every implementation is checked before and after it is timed. *Warm*: every launch reads the same
scores. *Cold*: the launches read copies in turn (:mod:`dsv4_plugin.cli.bench.cells`). *Served*: a
call as in a server (:mod:`dsv4_plugin.cli.bench.topk.served`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import topk
from dsv4_plugin.cli.bench import floor
from dsv4_plugin.cli.bench.cells import (
    DIRTY,
    Cell,
    CellBench,
    Row,
    copies_for,
    launches_for,
    time_cold,
)
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.bench.topk.served import Elsewhere
from dsv4_plugin.cli.checks.compare import PLUGIN
from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE, Case, Problem

__all__ = ["Bench"]

Run = Callable[[Problem, torch.Tensor], None]


class Bench(CellBench):
    """Measures cases of the top-k."""

    def _begin(self, group: list[Case]) -> Cell:
        problem = group[0].make(self.device)
        floor_us = floor.floor_us(problem, launches=self._launches(group[0], None))
        copies = self._copies(problem.logits, group[0].bytes_read)
        return lambda case: (floor_us, self._cell(case, copies, problem, floor_us))

    def _copies(self, logits: torch.Tensor, read: int) -> list[torch.Tensor]:
        """Return the scores and copies of them; a call reads ``read`` bytes of each."""
        if logits.device.type != "cuda":
            return [logits]
        count = copies_for(read, logits.numel() * logits.element_size())
        return [logits, *(logits.clone() for _ in range(count - 1))]

    def _launches(self, case: Case, floor_us: float | None) -> int:
        """Return the launches of a graph: fewer if one takes long."""
        us = floor_us if floor_us is not None else case.bytes_read / 2e6
        return launches_for(us, self.launches)

    def _implementations(self, case: Case) -> dict[str, Run]:
        """Return the plugin first, then the peers that take this suite."""
        runs: dict[str, Run] = {PLUGIN: functools.partial(self._plugin, case)}
        peers = self.peers[case.suite if case.suite in ("prefill", "paged") else "decode"]

        def run(call: Any, problem: Problem, out: torch.Tensor) -> None:
            if case.suite == "prefill":
                call(problem.logits, problem.starts, problem.row_ends, case.k, out)
            elif case.suite == "paged":
                call(problem.logits, problem.lengths, problem.page_table, case.k, out)
            else:
                call(problem.logits, problem.lengths, case.k, out)

        return runs | {name: functools.partial(run, call) for name, call in peers.items()}

    def _plugin(self, case: Case, problem: Problem, out: torch.Tensor) -> None:
        topk(
            problem.logits, problem.lengths, case.k, row_starts=problem.row_starts, out=out,
            page_table=problem.page_table, page_size=PAGE_SIZE, backend=self.backend,
        )  # fmt: skip

    def _cell(
        self, case: Case, copies: list[torch.Tensor], problem: Problem, floor_us: float
    ) -> str:
        """Measure every implementation in one cell; return the text of the progress line."""
        held = [dataclasses.replace(problem, logits=x) for x in copies]
        runs = self._implementations(case)
        about: Row = {
            "suite": case.suite, "dtype": case.dtype, "k": case.k, "rows": case.rows,
            "columns": case.columns, "kind": case.kind, "width": case.width or case.columns,
            "windows": case.windows,
        }  # fmt: skip

        def warm(name: str) -> Row:
            row = self._warm(case, runs[name], held[0], floor_us, plugin=name == PLUGIN)
            if case.suite == "served":
                row["served_us"] = self._served(case, runs[name], held[0])
            return row

        def cold(name: str, warm_us: float) -> float | None:
            if case.suite == "served":
                return None
            return self._cold(case, runs[name], held, warm_us)

        return self.measure(case, about, runs, warm, cold)

    def _warm(self, case: Case, run: Run, problem: Problem, floor_us: float, plugin: bool) -> Row:
        shape = (case.rows, case.k)
        out = torch.full(shape, DIRTY, dtype=torch.int32, device=self.device)
        run(problem, out)
        before = judge(problem, out, ties=plugin)
        out.fill_(DIRTY)
        us = time_calls(
            [functools.partial(run, problem, out)], self.device,
            launches=self._launches(case, floor_us), replays=self.replays,
        )  # fmt: skip
        after = judge(problem, out, ties=plugin)
        row: Row = {
            "warm_us": round(us, 3),
            "cold_us": None,
            "exact": before.exact and after.exact,
            "floor_us": round(floor_us, 3),
            "ratio": round(us / floor_us, 3),
        }
        if plugin:
            row["lowest_index"] = before.ties and after.ties
        if not row["exact"]:
            row["why"] = before.why or after.why
        if case.suite == "prefill":
            row["gb_s"] = round(case.bytes_read / us / 1e3, 3)
        return row

    def _served(self, case: Case, run: Run, problem: Problem) -> float:
        out = torch.empty(case.rows, case.k, dtype=torch.int32, device=self.device)
        call = functools.partial(run, problem, out)
        source = problem.logits.clone()
        us = self._elsewhere.served_us(
            case.dtype, call, problem.logits, source, replays=self.replays
        )
        return round(us, 3)

    @functools.cached_property
    def _elsewhere(self) -> Elsewhere:
        return Elsewhere(self.device)

    def _cold(self, case: Case, run: Run, held: list[Problem], warm_us: float) -> float:
        out = torch.empty(case.rows, case.k, dtype=torch.int32, device=self.device)
        calls = [functools.partial(run, problem, out) for problem in held]
        return time_cold(calls, self.device, warm_us, replays=self.replays)
