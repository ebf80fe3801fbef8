"""Options, the run of one engine, what it prints and the results file."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.choices import KS
from dsv4_plugin.cli.shared.run import Parser, UsageError, interruptible, need_torch
from dsv4_plugin.cli.shared.tool import tool

if TYPE_CHECKING:
    from benchmarks.engines.forward.parts import Part, Row

__all__ = ["main"]

SIDES = {
    "sglang": "benchmarks.engines.forward.sglang_side",
    "tokenspeed": "benchmarks.engines.forward.tokenspeed_side",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the engine's parts one after the other; returns the exit code."""
    return tool(_parser(), _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    """Run an engine; a part that fails is told and passed over."""
    sys.path[:0] = [str(path.resolve()) for path in arguments.site]
    sys.path += [str(path.resolve()) for path in arguments.more]
    need_torch()
    import torch

    from dsv4_plugin.cli.checks.timing import machine

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here; nothing was run")
    document: dict[str, Any] = {
        "machine": machine(),
        "what": "hosts_gpu",
        "engine": arguments.engine,
        "complete": False,
        "failed": [],
        "not_run": [],
        "bars": [],
        "results": [],
    }
    results = document["results"]
    begin = time.monotonic()
    with Results(document, arguments.json) as file:
        with interruptible() as work:
            run = _attempt("start", lambda: _side(arguments), document)
            if run is not None:
                document["start_s"] = round(time.monotonic() - begin, 1)
                _parts(run, arguments, document, file, begin)
        document["seconds"] = round(time.monotonic() - begin, 1)
        document["complete"] = bool(work.whole and results and not document["not_run"])
        file.save(now=True)
        wrong = [row for row in results if row.get("right") is False]
        print(
            f"{arguments.engine}: {len(results)} results, {len(wrong)} wrong, "
            f"{len(document['failed'])} parts failed, {document['seconds']} s",
            flush=True,
        )
    if work.whole and (wrong or document["failed"]):
        return 1
    work.must(results, "nothing was run: no part is left", file.said())
    work.end(file.said())
    return 0


def _side(arguments: argparse.Namespace) -> Any:
    return importlib.import_module(SIDES[arguments.engine]).Side(arguments)


def _attempt(name: str, do: Callable[[], Any], document: dict[str, Any]) -> Any:
    """Return what a part gives, or None where it fails, which is told."""
    try:
        return do()
    except BrokenPipeError:  # of this command's own output
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}"
        where = "".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip()
        print(f"FAILED {name}: {said[:400]}\n{where}", flush=True)
        document["failed"].append({"part": name, "traceback": traceback.format_exc()})
        return None


def _parts(
    run: Any, arguments: argparse.Namespace, document: dict[str, Any], file: Results, begin: float
) -> None:
    """Run the parts of an engine, and keep the document up to date."""
    document |= run.about()
    print(f"{document['version']} on {document['machine'].get('gpu', 'no GPU')}, started in "
          f"{document['start_s']} s; stood in for: "
          f"{', '.join(document['stands_in'])}", flush=True)  # fmt: skip
    parts: list[Part] = list(run.parts())
    document["not_run"] = [str(part) for part in parts]
    file.save(now=True)
    for part in parts:
        if arguments.budget is not None and time.monotonic() - begin > arguments.budget:
            print(f"--budget {arguments.budget:g} s is spent: {len(document['not_run'])} parts "
                  "are not run", flush=True)  # fmt: skip
            break
        rows: list[Row] = _attempt(str(part), part.run, document) or []
        document["not_run"].remove(str(part))
        document["results"] += rows
        for row in rows:
            print(_line(row), flush=True)
        file.save(now=True)
        if document["failed"] and _is_dead():
            print("the GPU takes no more work of this process: the rest is not run", flush=True)
            break
    document["seams"] = run.seams()


def _is_dead() -> bool:
    """Whether an error of before stays with the process (an illegal address, say)."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.engines.forward", description=__doc__)
    add = parser.add_argument
    add("--engine", choices=tuple(SIDES), required=True)
    add("--site", type=Path, nargs="+", default=[], help="folders to put first on sys.path")
    add("--more", type=Path, nargs="+", default=[], help="folders to put last on sys.path")
    add("--json", type=outputs.file, metavar="FILE")
    add("--shapes", nargs="+", type=_shape, metavar="ROWSxCOLUMNS", help="shapes of decode")
    add("--prefill", nargs="+", type=_shape, metavar="QUERIESxKEYS", help="of prefill")
    add("--k", type=numbers.whole(1, max(KS)), nargs="+", default=[512])
    add("--launches", type=numbers.COUNT, default=20)
    add("--replays", type=numbers.COUNT, default=7)
    add("--budget", type=numbers.SECONDS, metavar="SECONDS", help="begin no part after this time")
    add(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a dry run, torch in place of the kernels; its times mean nothing",
    )  # fmt: skip
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return numbers.COUNT(rows), numbers.COUNT(columns)


def _line(row: Row) -> str:
    words = [f"{row['part']:24s} {row['variant']:10s}"]
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
