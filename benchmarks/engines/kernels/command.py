"""``dsv4-plugin bench adapters``: the run, the table and the results file."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines.kernels import sglang, tokenspeed
from benchmarks.engines.kernels.cells import Run, Task, by_rounds, engaged
from dsv4_plugin.cli.bench.cells import Row, launches_for
from dsv4_plugin.cli.bench.topk import peers
from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.cli.shared.choices import ADAPTERS
from dsv4_plugin.cli.shared.run import UsageError, interruptible

__all__ = ["SUITES", "run"]

SUITES = dict(zip(ADAPTERS, (sglang.cells, tokenspeed.cells), strict=True))
FORMS = tuple(form for form in peers.FORMS if form.startswith(tuple(SUITES)))


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the adapters, and keep the results file up to date."""
    names = _suites(arguments)
    others = peers.load(arguments.peers, FORMS)
    for name, why in others.missing.items():
        say(f"{name} is not compared: {why}")
    document = file.document
    document |= {
        "suites": names,
        "launches": arguments.launches,
        "replays": arguments.replays,
        "missing": dict(others.missing),
        "deep_gemm": tokenspeed.has_deep_gemm(),
        "bars": [],
        "results": [],
    }
    if not document["deep_gemm"]:
        say("deep_gemm cannot be imported: ours select on the plugin's own logits only")
    todo = by_rounds([
        task
        for name in names
        for task in SUITES[name](
            arguments.device, others, arguments.k or (512,), arguments.rows or (),
            arguments.columns or (),
        )
    ])  # fmt: skip
    document["not_run"] = [str(task) for task in todo]
    progress = Progress(say, arguments.budget)
    progress.start(len(todo))
    say(f"{len(todo)} cells; us in a CUDA graph (eager: call by call), ! not exact")
    with interruptible() as work, engaged():
        for task in todo:
            if progress.spent():
                break
            runs = task.make()
            rows = [_measured(task, one, arguments) for one in runs]
            document["results"] += rows
            document["not_run"].remove(str(task))
            progress.done(f"{task}  " + "  ".join(map(_shown, rows)))
            file.save(now=True)  # the next cell may compile for minutes
            del runs
    done = document["results"] or progress.out_of_time
    work.must(done, "nothing was measured: no cell is left", file.said())
    document["complete"] = work.whole and not progress.out_of_time
    file.save(now=True)
    for line in _table(document["results"]):
        say(line)
    work.end(file.said())


def _suites(arguments: argparse.Namespace) -> list[str]:
    for option in ("dtype", "against", "plot"):
        if getattr(arguments, option):
            raise UsageError(f"--{option} is not for bench adapters")
    chosen = arguments.suite
    if chosen == ["decode"] or "all" in chosen:  # the default of the other benchmarks
        return list(SUITES)
    strange = [name for name in chosen if name not in SUITES]
    if strange:
        raise UsageError(
            f"--suite of bench adapters must be of {', '.join(SUITES)} or all, got {strange[0]}"
        )
    return list(dict.fromkeys(chosen))


def _measured(task: Task, one: Run, arguments: argparse.Namespace) -> Row:
    """Check, time and check again; what fails is a row that says so."""
    row: Row = {**task.about, "implementation": one.name, "graph": one.graph, "us": None}
    try:
        one.soil()
        one.call()
        before = one.judge()
        one.soil()
        row["us"] = round(_time(one, arguments), 3)
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


def _time(one: Run, arguments: argparse.Namespace) -> float:
    """Return microseconds a call: in a graph, or for what synchronises by the wall clock."""
    if not one.graph or arguments.device != "cuda":
        return _eager(one.call, arguments.device)
    guess = _eager(one.call, "cuda")
    return time_calls(
        [one.call], "cuda", launches=launches_for(guess / 4, arguments.launches),
        replays=arguments.replays,
    )  # fmt: skip


def _eager(call: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(3 if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def _shown(row: Row) -> str:
    if row["us"] is None:
        return f"{row['implementation']} failed: {row.get('error', '')[:80]}"
    eager = "" if row["graph"] else " eager"
    found = f" recall {row['recall']:.4f}" if "recall" in row else ""
    return f"{row['implementation']} {row['us']:.2f}{eager}{_mark(row)}{found}"


def _mark(row: Row) -> str:
    return "" if row.get("exact", True) and row.get("lowest_index", True) else "!"


def _table(results: list[Row]) -> list[str]:
    """Return ours beside the engine's own, a line a cell."""
    lines = [
        "",
        f"{'call':28s} {'k':>5s} {'rows x columns':>16s} "
        f"{'ours':>34s} {'the engine':>34s} {'x':>7s}",
    ]
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in results:
        key = row["suite"], row["call"], row["k"], row["rows"], row["columns"]
        cells.setdefault(key, []).append(row)
    for (suite, call, k, rows, columns), some in cells.items():
        timed = [row for row in some if row["us"] is not None]
        mine = [row for row in timed if row["implementation"].startswith("dsv4")]
        theirs = [row for row in timed if not row["implementation"].startswith("dsv4")]
        best = min(mine, key=_us) if mine else None
        bar = min(theirs, key=_us) if theirs else None
        ratio = f"{bar['us'] / best['us']:.2f}" if best and bar else "-"
        lines.append(
            f"{suite + ' ' + call:28s} {k or '-':>5} {f'{rows} x {columns}':>16s} "
            f"{_brief(best):>34s} {_brief(bar):>34s} {ratio:>7s}"
        )
    return lines


def _us(row: Row) -> float:
    return float(row["us"])


def _brief(row: Row | None) -> str:
    return "-" if row is None else f"{row['implementation']} {row['us']:.2f}{_mark(row)}"
