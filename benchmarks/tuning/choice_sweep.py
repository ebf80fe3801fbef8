"""Every choice of threads and cluster in every cell; the table of choices comes from these times.

For each cell it times the choice that ``choose_topk`` (csrc/include/dsv4/topk/tuning.cuh) makes,
and every other choice that can hold the row. It checks each answer first. It times the call
replayed alone, as a server makes it (:mod:`dsv4_plugin.cli.bench.topk.served`), or behind the
logits (:mod:`benchmarks.tuning.behind`). The choices never change the answer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.tuning.behind import Behind
from dsv4_plugin import topk
from dsv4_plugin.cli.bench.cells import DIRTY, Row
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.bench.topk.served import Elsewhere
from dsv4_plugin.cli.checks.timing import time_graph
from dsv4_plugin.cli.checks.topk_cases import Case, Problem
from dsv4_plugin.kernels import cuda
from dsv4_plugin.kernels.cuda import GUESS, SOLO

__all__ = ["CLUSTERS", "GUESS", "SOLO", "THREADS", "Sweep", "choices", "summary"]

THREADS = (256, 512)
CLUSTERS = (1, 2, 3, 4, 6, 8, 12, 16)
UNITS_A_THREAD = 64  # kTopkUnitSteps: of eight scores each
TABLE = "table"  # the name of choose_topk's choice


def choices(
    rows: int, columns: int, sms: int, solos: Sequence[int] = (), *, guesses: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Yield every (threads, cluster, solo) that can hold a row; with ``guesses`` also the guess.

    In a small call only those whose CTAs all run at once: twice as many as multiprocessors. A
    single row may have sixteen CTAs. ``columns`` is the width of the buffer. ``solo`` is each of
    ``solos``, by default the table's value for this number of threads. It has no effect with one
    CTA for each row.
    """
    for threads, cluster in itertools.product(THREADS, CLUSTERS):
        holds = threads * UNITS_A_THREAD * 8 * cluster
        if columns <= holds and (cluster == 1 or rows * cluster <= 2 * sms):
            tried = solos or (SOLO[threads],)
            for solo in tried[:1] if cluster == 1 else tried:
                yield threads, cluster, solo
    if guesses and columns <= 512 * UNITS_A_THREAD * 8:
        yield GUESS, 1, SOLO[GUESS]


class Sweep:
    """Measures cells; ``results`` has one row for each choice in each cell."""

    def __init__(
        self,
        *,
        replays: int,
        launches: int,
        served: bool = False,
        behind: bool = False,
        solos: Sequence[int] = (),
    ) -> None:
        """Make the work between two calls, if the figure needs it."""
        self.replays, self.launches, self.solos = replays, launches, solos
        self.elsewhere = Elsewhere("cuda") if served else None
        self.behind = Behind() if behind else None
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.results: list[Row] = []

    def cell(self, case: Case) -> str:
        """Measure every choice in one cell; return a line with the best and the table's choice."""
        if self.behind is None:
            problem = case.make("cuda")
        else:
            problem, score = self.behind.problem(case)
        source = problem.logits.clone() if self.elsewhere else None
        width = case.width or case.columns
        guesses = case.dtype == "float32"
        every = [None, *choices(case.rows, width, self.sms, self.solos, guesses=guesses)]
        calls = [self._call(case, problem, choice) for choice in every]
        mine = [
            self._row(case, problem, source, choice, *call)
            for choice, call in zip(every, calls, strict=True)
        ]
        if self.behind is not None:
            run = [call for call, _ in calls]
            took = self.behind.us(case.dtype, score, run, replays=self.replays)
            for row, us in zip(mine, took, strict=True):
                row["behind_us"] = round(us, 3)
        self.results += mine
        return summary(mine)

    def _call(
        self, case: Case, problem: Problem, choice: tuple[int, int, int] | None
    ) -> tuple[Callable[[], Any], torch.Tensor]:
        out = torch.full((case.rows, case.k), DIRTY, dtype=torch.int32, device="cuda")
        if choice is None:
            return functools.partial(
                topk, problem.logits, problem.lengths, case.k, page_table=problem.page_table,
                out=out, backend="cuda",
            ), out  # fmt: skip
        return functools.partial(
            cuda.topk_with, problem.logits, problem.lengths, out, threads=choice[0],
            cluster=choice[1], solo=choice[2], page_table=problem.page_table,
        ), out  # fmt: skip

    def _row(
        self,
        case: Case,
        problem: Problem,
        source: torch.Tensor | None,
        choice: tuple[int, int, int] | None,
        call: Callable[[], Any],
        out: torch.Tensor,
    ) -> Row:
        call()
        judged = judge(problem, out, ties=True)
        row: Row = {
            "dtype": case.dtype, "k": case.k, "rows": case.rows, "columns": case.columns,
            "width": case.width or case.columns, "threads": choice[0] if choice else TABLE,
            "cluster": choice[1] if choice else TABLE, "solo": choice[2] if choice else TABLE,
            "exact": judged.exact and judged.ties,
            "warm_us": round(
                time_graph([call], launches=self.launches, replays=self.replays), 3
            ),
        }  # fmt: skip
        if self.elsewhere is not None and source is not None:
            us = self.elsewhere.served_us(
                case.dtype, call, problem.logits, source, replays=self.replays
            )
            row["served_us"] = round(us, 3)
        return row


def summary(rows: Sequence[Row]) -> str:
    """Return the best choices of one cell and the time of the table's choice."""
    table = next(row for row in rows if row["threads"] == TABLE)
    text = []
    for field, name in (("warm_us", "warm"), ("served_us", "served"), ("behind_us", "behind")):
        if field not in table:
            continue
        best = sorted((r for r in rows if r["threads"] != TABLE), key=lambda r: r[field])[:3]
        shown = ", ".join(f"{_name(r)} {r[field]:.2f}" for r in best)
        text.append(f"{name}: table {table[field]:.2f}; {shown}")
    wrong = [row for row in rows if not row["exact"]]
    return "  |  ".join(text) + (f"  NOT EXACT: {len(wrong)}" if wrong else "")


def _name(row: Row) -> str:
    solo = "" if row["solo"] == SOLO[row["threads"]] else f" solo {row['solo']}"
    threads = "512 with a guess" if row["threads"] == GUESS else row["threads"]
    return f"{row['cluster']} x {threads}{solo}"
