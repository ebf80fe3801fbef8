"""The command line of ``python -m benchmarks.soak``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.tool import MINUTES, device_of, tool
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, examples, interruptible
from dsv4_plugin.cli.shared.screen import clock

if TYPE_CHECKING:
    from benchmarks.soak.load import Result

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Replay until the time is up; returns the exit code."""
    return tool(parser(), _run, argv)


def parser() -> Parser:
    """Return the parser of this command."""
    p = Parser(
        prog="python -m benchmarks.soak",
        description="Graphs of 43 layers of calls, replayed under load (on a CPU: 3 layers).",
    )
    examples(p, "--minutes 10", "--minutes 60 --seed 7 --json soak.json")
    add = p.add_argument
    add("--minutes", type=MINUTES, default=1.0, help="how long (1)")
    add("--seed", type=numbers.SEED, default=0, help="other scores, lengths and pages (0)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--json", type=outputs.file, metavar="FILE", help="write the results there")
    return p


def _run(arguments: argparse.Namespace) -> int:
    """Replay, with a line of progress at each look.

    Returns:
        0 if everything was right, 1 if not.

    Raises:
        UsageError: there is no such device, or nothing was replayed.
    """
    device = device_of(arguments.device)
    from benchmarks.soak.load import Result, shape_on, soak
    from dsv4_plugin.cli.checks.timing import machine

    result = Result(device, shape_on(device))
    document: dict[str, Any] = {
        "machine": machine(), "what": "soak", "complete": False, **asdict(result)
    }  # fmt: skip
    with Results(document, arguments.json) as file:

        def progress(result: Result) -> None:
            left = f" [{clock(arguments.minutes * 60 - result.seconds)} left]"
            print(f"{_line(result)}{left}", flush=True)
            document.update(asdict(result))
            file.save()

        with interruptible() as work:
            soak(
                device=device, seconds=arguments.minutes * 60, seed=arguments.seed,
                progress=progress, result=result,
            )  # fmt: skip
        document.update(asdict(result), complete=work.whole and result.replays > 0)
        file.save(now=True)
        if not work.whole:
            print(_line(result))
        for fault in result.faults:
            print(f"FAULT: {fault}", flush=True)
    work.end(file.said())
    if result.faults:
        return 1
    work.must(result.replays, "nothing was replayed: --minutes is too short")
    return 0


def _line(result: Result) -> str:
    memory = f", {result.used[-1] >> 20} MiB used" if result.used else ""
    return (
        f"{result.replays:,} replays of {result.shape.layers} layers, "
        f"{result.allocations:,} allocations{memory}, {len(result.faults)} faults"
    )
