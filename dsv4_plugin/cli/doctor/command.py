"""The command line of ``dsv4-plugin doctor``."""

from __future__ import annotations

import argparse

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError, examples

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin doctor``."""
    parser.description = (
        "Show what is installed, what engages, why not. The last two lines are the verdict and "
        "what to do next. Exit code 0: the compiled kernels can serve here. 1: they cannot. 2: a "
        "setting has a value that it cannot have."
    )
    examples(parser, "--all", "--engines vllm==0.33.0 sglang")
    parser.add_argument(
        "--all", action="store_true", help="show every setting, op, entry point and seam"
    )
    parser.add_argument("--json", action="store_true", help="show everything as JSON")
    parser.add_argument(
        "--engines", nargs="*", metavar="RELEASE",
        help="check the seams in releases that pip downloads: vllm==0.33.0, sglang (the newest), "
        "tokenspeed@FOLDER; without a value: the newest of each engine",
    )  # fmt: skip
    parser.add_argument(
        "--folder",
        type=outputs.folder,
        help="with --engines: keep the downloads in this folder (default: nowhere)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin doctor``; returns the exit code.

    Raises:
        UsageError: an option has no meaning with the others.
    """
    from dsv4_plugin.cli.doctor import report

    if arguments.engines is not None:
        if arguments.all:
            raise UsageError("--all is for what is installed here, not for --engines")
        if arguments.folder is not None:
            outputs.make_folder("--folder", arguments.folder)
        return report.run_engines(arguments.engines, arguments.json, arguments.folder)
    if arguments.folder is not None:
        raise UsageError("--folder is for --engines")
    return report.run(arguments.json, arguments.all)
