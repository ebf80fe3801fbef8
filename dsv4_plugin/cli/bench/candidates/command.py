"""``dsv4-plugin bench candidates``: the run and the results file."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4_plugin.cli.bench import dry
from dsv4_plugin.cli.bench.candidates import report
from dsv4_plugin.cli.bench.candidates.bars import bars
from dsv4_plugin.cli.bench.candidates.layers import FullWidth, Ours, PrefillFullWidth, PrefillOurs
from dsv4_plugin.cli.bench.candidates.problem import HEADS, KEY_BYTES, PIECE, Pool, Prefill
from dsv4_plugin.cli.bench.cells import launches_for
from dsv4_plugin.cli.bench.logits.cases import DTYPES
from dsv4_plugin.cli.bench.topk import floor
from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.cli.shared.run import UsageError, interruptible

__all__ = ["SUITES", "run"]

Row = dict[str, Any]
Timed = tuple[str, list[Callable[[], Any]]]  # an op, and the calls of its rotation

SUITES = ("decode", "prefill")
ROWS = (1, 4, 16, 64)
COLUMNS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
PREFILL = ((128, 1 << 20), (1024, 1 << 17))
LAYERS = 8
MOST_HELD, K = 2048, 512
# To guess how long a call takes: bytes a microsecond, and the ops that do not look at all keys.
DENSE_RATE, FEW_KEYS = 4e6, MOST_HELD * PIECE
SHORT = ("select_blocks", "candidate_logits", "candidate_logits_ragged", "select_candidates")


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the suites, and keep the results file up to date."""
    suites = _suites(arguments)
    device = arguments.device
    rows, columns = arguments.rows or ROWS, arguments.columns or COLUMNS
    width = max([*columns, *(() if device == "cpu" else COLUMNS)])
    if any(n % 128 for n in columns):
        raise UsageError("--columns of bench candidates must be multiples of 128")
    held = min(MOST_HELD, width // PIECE // 2)
    dtypes = arguments.dtype or ("bfloat16", "float32")
    rate = floor.read_rate(device)
    say(f"roof: read {rate / 1e3:.0f} GB/s")
    document = file.document
    document |= {
        "suites": suites,
        "launches": arguments.launches,
        "replays": arguments.replays,
        "roof": {"read_gb_s": round(rate / 1e3, 1)},
        "width": width,
        "heads": HEADS,
        "candidates": held,
        "k": min(K, held),
        "full_width": "float32: the plugin's logits and top-k, a mask and block scores, torch.topk",
        "bars": [],
        "results": [],
    }
    bench = _Bench(arguments, document, say)
    with interruptible() as work:
        pool = Pool(width, max(64, 2 * max(rows)) if device == "cuda" else max(rows), device)
        cells = [(r, n) for r in rows for n in columns]
        chunks = PREFILL if device == "cuda" else ((4, width),)
        for suite, some, measure in (
            ("decode", cells, bench.decode), ("prefill", chunks, bench.prefill),
        ):  # fmt: skip
            if suite not in suites:
                continue
            say(f"\n{suite}: us a call, keys from memory, buffers of {width:,} columns, ! wrong")
            bench.progress.start(len(some) * len(dtypes))
            for r, n in some:
                for dtype in dtypes:
                    if not bench.progress.spent():
                        measure(pool, r, n, dtype)
                        file.save()
    file.save(now=True)
    results = document["results"]
    work.must(results, "nothing was measured: no cell is left", file.said())
    document["complete"] = work.whole and not bench.progress.out_of_time
    goals = bars(results) if device == "cuda" else []
    document["bars"] = [bar.as_dict() for bar in goals]
    file.save(now=True)
    end = ["", "Bars", *map(str, goals)] if device == "cuda" else dry.answers(results)
    for line in report.table(results) + end:
        say(line)
    if arguments.plot:
        report.draw(document, arguments.plot)
        say(f"drawn to {arguments.plot}")
    work.end(file.said())


def _suites(arguments: argparse.Namespace) -> list[str]:
    for option in ("k", "against", "peers"):
        if getattr(arguments, option):
            raise UsageError(f"--{option} is not for bench candidates")
    names = list(SUITES) if "all" in arguments.suite else list(dict.fromkeys(arguments.suite))
    for name in names:
        if name not in SUITES:
            raise UsageError(
                f"--suite of bench candidates must be of {', '.join(SUITES)} or all, got {name}"
            )
    return names


class _Bench:
    """Measures cells into ``document["results"]``."""

    def __init__(
        self, arguments: argparse.Namespace, document: Row, say: Callable[[str], None]
    ) -> None:
        self.device, self.document = arguments.device, document
        self.most, self.replays = arguments.launches, arguments.replays
        self.backend = "cuda" if self.device == "cuda" else "torch"
        self.progress = Progress(say, arguments.budget)

    def decode(self, pool: Pool, rows: int, columns: int, dtype: str) -> None:
        """All ops and chains of one cell."""
        d = self.document
        ours = Ours(pool, rows, columns, d["candidates"], d["k"], DTYPES[dtype], self.backend)
        self._record("decode", rows, columns, dtype, ours.name, ours.why_wrong(), [
            (op, [functools.partial(call, g) for g in ours.groups])
            for op, call in ours.ops.items()
        ])  # fmt: skip
        if dtype == "float32":
            full = FullWidth(ours)
            self._record("decode", rows, columns, dtype, full.name, full.why_wrong(), [
                (op, [functools.partial(call, g) for g in full.groups])
                for op, call in full.ops.items()
            ])  # fmt: skip
        self.progress.done(f"{rows} x {columns:,} {dtype}  {self._shown(rows, columns, dtype)}")

    def prefill(self, pool: Pool, rows: int, columns: int, dtype: str) -> None:
        """All ops and the chain of one chunk."""
        d = self.document
        problem = Prefill(pool, rows, columns)
        ours = PrefillOurs(problem, d["candidates"], d["k"], DTYPES[dtype], self.backend)
        if dtype != "float32":
            exact = PrefillOurs(problem, d["candidates"], d["k"], torch.float32, self.backend)
            exact.consumer()
            ours.candidate_logits()
            same = torch.equal(ours.scored, exact.scored.to(ours.scored.dtype))
            wrong = "" if same else "candidate_logits_ragged: not the float32 scores, rounded"
            self._record("prefill", rows, columns, dtype, ours.name, wrong,
                         [(op, [call]) for op, call in ours.ops.items()])  # fmt: skip
        else:
            full = PrefillFullWidth(ours)
            wrong = full.why_wrong()
            for some in (ours, full):
                self._record("prefill", rows, columns, dtype, some.name, wrong,
                             [(op, [call]) for op, call in some.ops.items()])  # fmt: skip
        self.progress.done(f"{rows} x {columns:,} {dtype}  {self._shown(rows, columns, dtype)}")

    def _record(
        self, suite: str, rows: int, columns: int, dtype: str, name: str, wrong: str,
        timed: Sequence[Timed],
    ) -> None:  # fmt: skip
        for op, calls in timed:
            # A rotation once round, or as much of it as there is time for.
            few = op in SHORT or (op == "consumer" and name == Ours.name)
            keys = FEW_KEYS if few else columns
            guess = rows * keys * KEY_BYTES / DENSE_RATE * (LAYERS if op == "step" else 1)
            launches = launches_for(guess / 2, max(self.most, len(calls)))
            us = time_calls(calls[:launches], self.device, launches=launches, replays=self.replays)
            row = {
                "suite": suite, "op": op, "implementation": name, "dtype": dtype, "rows": rows,
                "columns": columns, "us": round(us, 3), "exact": not wrong,
            }  # fmt: skip
            self.document["results"].append(row | ({"why": wrong} if wrong else {}))

    def _shown(self, rows: int, columns: int, dtype: str) -> str:
        cell = (rows, columns, dtype)
        return "  ".join(
            f"{'' if row['implementation'] == 'dsv4' else 'full '}{row['op']} {row['us']:.2f}"
            f"{'' if row['exact'] else '!'}"
            for row in self.document["results"]
            if (row["rows"], row["columns"], row["dtype"]) == cell
        )
