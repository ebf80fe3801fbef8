"""The command ``dsv4-plugin``. It imports what a command needs only when that command runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from dsv4_plugin import __version__
from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import Parser, ended, examples

__all__ = ["main"]

# name -> (module with add_arguments() and run(), which import torch only after the options are
# read; what the command does)
COMMANDS = {
    "doctor": (
        "dsv4_plugin.cli.doctor.command",
        "show what is installed, what engages and why not",
    ),
    "status": (
        "dsv4_plugin.cli.status",
        "show in which processes of a server the plugin serves",
    ),
    "ab": (
        "dsv4_plugin.cli.ab.command",
        "compare a server without the plugin with one that has it",
    ),
    "bench": (
        "dsv4_plugin.cli.bench.command",
        "time the ops beside the other kernels that can be loaded",
    ),
    "recall": (
        "dsv4_plugin.cli.recall.command",
        "measure how much of the exact selection narrower scores keep",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in given if not word.startswith("-")), "")
    prog = f"dsv4-plugin {name}" if name in COMMANDS else "dsv4-plugin"
    return ended(prog, lambda: _run(name, given), given)


def _run(name: str, given: list[str]) -> int:
    parser = Parser(
        prog="dsv4-plugin",
        description="The sparse-attention indexer of DeepSeek-V4.1, V4 and V3.2.",
    )
    examples(parser, "doctor", "status http://127.0.0.1:8000", "ab --model MODEL --out ab")
    parser.add_argument("--version", action="version", version=f"dsv4-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module: Any = None
    for each, (where, about) in COMMANDS.items():
        command = commands.add_parser(each, help=about)
        if each == name:
            module = importlib.import_module(where)
            module.add_arguments(command)
            parser_of = command
    if not given:
        parser.print_help()
        return 2
    at = given.index("--") if "--" in given else len(given)
    before, after = given[:at], given[at + 1 :]  # the arguments after -- are for the servers of ab
    arguments, rest = parser.parse_known_args(before)
    if rest or (after and name != "ab"):
        parser_of.error(f"unrecognized arguments: {' '.join(rest + after)}")
    outputs.apart(arguments)
    arguments.argv, arguments.after = given, after
    return module.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
