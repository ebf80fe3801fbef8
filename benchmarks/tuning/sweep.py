"""``python -m benchmarks.tuning.sweep --json FILE``: every choice of the top-k, on a GPU.

:mod:`.choice_sweep` times each choice replayed alone. ``--served`` also times the call as a server
makes it, ``--behind-logits`` also behind the logits.

A server captures its graphs at the greatest width. ``--width 262144 --columns 2176 8192`` measures
short rows in wide buffers. There ``--solo`` (the longest row that one CTA of a cluster serves)
matters too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.tool import tool
from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.choices import KS, TOPK_DTYPES
from dsv4_plugin.cli.shared.run import Parser, UsageError, interruptible, need_torch

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep the cells that the arguments name; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.tuning.sweep", description=__doc__)
    add = parser.add_argument
    add("--k", type=numbers.whole(1, max(KS)), nargs="+", default=KS)
    add("--rows", type=numbers.COUNT, nargs="+", help="default: those of bench topk, and 16")
    add("--columns", type=numbers.COUNT, nargs="+", help="default: those of bench topk")
    add("--width", type=numbers.COUNT, default=0, help="width of the buffer, wider than the rows")
    about = "longest row that one CTA of a cluster serves (default: the table's)"
    add("--solo", type=numbers.COUNT, nargs="+", default=(), metavar="SCORES", help=about)
    add("--dtype", nargs="+", choices=tuple(TOPK_DTYPES), default=("bfloat16", "float32"))
    add("--served", action="store_true", help="also time the call as a server makes it")
    add("--behind-logits", action="store_true", help="also time the call behind its logits")
    add("--launches", type=numbers.COUNT, default=20, help="launches in a graph (20)")
    add("--replays", type=numbers.COUNT, default=5, help="replays, whose median counts (5)")
    add("--budget", type=numbers.SECONDS, metavar="SECONDS", help="begin no cell after this time")
    add("--json", type=outputs.file, metavar="FILE", help="the results file")
    return tool(parser, _sweep, argv)


def _sweep(arguments: argparse.Namespace) -> int:
    need_torch()
    import torch

    from benchmarks.tuning.choice_sweep import Sweep
    from dsv4_plugin.cli.checks.timing import machine
    from dsv4_plugin.cli.checks.topk_cases import COLUMNS, ROWS, Case
    from dsv4_plugin.kernels import cuda

    every_columns = arguments.columns or COLUMNS
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here: a sweep needs one")
    if cuda.missing():
        raise UsageError(f"the compiled kernels are missing: {cuda.missing()}")
    if arguments.width and arguments.width < max(every_columns):
        raise UsageError(f"--width is {arguments.width}, less than the columns")
    sweep = Sweep(
        replays=arguments.replays, launches=arguments.launches, served=arguments.served,
        behind=arguments.behind_logits, solos=arguments.solo,
    )  # fmt: skip
    document: dict[str, Any] = {
        "machine": machine(), "what": "topk sweep", "complete": False,
        "results": sweep.results,
    }  # fmt: skip
    cells = [
        Case("decode", dtype, k, rows, columns, width=arguments.width)
        for dtype in arguments.dtype
        for rows in arguments.rows or (*ROWS, 16)
        for columns in every_columns
        for k in arguments.k
    ]
    progress = Progress(lambda line: print(line, flush=True), arguments.budget)
    progress.start(len(cells))
    with Results(document, arguments.json) as file:
        with interruptible() as work:
            for case in cells:
                if progress.spent():
                    break
                progress.done(f"{case}  {sweep.cell(case)}")
                file.save()
        document["complete"] = work.whole and not progress.out_of_time
    work.must(sweep.results, "nothing was measured: no cell is left", file.said())
    work.end(file.said())
    return 0 if all(row["exact"] for row in sweep.results) else 1


if __name__ == "__main__":
    sys.exit(main())
