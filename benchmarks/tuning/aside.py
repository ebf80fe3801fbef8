"""``python -m benchmarks.tuning.aside --json FILE``: where an engine's own top-k is faster.

The file decides what ``DSV4_TOPK=auto`` leaves to an engine's own kernel
(:mod:`benchmarks.tables.aside`). A cell is one call of an engine on float32 logits that the engine
wrote. The driver times it with the plugin and with the kernel that the engine chooses, as a server
makes the call (:mod:`dsv4_plugin.cli.bench.topk.served`): it overwrites the L2, runs other kernels,
writes the logits and makes the call. In a captured graph the buffer has its full width even if the
rows are short, so the driver also measures short rows in wide buffers. Beside the times it records
whether the engine's kernel is exact, also on scores that are hard for a top-k.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.tool import tool
from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import choices, numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError, interruptible, need_torch

if TYPE_CHECKING:
    import torch

    from dsv4_plugin.cli.bench.cells import Row
    from dsv4_plugin.cli.bench.peers import Peers
    from dsv4_plugin.cli.bench.topk.served import Elsewhere
    from dsv4_plugin.cli.checks.topk_cases import Problem

__all__ = ["CALLS", "main", "parser"]

LAUNCHES = 6
GRAPH_US = 6000.0


class Call(NamedTuple):
    """A call of an engine: the suite it belongs to, the kernel beside the plugin, and its cells."""

    suite: str
    peer: str
    rows: Sequence[int]
    columns: Sequence[int]
    widest: int  # of the buffer of a captured graph; 0: every buffer is as wide as its rows


CALLS = {
    "vllm.decode": Call(
        "decode", "vllm33", (1, 8, 16, 32, 64, 65, 128, 256, 512),
        (4096, 8192, 16_384, 32_768, 65_536, 131_072, 163_840, 262_144), 262_144,
    ),
    "vllm.prefill": Call(
        "prefill", "vllm33_prefill", (64, 256, 1024, 4096),
        (4096, 8192, 16_384, 32_768, 65_536, 131_072), 0,
    ),
    "sglang.dsa": Call(
        "paged", "sglang_v2_paged", (1, 8, 15, 16, 32, 64, 128, 256),
        (4096, 8192, 16_384, 32_768, 65_536), 0,
    ),
}  # fmt: skip
MOST_BYTES = 3 << 30  # of the logits of a cell
HARD_SHAPES = ((1, 8192), (8, 32_768), (8, 65_536), (96, 16_384), (128, 65_536))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cells of the calls; returns the exit code."""
    return tool(parser(), _run, argv)


def parser() -> Parser:
    """Return the command line."""
    parser = Parser(prog="python -m benchmarks.tuning.aside", description=__doc__)
    add = parser.add_argument
    add("--call", nargs="+", choices=tuple(CALLS), default=tuple(CALLS))
    add("--k", type=numbers.whole(1, max(choices.KS)), nargs="+", default=[2048])
    add("--rows", type=numbers.COUNT, nargs="+", help="only these")
    add("--columns", type=numbers.COUNT, nargs="+", help="only these")
    add("--peers", type=Path, metavar="FILE.py",
        help="the engines' own kernels, in place of those that are installed here")  # fmt: skip
    add("--library", type=Path, nargs="*", default=(), help="libraries of torch ops to load")
    add("--replays", type=numbers.COUNT, default=9, help="whose median counts (9)")
    add("--budget", type=numbers.SECONDS, metavar="SECONDS", help="begin no cell after it")
    add("--json", type=outputs.file, metavar="FILE", help="write the results there")
    return parser


def _peer(name: str, peers: Peers) -> str:
    """Return the name of the engine's kernel: the file's, or that of an installed engine."""
    call = CALLS[name]
    engine = name.partition(".")[0]
    installed = (found for found in peers[call.suite] if found.startswith(f"{engine} "))
    return call.peer if call.peer in peers[call.suite] else next(installed, call.peer)


def _run(arguments: argparse.Namespace) -> int:
    need_torch()
    import torch

    from dsv4_plugin.cli.bench import peers, upstream
    from dsv4_plugin.cli.bench.topk.served import Elsewhere
    from dsv4_plugin.cli.checks.timing import machine

    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here: nothing was measured")
    for library in arguments.library:
        torch.ops.load_library(str(library))
    if arguments.peers is not None:
        found = peers.load(arguments.peers, peers.TOPK_FORMS)
    else:
        engines = {name.partition(".")[0] for name in arguments.call}
        found = upstream.load(sorted(engines), peers.TOPK_FORMS, None, of="topk")
    document: dict[str, Any] = {
        "machine": machine(), "what": "aside", "complete": False,
        "engines": {name: _peer(name, found) for name in CALLS},
        "missing": found.missing, "results": [], "exactness": [],
    }  # fmt: skip
    progress = Progress(lambda line: print(line, flush=True), arguments.budget)
    with Results(document, arguments.json) as file:
        with interruptible() as work:
            elsewhere = Elsewhere("cuda")
            cells = list(_cells(arguments))
            progress.start(len(cells))
            for name, case in cells:
                if progress.spent():
                    break
                engine = found[CALLS[name].suite].get(_peer(name, found))
                if engine is None:
                    progress.done(f"{name}: no {CALLS[name].peer}, and no such engine here")
                    continue
                row = _cell(name, case, engine, elsewhere, arguments.replays)
                document["exactness" if case.kind != "normal" else "results"].append(row)
                progress.done(f"{name} {case}  {_shown(row)}")
                file.save()
        document["complete"] = bool(work.whole and not progress.out_of_time and document["results"])
    work.end(file.said())
    return 0


