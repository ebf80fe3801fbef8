"""The command line of ``dsv4-plugin fuzz``: progress, the report, one case again."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin.cli.checks.timing import machine
from dsv4_plugin.cli.fuzz.case import CaseError, describe, parse
from dsv4_plugin.cli.fuzz.engine import OPS, Failure, Report, backends_here, fuzz, run_case
from dsv4_plugin.errors import UnmetError

__all__ = ["add_arguments", "run"]

EVERY = 5.0  # seconds from line to line of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin fuzz``."""
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--cases", type=int, help="at most so many cases")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases (0)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    parser.add_argument("--op", action="append", choices=tuple(OPS), help="only these ops")
    parser.add_argument(
        "--backend", action="append", choices=("cuda", "triton", "torch"),
        help="only these implementations; default: all that run on the device",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--case", metavar="CASE", help="one case again, as a failure shows it: op:field=value,..."
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="write every case there before it runs: the last line is what hung or killed the GPU",
    )  # fmt: skip
    parser.add_argument("--fields", action="store_true", help="show the fields of the cases")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin fuzz``.

    Returns:
        0 if nothing failed, 1 if something did, 2 if it cannot be run like this.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return _usage("there is no CUDA device here; nothing was tried")
    if device == "cpu":  # Triton's kernels run on a CPU through its interpreter only
        os.environ.setdefault("TRITON_INTERPRET", "1")
        torch.set_num_threads(1)  # the tensors are small
    if arguments.fields:
        print(fields_text())
        return 0
    if arguments.case is not None:
        return _one(arguments.case, device)
    wanted = set(arguments.backend or ("cuda", "triton", "torch"))
    ops = [name for name in arguments.op or OPS if wanted & set(backends_here(name, device))]
    if not ops or (arguments.op and ops != arguments.op):
        lacking = [name for name in arguments.op or OPS if name not in ops]
        return _usage(f"no {' or '.join(sorted(wanted))} form on {device}: {', '.join(lacking)}")
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(arguments.trace.open("w")) if arguments.trace else None
        report = fuzz(
            seed=arguments.seed, device=device, ops=ops,
            seconds=arguments.minutes * 60, cases=arguments.cases,
            backends=tuple(arguments.backend) if arguments.backend else None,
            progress=_progress(),
            before=lambda case: print(case, file=trace, flush=True) if trace else None,
        )  # fmt: skip
    print(_summary(report))
    for failure in report.failures:
        print(_shown(failure, device))
    if arguments.json:
        arguments.json.write_text(json.dumps(document(arguments.seed, device, report), indent=1))
        print(f"written to {arguments.json}")
    return 1 if report.failures else 0


def _usage(text: str) -> int:
    print(f"dsv4-plugin fuzz: {text}", file=sys.stderr)
    return 2


def fields_text() -> str:
    """Return what the fields of every op's cases mean."""
    lines = ["A case is op:field=value,... with the fields that are not at their default."]
    for name, op in OPS.items():
        lines += ["", f"{name}:"]
        lines += [f"  {left:18s} {right}" for left, right in describe(op.kind)]
    return "\n".join(lines)


def _one(text: str, device: str) -> int:
    try:
        case = parse(text, {name: op.kind for name, op in OPS.items()})
        failure = run_case(case, device)
    except (CaseError, UnmetError) as error:
        return _usage(str(error))
    if failure is None:
        print(f"passes on {device}: {case}")
        return 0
    print(f"FAILS on {device}: {case}\n  {failure.why}")
    return 1


def _progress() -> Callable[[Report], None]:
    last = time.monotonic()

    def show(report: Report) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(_summary(report), flush=True)

    return show


def _summary(report: Report) -> str:
    parts = [
        f"{name} {report.cases[name]:,} cases {report.rows[name]:,} rows"
        for name in OPS
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


def document(seed: int, device: str, report: Report) -> dict[str, Any]:
    """Return the results file."""
    return {
        "machine": machine(),
        "what": "fuzz",
        "seed": seed,
        "device": device,
        "seconds": round(report.seconds, 1),
        "ops": {
            name: {
                "cases": report.cases[name],
                "rows": report.rows[name],
                "refused": report.refused[name],
            }
            for name in OPS
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
