"""Run a command of a checkout, ``python -m benchmarks.…``: parse, check, run, exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError, ended, need_torch

__all__ = ["MINUTES", "device_of", "tool"]

MINUTES = numbers.real(most=1e6)  # two years


def tool(
    parser: Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parse ``argv`` (default: this process's) and run the command; returns the exit code.

    ``run`` gets the arguments, with all words of the command line as ``argv``.
    """
    given = list(sys.argv[1:] if argv is None else argv)

    def body() -> int:
        arguments = parser.parse_args(given)
        outputs.apart(arguments)
        arguments.argv = given
        return run(arguments)

    return ended(parser.prog, body, given)


def device_of(asked: str | None) -> str:
    """Return ``cuda`` or ``cpu``: what was asked for, or ``cuda`` where there is one.

    Raises:
        UsageError: torch cannot be imported, or there is no CUDA device.
    """
    need_torch()
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UsageError("there is no CUDA device here; nothing was tried")
    return asked or ("cuda" if there else "cpu")