def _cells(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Yield each call's cells; first those that test whether the engine's kernel is exact."""
    from dsv4_plugin.cli.checks.topk_cases import ADVERSARIAL, Case

    for name in arguments.call:
        call = CALLS[name]
        case = functools.partial(Case, call.suite, "float32")
        for k in arguments.k:
            for rows, columns in HARD_SHAPES:
                for kind in ADVERSARIAL:
                    yield name, case(k, rows, columns, kind=kind)
    for name in arguments.call:
        call = CALLS[name]
        case = functools.partial(Case, call.suite, "float32")
        for k in arguments.k:
            for rows in arguments.rows or call.rows:
                for columns in arguments.columns or call.columns:
                    if rows * columns * 4 <= MOST_BYTES and columns > k:
                        yield name, case(k, rows, columns)
                    if columns < call.widest and rows * call.widest * 4 <= MOST_BYTES:
                        yield name, case(k, rows, columns, width=call.widest)


def _cell(name: str, case: Any, engine: Any, elsewhere: Elsewhere, replays: int) -> Row:
    """Check both implementations in a cell, and time them if its scores are ordinary."""
    import torch

    from dsv4_plugin import topk
    from dsv4_plugin.cli.bench.cells import DIRTY
    from dsv4_plugin.cli.bench.topk.check import judge
    from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE

    problem = case.make("cuda")
    row: Row = {
        "call": name, "k": case.k, "rows": case.rows, "columns": case.columns,
        "width": case.width or case.columns, "kind": case.kind,
    }  # fmt: skip
    out = torch.empty(case.rows, case.k, dtype=torch.int32, device="cuda")

    def plugin() -> None:
        topk(
            problem.logits, problem.lengths, case.k, row_starts=problem.row_starts, out=out,
            page_table=problem.page_table, page_size=PAGE_SIZE,
        )  # fmt: skip

    def own() -> None:
        _by_engine(case.suite, engine, problem, case.k, out)

    for who, call in (("plugin", plugin), ("engine", own)):
        out.fill_(DIRTY)
        call()
        verdict = judge(problem, out, ties=True)
        row[f"{who}_exact"], row[f"{who}_lowest_index"] = verdict.exact, verdict.ties
    if case.kind != "normal":
        return row
    source = problem.logits.clone()
    calls = {"plugin": plugin, "engine": own}
    row |= _served(elsewhere, problem.logits, source, calls, case.bytes_read, replays)
    return row


def _by_engine(suite: str, engine: Any, problem: Problem, k: int, out: torch.Tensor) -> None:
    if suite == "prefill":
        engine(problem.logits, problem.starts, problem.row_ends, k, out)
    elif suite == "paged":
        engine(problem.logits, problem.lengths, problem.page_table, k, out)
    else:
        engine(problem.logits, problem.lengths, k, out)


def _served(
    elsewhere: Elsewhere,
    scores: torch.Tensor,
    source: torch.Tensor,
    calls: dict[str, Callable[[], None]],
    read: int,
    replays: int,
) -> Row:
    """Return the microseconds of each call just after its logits were written, and replayed alone.

    All graphs are replayed in turn. So the two times whose difference is taken, with and without
    the call, come from neighbouring replays.
    """
    import torch

    from dsv4_plugin.cli.checks.timing import capture

    launches = max(2, min(LAUNCHES, int(GRAPH_US / (150 + read / 5e5))))

    def layer(call: Callable[[], None] | None) -> None:
        elsewhere.between("float32")
        scores.copy_(source)
        if call is not None:
            call()

    graphs = {
        who: capture([functools.partial(layer, call)], launches)
        for who, call in {"none": None, **calls}.items()
    }
    alone = {who: capture([call], 3 * launches) for who, call in calls.items()}

    def us(graph: torch.cuda.CUDAGraph, count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / count

    took: dict[str, list[float]] = {who: [] for who in calls}
    warm: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(replays + 1):
        times = {who: us(graph, launches) for who, graph in graphs.items()}
        for who, graph in alone.items():
            if turn:
                took[who].append(times[who] - times["none"])
                warm[who].append(us(graph, 3 * launches))
    return {
        **{f"{who}_us": round(statistics.median(took[who]), 3) for who in calls},
        **{f"{who}_warm_us": round(statistics.median(warm[who]), 3) for who in calls},
    }


def _shown(row: Row) -> str:
    wrong = "" if row["engine_exact"] else "  engine wrong"
    if "plugin_us" not in row:
        return wrong or "exact"
    return (
        f"plugin {row['plugin_us']:.2f} engine {row['engine_us']:.2f}  alone "
        f"{row['plugin_warm_us']:.2f} {row['engine_warm_us']:.2f}{wrong}"
    )


if __name__ == "__main__":
    sys.exit(main())
