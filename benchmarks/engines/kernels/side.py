"""The functions that the adapters install, beside the engines' own kernels for the same calls."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.engines.choices import ADAPTERS
from benchmarks.engines.kernels import own, sglang, tokenspeed
from benchmarks.engines.kernels.cells import Run, Task, by_rounds, engaged
from benchmarks.engines.part import Part, eager_us
from dsv4_plugin.cli.bench import peers
from dsv4_plugin.cli.bench.cells import Row, launches_for
from dsv4_plugin.cli.checks.compare import PLUGIN, right
from dsv4_plugin.cli.checks.timing import time_calls

__all__ = ["CELLS", "Side"]

CELLS = dict(zip(ADAPTERS, (sglang.cells, tokenspeed.cells), strict=True))
# Of a peers file: an engine's own function, called as the engine calls it.
FORMS = (
    "sglang_paged", "tokenspeed_decode", "tokenspeed_dsv4_decode", "tokenspeed_prefill",
    "tokenspeed_gather", "tokenspeed_read",
)  # fmt: skip


class Side:
    """The cells of one or both engines, the first of every call before the second of any."""

    def __init__(self, arguments: argparse.Namespace, engines: tuple[str, ...]) -> None:
        self.arguments, self.engines = arguments, engines
        self.peers = peers.load(arguments.peers, FORMS) if arguments.peers else own.peers()

    def about(self) -> Row:
        """Return the kernels to compare with."""
        return {"missing": dict(self.peers.missing), "deep_gemm": tokenspeed.has_deep_gemm()}

    def head(self, document: Row) -> Iterator[str]:
        """Return the lines that are printed before the parts run."""
        for name, why in self.peers.missing.items():
            yield f"{name} is not compared: {why}"
        if not document["deep_gemm"]:
            yield "deep_gemm cannot be imported: the plugin selects on its own logits only"

    def engaged(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the adapters run."""
        return engaged()

    def seams(self) -> None:
        """Return nothing: no engine is patched."""

    def parts(self) -> Iterator[Part]:
        """Give all parts in their order."""
        a = self.arguments
        tasks = [
            task
            for engine in self.engines
            for task in CELLS[engine](a.device, self.peers, a.k, a.rows or (), a.columns or ())
        ]
        for task in by_rounds(tasks):
            yield Part(str(task), functools.partial(self._run, task))

    def _run(self, task: Task) -> list[Row]:
        return [self._measured(task, one) for one in task.make()]

    def _measured(self, task: Task, one: Run) -> Row:
        """Check, time and check again; a failure is a row with its error."""
        row: Row = {**task.about, "implementation": one.name, "graph": one.graph, "us": None}
        try:
            one.soil()
            one.call()
            before = one.judge()
            one.soil()
            row["us"] = round(self._us(one), 3)
            after = one.judge()
        except Exception as error:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return row | {"exact": False, "error": f"{type(error).__name__}: {error}"[:300]}
        row |= before
        for name in ("exact", "lowest_index"):
            if name in before:
                row[name] = before[name] and after[name]
        if after != before:
            row["why"] = after.get("why") or before.get("why") or "two answers differ"
            row["exact"] = False
        return row

    def _us(self, one: Run) -> float:
        """Return microseconds a call: in a graph, or by the wall clock if it synchronises."""
        us = eager_us(one.call, self.arguments.device)
        if not one.graph or self.arguments.device != "cuda":
            return us
        return time_calls(
            [one.call], "cuda", launches=launches_for(us / 4, self.arguments.launches),
            replays=self.arguments.replays,
        )  # fmt: skip

    def tables(self, results: list[Row]) -> list[str]:
        """Return the plugin's fastest run beside the engine's own, one line for each cell."""
        lines = [
            "",
            f"{'call':28s} {'k':>5s} {'rows x columns':>16s} "
            f"{'plugin':>34s} {'engine':>34s} {'x':>7s}",
        ]
        cells: dict[tuple[Any, ...], list[Row]] = {}
        for row in results:
            key = row["suite"], row["call"], row["k"], row["rows"], row["columns"]
            if row["us"] is not None:
                cells.setdefault(key, []).append(row)
        for (suite, call, k, rows, columns), timed in cells.items():
            plugin = _best(timed, lambda name: name.startswith(PLUGIN))
            engine = _best(timed, lambda name: not name.startswith(PLUGIN))
            ratio = f"{engine['us'] / plugin['us']:.2f}" if plugin and engine else "-"
            lines.append(
                f"{suite + ' ' + call:28s} {k or '-':>5} {f'{rows} x {columns}':>16s} "
                f"{_brief(plugin):>34s} {_brief(engine):>34s} {ratio:>7s}"
            )
        return lines


def _best(rows: list[Row], of: Callable[[str], bool]) -> Row | None:
    some = (row for row in rows if of(row["implementation"]))
    return min(some, key=lambda row: row["us"], default=None)


def _brief(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['implementation']} {row['us']:.2f}{'' if right(row) else '!'}"
