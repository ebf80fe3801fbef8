"""``dsv4-plugin bench candidates``: its suites and what it times."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from dsv4_plugin.cli.bench import dry, floor, suites
from dsv4_plugin.cli.bench.candidates import report
from dsv4_plugin.cli.bench.candidates.layers import (
    FullWidth,
    PluginOps,
    PrefillFullWidth,
    PrefillPluginOps,
)
from dsv4_plugin.cli.bench.candidates.problem import FORMS, HEADS, PIECE, Pool, Prefill
from dsv4_plugin.cli.bench.cells import CellBench, Row, launches_for
from dsv4_plugin.cli.bench.logits.cases import DTYPES
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.cli.checks.compare import PLUGIN
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.cli.shared.choices import CANDIDATE_SUITES as SUITES
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["run"]

Timed = tuple[str, list[Callable[[], Any]]]  # an op, and the calls of its rotation

ROWS = (1, 4, 16, 64)
COLUMNS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
PREFILL = ((128, 1 << 20), (1024, 1 << 17))
FP4_PREFILL = ((8192, 1 << 13), (4096, 1 << 15), (1024, 1 << 17), (128, 1 << 20))
FP4_PREFILL_OPS = ("paged_logits", "block_maxima", "candidate_logits", "consumer", "source")
LAYERS = 8
MOST_HELD, K = 2048, 512
# Used to guess how long a call takes: bytes per microsecond, and the ops that read only some keys.
DENSE_RATE, FEW_KEYS = 4e6, MOST_HELD * PIECE
SHORT = ("select_blocks", "candidate_logits", "candidate_logits_ragged", "select_candidates")


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the suites, and keep the results file up to date."""
    names, device = suites.chosen(arguments, SUITES), arguments.device
    rows, columns = arguments.rows or ROWS, arguments.columns or COLUMNS
    width = max([*columns, *(() if device == "cpu" else COLUMNS)])
    if any(n % 128 for n in columns):
        raise UsageError("--columns of bench candidates must be multiples of 128")
    held = min(MOST_HELD, width // PIECE // 2)
    fp4 = arguments.cache == "fp4"
    dtypes = arguments.dtype or (("bfloat16",) if fp4 else ("bfloat16", "float32"))
    if fp4 and list(dtypes) != ["bfloat16"]:
        raise UsageError("--dtype must be bfloat16 with --cache fp4: the scores of FP4 keys are")
    rate = floor.read_rate(device)
    if device == "cuda":
        say(f"roof: read {rate / 1e3:.0f} GB/s; us a call, keys from memory, buffers of {width:,} "
            "columns")  # fmt: skip
    prefill = (FP4_PREFILL if fp4 else PREFILL) if device == "cuda" else ((4, width),)
    shapes = {
        "decode": [(r * m, n, m) for m in arguments.next_n for r in rows for n in columns],
        "prefill": [(r, n, r if fp4 else 1) for r, n in prefill],
    }
    cells = {
        name: [_Case(name, r, n, dtype, m) for r, n, m in shapes[name] for dtype in dtypes]
        for name in names
    }
    bench = suites.bench(_Bench, arguments, file, say, Peers())
    bench.width, bench.held, bench.k, bench.cache = width, held, min(K, held), arguments.cache
    bench.requests = max(64, 2 * max(rows)) if device == "cuda" else max(rows)
    bench.queries = max(case.rows for some in cells.values() for case in some)
    about = {
        "roof": {"read_gb_s": round(rate / 1e3, 1)},
        "width": width,
        "cache": arguments.cache,
        "heads": HEADS,
        "candidates": held,
        "k": bench.k,
    }
    if not fp4:
        about["full_width"] = (
            "float32: the plugin's logits and top-k, a mask and block scores, torch.topk"
        )
    suites.run(arguments, file, bench, cells, about, report.table)


class _Case(NamedTuple):
    """One cell."""

    suite: str
    rows: int
    columns: int
    dtype: str
    next_n: int = 1  # rows of a request


class _Bench(CellBench):
    """Measures cells in buffers of ``width`` columns."""

    width = requests = queries = held = k = 0
    cache = "fp8"

    def run(self, cases: Sequence[_Case]) -> None:
        """Measure the cases, each with all of its ops and chains."""
        self.progress.start(len(cases))
        for case in cases:
            if self.progress.spent():
                return
            begin = len(self.results)
            gathered = case.suite == "prefill" and self.cache == "fp8"
            (self._prefill if gathered else self._paged)(case)
            show = _shown if self.device == "cuda" else dry.shown
            shown = "  ".join(map(show, self.results[begin:]))
            of = f" ({case.next_n} a request)" if case.next_n > 1 else ""
            self.progress.done(f"{case.rows}{of} x {case.columns:,} {case.dtype}  {shown}")
            self.saved()

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self.width, self.requests, self.device, self.cache, self.queries)

    def _paged(self, case: _Case) -> None:
        """Measure decode, and prefill that reads pages."""
        prefill = case.suite == "prefill"
        plugin = PluginOps(
            self._pool, case.rows, case.columns, self.held, self.k, DTYPES[case.dtype],
            self.backend, case.next_n, case.columns if prefill else 0,
        )  # fmt: skip
        some: list[Any] = [plugin, *([FullWidth(plugin)] if case.dtype == "float32" else [])]
        for one in some:
            self._record(case, one.name, one.why_wrong(), [
                (op, [functools.partial(call, g) for g in one.groups])
                for op, call in one.ops.items() if not prefill or op in FP4_PREFILL_OPS
            ])  # fmt: skip

    def _prefill(self, case: _Case) -> None:
        problem = Prefill(self._pool, case.rows, case.columns)
        ops = functools.partial(PrefillPluginOps, problem, self.held, self.k)
        plugin = ops(DTYPES[case.dtype], self.backend)
        some: list[Any] = [plugin]
        if case.dtype != "float32":
            exact = ops(torch.float32, self.backend)
            exact.consumer()
            plugin.candidate_logits()
            same = torch.equal(plugin.scored, exact.scored.to(plugin.scored.dtype))
            wrong = "" if same else "candidate_logits_ragged: not the float32 scores, rounded"
        else:
            some.append(PrefillFullWidth(plugin))
            wrong = some[-1].why_wrong()
        for one in some:
            timed = [(op, [call]) for op, call in one.ops.items()]
            self._record(case, one.name, wrong, timed)

    def _record(self, case: _Case, name: str, wrong: str, timed: Sequence[Timed]) -> None:
        for op, calls in timed:
            # Use one whole rotation, or as much of it as the time allows.
            few = op in SHORT or (op == "consumer" and name == PLUGIN)
            keys = FEW_KEYS if few else case.columns
            size = FORMS[self.cache].key_bytes
            guess = case.rows * keys * size / DENSE_RATE * (LAYERS if op == "step" else 1)
            launches = launches_for(guess / 2, max(self.launches, len(calls)))
            us = time_calls(calls[:launches], self.device, launches=launches, replays=self.replays)
            row = {
                "suite": case.suite, "op": op, "implementation": name, "dtype": case.dtype,
                "rows": case.rows, "columns": case.columns, "us": round(us, 3), "exact": not wrong,
                **({"next_n": case.next_n} if case.next_n > 1 else {}),
            }  # fmt: skip
            self.results.append(row | ({"why": wrong} if wrong else {}))


def _shown(row: Row) -> str:
    full = "" if row["implementation"] == PLUGIN else "full "
    return f"{full}{row['op']} {row['us']:.2f}{'' if row['exact'] else '!'}"
