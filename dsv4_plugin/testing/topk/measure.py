"""Timing of the top-k's cases, one after the other, beside the peers.

Every implementation is checked before and after it is timed. *Warm*: the same scores at every
launch, as in serving, where the kernel before has just written them. *Cold*: a rotation over copies
of them, more than the L2 holds or each read once after the L2 was overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4_plugin import topk
from dsv4_plugin.testing.progress import Progress
from dsv4_plugin.testing.timing import time_calls
from dsv4_plugin.testing.topk import floor
from dsv4_plugin.testing.topk.bars import sound
from dsv4_plugin.testing.topk.cases import PAGE_SIZE, Case, Problem
from dsv4_plugin.testing.topk.check import Reference
from dsv4_plugin.testing.topk.peers import OURS, Peers

__all__ = ["Bench", "copies_for", "launches_for", "shown", "time_cold"]

COLD_BYTES = 150 << 20
MOST_COPIES = 64
MOST_BYTES = 12 << 30  # of all copies together: rows in wide buffers hold more than is read
COLD_PEERS = 2  # the best peers of a cell that are measured cold too
GRAPH_US = 8000.0  # a graph is not made much longer than this
DIRTY = -2  # what fills `out` before a call: no answer

Row = dict[str, Any]
Run = Callable[[Problem, torch.Tensor], None]


@dataclass
class Bench:
    """Measures cases; ``results`` grows as it goes, and ``saved`` is called after each cell."""

    peers: Peers
    say: Callable[[str], None]
    saved: Callable[[], None] = lambda: None
    device: str = "cuda"
    cold_all: bool = False
    launches: int = 40
    replays: int = 7
    budget_s: float | None = None
    results: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set the clock."""
        self.progress = Progress(self.say, self.budget_s)
        self._refused: set[tuple[str, str]] = set()

    def run(self, cases: Sequence[Case]) -> None:
        """Measure the cases, those on the same tensors together."""
        if self.progress.out_of_time:
            return
        self.progress.start(len(cases))
        for _, some in itertools.groupby(cases, key=lambda case: case.data):
            group = list(some)
            problem = group[0].make(self.device)
            floor_us = floor.floor_us(problem, launches=self._launches(group[0], None))
            copies = self._copies(problem.logits, group[0].bytes_read)
            most = max(case.k for case in group)
            references: dict[bool, Reference] = {}
            for case in group:
                if self.progress.spent():
                    return
                narrow = case.dtype == "narrow"
                if narrow not in references:
                    references[narrow] = Reference(problem, most, narrow=narrow)
                text = self._cell(case, copies, references[narrow], floor_us)
                self.progress.done(f"{case}  floor {floor_us:.2f}  {text}")
                self.saved()
            del problem, copies, references

    def _copies(self, logits: torch.Tensor, read: int) -> list[torch.Tensor]:
        """Return the scores and copies of them, of each of which a call reads ``read`` bytes."""
        if logits.device.type != "cuda":
            return [logits]
        count = copies_for(read, logits.numel() * logits.element_size())
        return [logits, *(logits.clone() for _ in range(count - 1))]

    def _launches(self, case: Case, floor_us: float | None) -> int:
        """How many launches a graph gets: fewer where one takes long."""
        us = floor_us if floor_us is not None else case.bytes_read / 2e6
        return launches_for(us, self.launches)

    def _implementations(self, case: Case) -> dict[str, Run]:
        """Return ours first, then the peers that take this suite."""
        runs: dict[str, Run] = {OURS: functools.partial(self._ours, case)}
        if case.dtype == "narrow" or case.suite == "seed":
            return runs
        peers = {"prefill": self.peers.prefill, "paged": self.peers.paged}.get(
            case.suite, self.peers.decode
        )

        def run(call: Any, problem: Problem, out: torch.Tensor) -> None:
            if case.suite == "prefill":
                call(problem.logits, problem.starts, problem.row_ends, case.k, out)
            elif case.suite == "paged":
                call(problem.logits, problem.lengths, problem.page_table, case.k, out)
            else:
                call(problem.logits, problem.lengths, case.k, out)

        return runs | {name: functools.partial(run, call) for name, call in peers.items()}

    def _ours(self, case: Case, problem: Problem, out: torch.Tensor) -> None:
        topk(
            problem.logits, problem.lengths, case.k, row_starts=problem.row_starts, out=out,
            page_table=problem.page_table, page_size=PAGE_SIZE,
            narrow=case.dtype == "narrow", backend="cuda" if self.device == "cuda" else "torch",
        )  # fmt: skip

    def _cell(
        self, case: Case, copies: list[torch.Tensor], reference: Reference, floor_us: float
    ) -> str:
        """Measure every implementation in one cell; returns what the progress line shows."""
        begin = len(self.results)
        problem = reference.problem
        held = [dataclasses.replace(problem, logits=x) for x in copies]
        runs = self._implementations(case)
        for name, run in runs.items():
            row: Row = {
                "suite": case.suite, "dtype": case.dtype, "k": case.k, "rows": case.rows,
                "columns": case.columns, "kind": case.kind, "width": case.width or case.columns,
                "windows": case.windows, "implementation": name,
            }  # fmt: skip
            try:
                row |= self._warm(case, run, held[0], reference, floor_us, ours=name == OURS)
            except Exception as error:  # outside of what this peer takes
                if name == OURS:
                    raise
                self._refuse(name, case, error)
                continue
            self.results.append(row)
        mine = self.results[begin:]
        chosen = mine[1:] if self.cold_all else sorted(mine[1:], key=_warm_us)[:COLD_PEERS]
        for row in [mine[0], *chosen]:
            row["cold_us"] = self._cold(case, runs[row["implementation"]], held, row["warm_us"])
        return "  ".join(shown(row) for row in mine)

    def _warm(
        self, case: Case, run: Run, problem: Problem, reference: Reference, floor_us: float,
        ours: bool,
    ) -> Row:  # fmt: skip
        shape = (case.rows, case.k)
        out = torch.full(shape, DIRTY, dtype=torch.int32, device=self.device)
        run(problem, out)
        before = reference.judge(out, case.k, ties=ours)
        out.fill_(DIRTY)
        us = time_calls(
            [functools.partial(run, problem, out)], self.device,
            launches=self._launches(case, floor_us), replays=self.replays,
        )  # fmt: skip
        after = reference.judge(out, case.k, ties=ours)
        row: Row = {
            "warm_us": round(us, 3),
            "cold_us": None,
            "exact": before.exact and after.exact,
            "floor_us": round(floor_us, 3),
            "ratio": round(us / floor_us, 3),
        }
        if ours:
            row["lowest_index"] = before.ties and after.ties
        if not row["exact"]:
            row["why"] = before.why or after.why
        if case.suite == "prefill":
            row["gb_s"] = round(case.bytes_read / us / 1e3, 3)
        return row

    def _cold(self, case: Case, run: Run, held: list[Problem], warm_us: float) -> float:
        out = torch.empty(case.rows, case.k, dtype=torch.int32, device=self.device)
        calls = [functools.partial(run, problem, out) for problem in held]
        return time_cold(calls, self.device, warm_us, replays=self.replays)

    def _refuse(self, name: str, case: Case, error: Exception) -> None:
        """Say once for each dtype that a peer does not take a case."""
        if (name, case.dtype) not in self._refused:
            self._refused.add((name, case.dtype))
            self.say(f"  {name} refuses {case}: {error}"[:160])


