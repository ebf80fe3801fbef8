"""``python -m benchmarks.engines``: run parts of SGLang and TokenSpeed on a GPU.

``--part kernels`` runs the functions that the adapters install, beside the engine's own kernels for
the same calls, on tensors as the engine makes them. The engine need not be installed. ``--part
forward`` runs the engine's own Python code around the same calls, without the plugin and with it,
from folders with the engine's packages. The driver replaces the model, the scheduler and missing
packages; the results name the replacements.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines.choices import ADAPTERS
from benchmarks.tool import tool
from dsv4_plugin.cli.bench.command import grid, timing
from dsv4_plugin.cli.checks import compare
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import choices, numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError, interruptible, need_torch

if TYPE_CHECKING:
    from benchmarks.engines.part import Part, Row

__all__ = ["main", "parser"]

MODELS = ("v4", "v41")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts one after the other; returns the exit code."""
    return tool(parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    """Run the parts of one or both engines; report a part that fails and go on."""
    sys.path[:0] = [str(path.resolve()) for path in arguments.site]
    sys.path += [str(path.resolve()) for path in arguments.more]
    engines = tuple(dict.fromkeys(arguments.engine or ADAPTERS))
    if arguments.part == "forward" and len(engines) > 1:
        raise UsageError("--part forward is of one --engine, got " + ", ".join(engines))
    need_torch()
    import torch

    from dsv4_plugin.cli.checks.timing import machine

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; nothing was run")
    document: dict[str, Any] = {
        "machine": machine(),
        "what": f"engines {arguments.part}",
        "engine": ", ".join(engines),
        "launches": arguments.launches,
        "replays": arguments.replays,
        "complete": False,
        "failed": [],
        "not_run": [],
        "results": [],
    }
    results = document["results"]
    begin = time.monotonic()
    with Results(document, arguments.json) as file:
        out_of_time = False
        side = None
        with interruptible() as work:
            side = _attempt("start", lambda: _side(arguments, engines), document)
            if side is not None:
                document["start_s"] = round(time.monotonic() - begin, 1)
                out_of_time = _parts(side, arguments, document, file, begin)
        document["seconds"] = round(time.monotonic() - begin, 1)
        document["complete"] = bool(work.whole and results and not document["not_run"])
        file.save(now=True)
        wrong = [row for row in results if _wrong(row)]
        for line in side.tables(results) if side is not None else ():
            print(line, flush=True)
        print(
            f"{document['engine']}: {len(results)} results, {len(wrong)} wrong, "
            f"{len(document['failed'])} parts failed, {document['seconds']} s",
            flush=True,
        )
    if work.whole and (wrong or document["failed"]):
        return 1
    work.must(results or out_of_time, "nothing was run: no part is left", file.said())
    work.end(file.said())
    return 0


def _side(arguments: argparse.Namespace, engines: tuple[str, ...]) -> Any:
    if arguments.part == "kernels":
        return importlib.import_module("benchmarks.engines.kernels.side").Side(arguments, engines)
    name = "_v41" if engines[0] == "sglang" and list(arguments.model) == ["v41"] else ""
    side = importlib.import_module(f"benchmarks.engines.forward.{engines[0]}{name}_side")
    return side.Side(arguments)


def _wrong(row: Row) -> bool:
    """Whether a result is a wrong answer of the plugin, or a part that is not as required."""
    if "right" in row:
        return row["right"] is False
    return str(row["implementation"]).startswith(compare.PLUGIN) and not compare.right(row)


def _attempt(name: str, do: Callable[[], Any], document: dict[str, Any]) -> Any:
    """Return the results of a part, or None if it fails, which is reported."""
    try:
        return do()
    except (BrokenPipeError, UsageError):  # of this command's own output, or options
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        where = "".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip()
        print(f"FAILED {name}: {said[:400]}\n{where}", flush=True)
        document["failed"].append({"part": name, "traceback": traceback.format_exc()})
        return None


def _parts(
    side: Any, arguments: argparse.Namespace, document: dict[str, Any], file: Results, begin: float
) -> bool:
    """Run the parts and keep the document up to date; return whether the budget was spent."""
    document |= side.about()
    for line in side.head(document):
        print(line, flush=True)
    parts: list[Part] = list(side.parts())
    document["not_run"] = [str(part) for part in parts]
    file.save(now=True)
    spent = False
    with side.engaged():
        for at, part in enumerate(parts, 1):
            spent = arguments.budget is not None and time.monotonic() - begin > arguments.budget
            if spent:
                print(f"--budget {arguments.budget:g} s is spent: {len(document['not_run'])} parts "
                      "are not run", flush=True)  # fmt: skip
                break
            rows: list[Row] = _attempt(str(part), part.run, document) or []
            document["not_run"].remove(str(part))
            document["results"] += rows
            for row in rows:
                print(f"[{at:3d}/{len(parts)}] {_line(part, row)}", flush=True)
            file.save(now=True)  # the next part may compile for minutes
            if document["failed"] and _is_dead():
                print("the GPU takes no more work of this process: the rest is not run", flush=True)
                break
    document["seams"] = side.seams()
    return spent


def _is_dead() -> bool:
    """Whether an earlier error stays with the process (an illegal address, for example)."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def parser() -> Parser:
    """Return the parser of the driver."""
    parser = Parser(prog="python -m benchmarks.engines", description=__doc__)
    add = parser.add_argument
    add("--part", choices=("kernels", "forward"), required=True)
    add("--engine", nargs="+", choices=ADAPTERS, help="kernels: default both")
    add("--json", type=outputs.file, metavar="FILE")
    add("--k", type=numbers.whole(1, max(choices.KS)), nargs="+", default=[512])
    timing(parser)
    kernels = parser.add_argument_group("--part kernels")
    grid(kernels)
    kernels.add_argument("--peers", type=Path, metavar="FILE.py", help="the engines' kernels, by "
                         "available_sglang_…() and available_tokenspeed_…(), in place of those of "
                         "the engines installed here")  # fmt: skip
    add = parser.add_argument_group("--part forward").add_argument
    add("--site", type=Path, nargs="+", default=[], help="folders to put first on sys.path")
    add("--more", type=Path, nargs="+", default=[], help="folders to put last on sys.path")
    add("--shapes", nargs="+", type=_shape, metavar="ROWSxCOLUMNS", help="shapes of decode")
    add("--prefill", nargs="+", type=_shape, metavar="QUERIESxKEYS", help="shapes of prefill")
    add("--model", nargs="+", choices=MODELS, default=MODELS, help="models whose calls run; "
        "SGLang runs those of V4, or with v41 alone those of V4.1")  # fmt: skip
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return numbers.COUNT(rows), numbers.COUNT(columns)


def _line(part: Part, row: Row) -> str:
    words = [f"{part!s:32s} {row.get('variant') or row['implementation']:20s}"]
    words.append("   -      " if row.get("us") is None else f"{row['us']:10.2f} us")
    words.append("graph" if row.get("graph") else "eager")
    words += [
        f"{name} {row[name]}"
        for name in ("right", "exact", "lowest_index", "same_in_graph", "recall", "agreement",
                     "kernel", "why", "error")
        if row.get(name) is not None
    ]  # fmt: skip
    if row.get("counters"):
        words.append(" ".join(f"{name}={n}" for name, n in sorted(row["counters"].items())))
    return "  ".join(words)
