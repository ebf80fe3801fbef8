"""``dsv4-plugin bench candidates``: the run, the table, the plot and the results file."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin.testing.candidates.bars import bars
from dsv4_plugin.testing.candidates.layers import FullWidth, Ours, PrefillFullWidth, PrefillOurs
from dsv4_plugin.testing.candidates.problem import HEADS, PIECE, Pool, Prefill
from dsv4_plugin.testing.logits.cases import DTYPES
from dsv4_plugin.testing.progress import Progress
from dsv4_plugin.testing.results import Results
from dsv4_plugin.testing.timing import time_calls
from dsv4_plugin.testing.topk import UsageError, plot

__all__ = ["SUITES", "draw", "run"]

Row = dict[str, Any]
Timed = tuple[str, list[Callable[[], Any]]]  # an op, and the calls of its rotation

SUITES = ("decode", "prefill")
ROWS = (1, 4, 16, 64)
COLUMNS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
PREFILL = ((128, 1 << 20), (1024, 1 << 17))
CHAINS = ("consumer", "source", "step")
MOST_HELD, K, DENSE_RATE = 2048, 512, 4e6  # bytes a microsecond, for a guess
LONG_US = 400.0


def run(arguments: argparse.Namespace, about: Row, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the suites; returns the document of the results file, which is kept up to date."""
    suites = _suites(arguments)
    device = arguments.device
    if arguments.plot:
        plot.require()  # now, not when all is measured
    rows, columns = arguments.rows or ROWS, arguments.columns or COLUMNS
    width = max([*columns, *(() if device == "cpu" else COLUMNS)])
    if any(n % 128 for n in columns):
        raise UsageError("--columns of bench candidates must be multiples of 128")
    held = min(MOST_HELD, width // PIECE // 2)
    dtypes = arguments.dtype or ("bfloat16", "float32")
    if "narrow" in dtypes:
        raise UsageError(f"--dtype of bench candidates must be of {', '.join(DTYPES)}, got narrow")
    document: dict[str, Any] = {
        "machine": about,
        "what": "candidates",
        "complete": False,
        "suites": suites,
        "launches": arguments.launches,
        "replays": arguments.replays,
        "width": width,
        "heads": HEADS,
        "candidates": held,
        "k": min(K, held),
        "full_width": "the plugin's float32 logits and top-k; mask and block selection in torch",
        "bars": [],
        "results": [],
    }
    file = Results(document, arguments.json)
    bench = _Bench(arguments, document, say)
    try:
        pool = Pool(width, max(64, 2 * max(rows)) if device == "cuda" else max(rows), device)
        if "decode" in suites:
            say(f"\ndecode: us a call, keys from memory, buffers of {width:,} columns")
            cells = [(r, n) for r in rows for n in columns]
            bench.progress.start(len(cells) * len(dtypes))
            for r, n in cells:
                for dtype in dtypes:
                    if not bench.progress.spent():
                        bench.decode(pool, r, n, dtype)
                        file.save()
        if "prefill" in suites:
            say("\nprefill: us a call, one request, rows that see all keys")
            chunks = PREFILL if device == "cuda" else ((4, width),)
            bench.progress.start(len(chunks) * len(dtypes))
            for r, n in chunks:
                for dtype in dtypes:
                    if not bench.progress.spent():
                        bench.prefill(pool, r, n, dtype)
                        file.save()
        document["complete"] = not bench.progress.out_of_time
    except KeyboardInterrupt:
        say("interrupted: what was measured is reported")
    finally:
        file.save(now=True)
    held_to = bars(document["results"]) if device == "cuda" else []
    document["bars"] = [bar.as_dict() for bar in held_to]
    file.save(now=True)
    for line in [*table(document["results"]), "", *map(str, held_to)]:
        say(line)
    if arguments.plot:
        draw(document, arguments.plot)
        say(f"drawn to {arguments.plot}")
    return document


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
            guess = rows * columns * 132 / DENSE_RATE * (8 if op == "step" else 1)
            # A rotation once round, or as much of it as there is time for.
            launches = max(4, self.most // 10) if guess > LONG_US else max(self.most, len(calls))
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


def table(results: list[Row]) -> list[str]:
    """Return a block of lines for each suite: a line an op, a column for each cell."""
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in results):
        some = [row for row in results if row["suite"] == suite]
        counts = sorted({row["rows"] for row in some})
        for rows in counts:
            mine = [row for row in some if row["rows"] == rows]
            columns = sorted({row["columns"] for row in mine})
            heads = "".join(f"{f'{n // 1024}K':>10s}" for n in columns)
            lines += ["", f"{suite}, {rows} row{'s' if rows > 1 else ''}, us{'':36s}{heads}"]
            found: dict[tuple[str, str, str], dict[int, Row]] = {}
            for row in mine:
                key = row["implementation"], row["dtype"], row["op"]
                found.setdefault(key, {})[row["columns"]] = row
            for key, cells in found.items():
                shown = "".join(
                    f"{cells[n]['us']:9.2f}{' ' if cells[n]['exact'] else '!'}"
                    if n in cells else f"{'-':>10s}"
                    for n in columns
                )  # fmt: skip
                lines.append(f"{' '.join(key):50s}{shown}")
    return lines


def draw(document: Row, file: Path) -> None:
    """Draw the chains of decode into ``file``: a panel a chain, a pair of curves a row count.

    Raises:
        UsageError: matplotlib is not installed, or the document has no decode cells.
    """
    plot.require()
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    rows = [row for row in document["results"] if row["suite"] == "decode"]
    if not rows:
        raise UsageError("the results have no decode cells: nothing to draw")
    figure, axes = pyplot.subplots(1, len(CHAINS), figsize=(13.0, 4.6), squeeze=False)
    for axis, op in zip(axes[0], CHAINS, strict=True):
        for index, count in enumerate(sorted({row["rows"] for row in rows})):
            for name, dtype, style in (
                ("dsv4", "bfloat16", "-o"), ("full width", "float32", "--s"),
            ):  # fmt: skip
                line = sorted(
                    (row["columns"], row["us"])
                    for row in rows
                    if (row["op"], row["implementation"], row["dtype"]) == (op, name, dtype)
                    and row["rows"] == count
                )
                if line:
                    axis.plot(*zip(*line, strict=True), style, color=f"C{index}", markersize=3.5,
                              label=f"{name} {dtype}, {count} row{'s' if count > 1 else ''}")  # fmt: skip
        axis.set_title("step: eight index layers" if op == "step" else f"{op} layer")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({row["columns"] for row in rows})
        axis.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("keys a row")
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes[0][0].set_ylabel("µs")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize="small")
    about = document.get("machine", {})
    figure.suptitle(f"DeepSeek-V4.1's indexer, buffers of {document['width'] // 1024}K columns: "
                    f"{about.get('gpu', 'no GPU')}, dsv4-plugin {about.get('plugin', '?')}")  # fmt: skip
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    plot.save(figure, file)