def copies_for(read: int, held: int) -> int:
    """Return how many copies make a call cold that reads ``read`` of the ``held`` bytes of each."""
    return max(1, min(MOST_COPIES, -(-COLD_BYTES // read), MOST_BYTES // held))


def launches_for(us: float, most: int) -> int:
    """Return how many launches of at least ``us`` a graph gets: fewer where one takes long."""
    return max(4, min(most, int(GRAPH_US / max(2 * us, 1e-3))))


def time_cold(
    calls: Sequence[Callable[[], Any]], device: str, warm_us: float, *, replays: int
) -> float:
    """Time a rotation; one buffer that is larger than the L2 is cold already."""
    if len(calls) == 1:
        return warm_us
    # The rotation is larger than the L2, or each copy has one launch after the L2 was flushed.
    again = len(calls) < MOST_COPIES and warm_us < GRAPH_US / 20
    launches = max(20, len(calls)) if again else len(calls)
    return round(time_calls(calls, device, launches=launches, replays=replays, flush=True), 3)


def shown(row: Row) -> str:
    """Show warm/cold, where cold was measured; ! is an answer that is wrong."""
    cold = "" if row["cold_us"] is None else f"/{row['cold_us']:.2f}"
    return f"{row['implementation']} {row['warm_us']:.2f}{cold}{'' if sound(row) else '!'}"


def _warm_us(row: Row) -> float:
    return row["warm_us"]
