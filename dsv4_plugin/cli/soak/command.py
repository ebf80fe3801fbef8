"""The command line of ``dsv4-plugin soak``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import device_of, examples, interruptible
from dsv4_plugin.cli.shared.screen import clock

if TYPE_CHECKING:
    from dsv4_plugin.cli.soak.load import Result

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin soak``."""
    examples(parser, "soak --minutes 10", "soak --minutes 60 --seed 7 --json soak.json")
    add = parser.add_argument
    add("--minutes", type=numbers.MINUTES, default=1.0, help="how long (1)")
    add("--seed", type=numbers.SEED, default=0, help="other scores, lengths and pages (0)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    add("--json", type=outputs.file, metavar="FILE", help="write the results there")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin soak``.

    Returns:
        0 if all was as it should be, 1 if not.

    Raises:
        UsageError: there is no such device, or nothing was replayed.
    """
    device = device_of(arguments.device)
    from dsv4_plugin.cli.checks.timing import machine
    from dsv4_plugin.cli.soak.load import Result, shape_on, soak

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
