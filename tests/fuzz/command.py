"""The command line of ``python -m tests.fuzz``: random cases with a report, or one case again."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.tool import MINUTES, device_of, tool
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError, interruptible
from dsv4_plugin.cli.shared.screen import clock
from dsv4_plugin.errors import UnmetError
from tests.fuzz.case import CaseError, describe, parse

if TYPE_CHECKING:
    from tests.fuzz.engine import Failure, Report

__all__ = ["FUZZED", "main", "parser"]

# The ops. They are listed here, so that a mistyped option is an error before torch is imported.
FUZZED = ("topk", "read", "read_mxfp4", "gather", "paged_logits", "ragged_logits", "select",
          "block_maxima", "select_blocks", "candidate_logits", "candidate_logits_ragged",
          "candidate_select", "select_candidates")  # fmt: skip

EVERY = 5.0  # seconds from line to line of progress


def main(argv: Sequence[str] | None = None) -> int:
    """Try random cases, or one case again; returns the exit code."""
    return tool(parser(), _run, argv)


def parser() -> Parser:
    """Return the parser of this command."""
    p = Parser(
        prog="python -m tests.fuzz", description="Random calls of the ops, checked and shrunk."
    )
    add = p.add_argument
    add("--minutes", type=MINUTES, default=1.0, help="how long (1)")
    add("--cases", type=numbers.COUNT, help="at most so many cases")
    add("--seed", type=numbers.SEED, default=0, help="another seed, other cases (0)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--op", action="append", choices=FUZZED, help="only these ops")
    add(
        "--backend", action="append", choices=("cuda", "triton", "torch"),
        help="only these implementations; default: all that run on the device",
    )  # fmt: skip
    add("--json", type=outputs.file, metavar="FILE", help="write the results there")
    add("--case", metavar="CASE", help="one case again, as a failure shows it: op:field=value,...")
    add(
        "--trace", type=outputs.file, metavar="FILE",
        help="write every case there before it runs: the last line is what hung or killed the GPU",
    )  # fmt: skip
    add("--fields", action="store_true", help="show the fields of the cases")
    return p


def _run(arguments: argparse.Namespace) -> int:
    """Draw cases until the time is up, with lines of progress; or run the one case that is given.

    Returns:
        0 if nothing failed, 1 if something did.

    Raises:
        UsageError: it cannot be run like this, or no case was tried.
    """
    device = device_of(arguments.device)
    import torch

    if device == "cpu":  # Triton's kernels run on a CPU through its interpreter only
        os.environ.setdefault("TRITON_INTERPRET", "1")
        torch.set_num_threads(1)  # the tensors are small
    if arguments.fields:
        print(fields_text())
        return 0
    if arguments.case is not None:
        return _one(arguments.case, device)
    from dsv4_plugin.cli.checks.timing import machine
    from tests.fuzz import engine

    wanted = set(arguments.backend or ("cuda", "triton", "torch"))
    asked = arguments.op or engine.OPS
    ops = [name for name in asked if wanted & set(engine.backends_here(name, device))]
    if not ops or (arguments.op and ops != arguments.op):
        lacking = ", ".join(name for name in asked if name not in ops)
        raise UsageError(f"no {' or '.join(sorted(wanted))} form on {device}: {lacking}")
    report = engine.Report()
    results: dict[str, Any] = {
        "machine": machine(), "what": "fuzz", "complete": False, "seed": arguments.seed,
        "device": device, **found(device, report),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Results(results, arguments.json))
        trace = arguments.trace and stack.enter_context(arguments.trace.open("w"))
        show = _progress(arguments.minutes * 60)

        def progress(report: Report) -> None:
            show(report)
            results.update(found(device, report))
            file.save()

        with interruptible() as work:
            engine.fuzz(
                seed=arguments.seed, device=device, ops=ops, seconds=arguments.minutes * 60,
                cases=arguments.cases, report=report, progress=progress,
                backends=tuple(arguments.backend) if arguments.backend else None,
                before=lambda case: print(case, file=trace, flush=True) if trace else None,
            )  # fmt: skip
        results.update(found(device, report), complete=work.whole and report.cases.total() > 0)
        file.save(now=True)
        print(_summary(report))
        for failure in report.failures:
            print(_shown(failure, device), flush=True)
    nothing = "nothing was tried: no case fits --minutes, --cases, --op and --backend"
    work.must(report.cases.total(), nothing, file.said())
    work.end(file.said())
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if report.failures else 0


def fields_text() -> str:
    """Return what the fields of every op's cases mean."""
    from tests.fuzz.engine import OPS

    lines = ["A case is op:field=value,... with the fields that are not at their default."]
    for name, kind in OPS.items():
        lines += ["", f"{name}:"]
        lines += [f"  {left:18s} {right}" for left, right in describe(kind)]
    return "\n".join(lines)


def _one(text: str, device: str) -> int:
    from tests.fuzz.engine import OPS, run_case

    try:
        case = parse(text, OPS)
        failure = run_case(case, device)
    except (CaseError, UnmetError) as error:
        raise UsageError(str(error)) from error
    if failure is None:
        print(f"passes on {device}: {case}")
        return 0
    print(f"FAILS on {device}: {case}\n  {failure.why}")
    return 1


def _progress(seconds: float) -> Callable[[Report], None]:
    last = time.monotonic()

    def show(report: Report) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(
                f"[{report.seconds:6.1f} s, {clock(seconds - report.seconds)} left] "
                f"{len(report.failures)} failures; {report.cases.total():,} cases "
                f"{report.rows.total():,} rows",
                flush=True,
            )

    return show


def _summary(report: Report) -> str:
    parts = [
        f"{name} {report.cases[name]:,} cases {report.rows[name]:,} rows"
        for name in FUZZED
        if report.cases[name]
    ]
    return f"[{report.seconds:6.1f} s] {len(report.failures)} failures; {'; '.join(parts)}"


def command_of(failure: Failure, device: str) -> str:
    """Return the command that repeats a failure."""
    case = shlex.quote(str(failure.shrunk or failure.original))
    return f"python -m tests.fuzz --device {device} --case {case}"


def _shown(failure: Failure, device: str) -> str:
    lines = [f"FAILED: {failure.why}", f"  drawn as  {failure.original}"]
    if failure.fatal:
        lines.append("  not shrunk: the CUDA context did not survive it")
    return "\n".join([*lines, f"  again     {command_of(failure, device)}"])


def found(device: str, report: Report) -> dict[str, Any]:
    """Return what the results file has of a report."""
    return {
        "seconds": round(report.seconds, 1),
        "ops": {
            name: {
                "cases": report.cases[name],
                "rows": report.rows[name],
                "refused": report.refused[name],
            }
            for name in FUZZED
        },
        "failures": [
            {
                "why": failure.why,
                "case": str(failure.shrunk or failure.original),
                "drawn": str(failure.original),
                "again": command_of(failure, device),
            }
            for failure in report.failures
        ],
        "tried": dict(sorted(report.tried.items())),
    }
