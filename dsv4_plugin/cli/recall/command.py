"""``dsv4-plugin recall``: options, the run, the table, the results file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_plugin.cli import plots
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.recall import PAPER
from dsv4_plugin.cli.shared import numbers, outputs, screen
from dsv4_plugin.cli.shared.choices import KS
from dsv4_plugin.cli.shared.choices import RECALL_DTYPES as DTYPES
from dsv4_plugin.cli.shared.choices import RECALL_KINDS as KINDS
from dsv4_plugin.cli.shared.run import UsageError, examples, interruptible, need_torch

if TYPE_CHECKING:
    from dsv4_plugin.cli.recall import sources

__all__ = ["add_arguments", "run"]

COLUMNS = tuple(8192 << i for i in range(6))  # 8K … 256K
_ON_CPU: dict[str, Any] = {"rows": 32, "columns": (8192, 32_768)}
_ON_GPU: dict[str, Any] = {"rows": 1024, "columns": COLUMNS}

# measure.py has the full definitions.
LEGEND = """\
The selection on rounded scores against the float32 one: mean, 1st percentile and worst row.
beyond: differences without a tie after rounding (must be 0). gap, depth: how far the lowest choice
lies below the k-th, relative and in places. mass lost: share of the sum of the selected scores.
"""

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin recall``."""
    examples(
        parser,
        "--kind normal --k 512 --columns 8192",
        "--json recall.json --plot recall.svg",
    )
    add = parser.add_argument
    add(
        "--scores", type=Path, nargs="+", metavar="FILE.safetensors",
        help="use captured scores instead of drawn ones: float32 [rows, columns] tensors, with "
        "optional lengths",
    )  # fmt: skip
    add("--kind", nargs="+", choices=tuple(KINDS), help="drawn scores (default: all)")
    add(
        "--k",
        type=numbers.whole(1, max(KS)),
        nargs="+",
        default=list(KS),
        help="default: 512 1024 2048",
    )
    add("--columns", type=numbers.COUNT, nargs="+", help="default: 8K … 256K; on a CPU 8K and 32K")
    add("--rows", type=numbers.COUNT, help="rows of each kind (default: 1024; on a CPU 32)")
    add("--dtype", nargs="+", choices=tuple(DTYPES), help="default: all")
    add("--seed", type=numbers.SEED, default=0)
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    add("--json", type=outputs.file, metavar="FILE", help="write the results to this file")
    add(
        "--plot",
        type=outputs.plot,
        metavar="FILE",
        help="draw the results (.png or .svg); needs matplotlib",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin recall``.

    Returns:
        0 if rounding explains every difference, 1 if it does not.

    Raises:
        UsageError: the options cannot be run like this, or nothing was compared.
    """
    if arguments.scores and (arguments.kind or arguments.columns or arguments.rows):
        raise UsageError("--scores has its own rows: --kind, --columns and --rows do not apply")
    need_torch()
    import torch

    from dsv4_plugin.cli.checks.timing import machine

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; --device cpu runs on the torch reference")
    document: Row = {
        "machine": machine(),
        "what": "recall",
        "complete": False,
        "device": device,
        "seed": arguments.seed,
        "paper": PAPER,
        "results": [],
    }
    results = document["results"]
    left = _left(arguments, device)
    with Results(document, arguments.json) as file:
        print(f"{LEGEND}\n{_head()}", flush=True)
        with interruptible() as work:
            for row in _measured(arguments, device):
                results.append(row)
                print(f"{_line(row)}{left(len(results))}", flush=True)
                file.save()
        compared = any(row["rows"] for row in results)
        work.must(compared, "nothing was compared: no row is longer than k", file.said())
        document["complete"] = work.whole
        file.save(now=True)
        print(f"\n{_beside(results)}")
        if arguments.plot:
            plots.draw(document, arguments.plot)
            print(f"drawn to {arguments.plot}")
    work.end(file.said())
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if any(row.get("beyond_ties") for row in results) else 0


def _left(arguments: argparse.Namespace, device: str) -> Callable[[int], str]:
    """Return a function for the time left: on a terminal, if the number of cells is known."""
    if arguments.scores or screen.columns() is None:
        return lambda done: ""
    kinds, dtypes = arguments.kind or KINDS, arguments.dtype or DTYPES
    columns = arguments.columns or (_ON_GPU if device == "cuda" else _ON_CPU)["columns"]
    cells = len(kinds) * len(columns) * len(arguments.k) * len(dtypes)
    began = time.monotonic()

    def said(done: int) -> str:
        return f"  {screen.clock((time.monotonic() - began) / done * (cells - done))} left"

    return said


def _measured(arguments: argparse.Namespace, device: str) -> Iterator[Row]:
    """Yield the results as they are measured."""
    from dsv4_plugin.cli.recall import sources

    default = _ON_GPU if device == "cuda" else _ON_CPU
    dtypes = arguments.dtype or list(DTYPES)
    for file in arguments.scores or ():
        for name, width, batches in sources.captured(file, device=device):
            for row in _cells(batches, arguments.k, dtypes):
                yield {"scores": f"{file.name}: {name}", "columns": width, **row}
    if arguments.scores:
        return
    for kind in arguments.kind or KINDS:
        for width in arguments.columns or default["columns"]:
            drawn = sources.drawn(
                kind, arguments.rows or default["rows"], width, seed=arguments.seed, device=device
            )
            for row in _cells(drawn, arguments.k, dtypes):
                yield {"scores": kind, "columns": width, **row}


def _cells(
    batches: Iterable[sources.Scores], ks: Sequence[int], dtypes: Sequence[str]
) -> list[Row]:
    from dsv4_plugin import topk
    from dsv4_plugin.cli.recall.measure import Statistics

    cells = [Statistics(k, dtype) for k in ks for dtype in dtypes]
    for batch in batches:
        for k in ks:
            exact = topk(batch.scores, batch.lengths, k)
            for cell in cells:
                if cell.k == k:
                    cell.add(batch.scores, batch.lengths, exact)
    return [cell.row() for cell in cells]


def _head() -> str:
    return (
        f"{'scores':24s}{'columns':>8}{'k':>6}{'dtype':>10}{'rows':>6}{'mean %':>9}{'p1 %':>9}"
        f"{'worst %':>9}{'beyond':>8}{'gap':>10}{'depth':>7}{'mass lost':>11}"
    )


def _line(row: Row) -> str:
    line = f"{row['scores']:24s}{row['columns']:8d}{row['k']:6d}{row['dtype']:>10}{row['rows']:6d}"
    if not row["rows"]:
        return f"{line}  no row is longer than k"
    return (
        f"{line}{100 * row['mean']:9.3f}{100 * row['p1']:9.3f}{100 * row['worst']:9.3f}"
        f"{row['beyond_ties']:8d}{row['gap_worst']:10.2e}{row['depth_worst']:7d}"
        f"{row['mass_lost_mean']:11.2e}"
    )


def _beside(results: Sequence[Row]) -> str:
    """Compare the mean recall of bfloat16 here with the paper's."""
    means = [100 * row["mean"] for row in results if row["dtype"] == "bfloat16" and row["rows"]]
    text = f"the paper: {100 * PAPER['recall']:.1f} % with bfloat16 scores ({PAPER['source']})"  # type: ignore[operator]
    if not means:
        return text
    return f"bfloat16 here: {min(means):.2f} … {max(means):.2f} % (mean of a cell)\n{text}"
