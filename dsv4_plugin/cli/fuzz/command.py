"""The command line of ``dsv4-plugin fuzz``: progress, the report, one case again."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.fuzz.case import CaseError, describe, parse
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.choices import FUZZED
from dsv4_plugin.cli.shared.run import UsageError, device_of, interruptible
from dsv4_plugin.cli.shared.screen import clock
from dsv4_plugin.errors import UnmetError

if TYPE_CHECKING:
    from dsv4_plugin.cli.fuzz.engine import Failure, Report

__all__ = ["add_arguments", "run"]

EVERY = 5.0  # seconds from line to line of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin fuzz``."""
    parser.add_argument("--minutes", type=numbers.MINUTES, default=1.0, help="how long (1)")
    parser.add_argument("--cases", type=numbers.COUNT, help="at most so many cases")
    parser.add_argument(
        "--seed", type=numbers.SEED, default=0, help="another seed, other cases (0)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    parser.add_argument("--op", action="append", choices=FUZZED, help="only these ops")
    parser.add_argument(
        "--backend", action="append", choices=("cuda", "triton", "torch"),
        help="only these implementations; default: all that run on the device",
    )  # fmt: skip
    parser.add_argument("--json", type=outputs.file, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--case", metavar="CASE", help="one case again, as a failure shows it: op:field=value,..."
    )
    parser.add_argument(
        "--trace", type=outputs.file, metavar="FILE",
        help="write every case there before it runs: the last line is what hung or killed the GPU",
    )  # fmt: skip
    parser.add_argument("--fields", action="store_true", help="show the fields of the cases")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin fuzz``.

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
    from dsv4_plugin.cli.fuzz import engine

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
    from dsv4_plugin.cli.fuzz.engine import OPS

    lines = ["A case is op:field=value,... with the fields that are not at their default."]
    for name, kind in OPS.items():
        lines += ["", f"{name}:"]
        lines += [f"  {left:18s} {right}" for left, right in describe(kind)]
    return "\n".join(lines)


def _one(text: str, device: str) -> int:
    from dsv4_plugin.cli.fuzz.engine import OPS, run_case

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
    return f"dsv4-plugin fuzz --device {device} --case {case}"


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
