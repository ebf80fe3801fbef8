"""One run of a benchmark of cells: its suites, peers, results file, tables and plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from dsv4_plugin.cli import plots
from dsv4_plugin.cli.bench import upstream
from dsv4_plugin.cli.bench.cells import CellBench, Row
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.cli.checks import compare
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared.run import UsageError, interruptible

__all__ = ["answers", "bench", "chosen", "peers", "run"]

Say = Callable[[str], None]
Bench = TypeVar("Bench", bound=CellBench)


def chosen(arguments: argparse.Namespace, known: Sequence[str]) -> list[str]:
    """Return the suites of ``--suite`` without repetitions.

    Raises:
        UsageError: ``--plot`` finds nothing to draw in them.
    """
    names = list(known) if "all" in arguments.suite else list(dict.fromkeys(arguments.suite))
    if arguments.plot and "decode" not in names:
        raise UsageError("--plot draws the suite decode, which is not run")
    return names


def peers(arguments: argparse.Namespace, forms: Sequence[str], say: Say) -> Peers:
    """Load the peers of ``--peers`` and ``--against``, and print which are missing."""
    found = upstream.load(arguments.against, forms, arguments.peers, of=arguments.what)
    for name, why in found.missing.items():
        say(f"{name} is not compared: {why}")
    return found


def bench(
    kind: type[Bench], arguments: argparse.Namespace, file: Results, say: Say, others: Peers
) -> Bench:
    """Make the object that measures the cells, with the options of the command line."""
    return kind(
        others, say, file.save, device=arguments.device,
        cold_all=getattr(arguments, "cold", False), launches=arguments.launches,
        replays=arguments.replays, budget_s=arguments.budget, results=file.document["results"],
    )  # fmt: skip


def run(
    arguments: argparse.Namespace,
    file: Results,
    measure: CellBench,
    suites: Mapping[str, Sequence[Any]],
    about: Row,
    tables: Callable[[list[Row]], list[str]],
    **engines: str,
) -> None:
    """Measure the suites, keep the results file up to date, and print the results.

    Args:
        arguments: the options.
        file: the results file; ``about`` becomes part of it.
        measure: the object that measures the cells of a suite.
        suites: the cells by suite.
        about: what the results were measured with.
        tables: makes the tables of the results.
        engines: the peers that stand for what an engine runs itself.

    Raises:
        UsageError: nothing was measured.
    """
    document, say, results = file.document, measure.say, measure.results
    on_gpu = arguments.device == "cuda"
    document |= {
        "suites": list(suites), "launches": arguments.launches, "replays": arguments.replays,
        **about,
    }  # fmt: skip
    with interruptible() as work:
        for name, cells in suites.items():
            what = "us warm/cold, ! wrong" if on_gpu else "answers only"
            say(f"\n{name}: {len(cells)} cells; {what}")
            measure.run(cells)
    out_of_time = measure.progress.out_of_time
    work.must(results or out_of_time, "nothing was measured: no cell is left", file.said())
    document["complete"] = work.whole and not out_of_time
    file.save(now=True)
    lines: list[str] = []
    if on_gpu:
        lines = [*tables(results), "", *map(str, compare.ratios(results, **engines))]
    for line in lines + answers(results):
        say(line)
    if arguments.plot:
        k = getattr(arguments, "k", None)
        plots.draw(document, arguments.plot, k=k[0] if k else None)
        say(f"drawn to {arguments.plot}")
    work.end(file.said())


def answers(results: list[Row]) -> list[str]:
    """Return one line per implementation: in how many cells its answers were right."""
    lines = ["", "Answers"]
    for name in dict.fromkeys(row["implementation"] for row in results):
        rows = [row for row in results if row["implementation"] == name]
        word = "exact" if "exact" in rows[0] else "right"
        if "lowest_index" in rows[0]:
            word += ", ties to the lowest index,"
        lines.append(f"{name}: {word} in {sum(map(compare.right, rows))} of {len(rows)} cells")
    return lines
