"""A command of its own, ``python -m benchmarks.…``: parsed, checked and run to its end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import Parser, ended

__all__ = ["tool"]


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
