"""The command line of ``dsv4-plugin doctor``."""

from __future__ import annotations

import argparse

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin doctor``."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--engines", nargs="*", metavar="RELEASE",
        help="the seams in releases that pip downloads: vllm==0.33.0, sglang (the newest), "
        "tokenspeed@FOLDER; none: the newest of each engine",
    )  # fmt: skip
    parser.add_argument(
        "--folder",
        type=outputs.folder,
        help="with --engines: keep there what was downloaded (default: nowhere)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin doctor``; returns the exit code.

    Raises:
        UsageError: an option has no meaning here.
    """
    from dsv4_plugin.cli.doctor import report

    if arguments.engines is not None:
        if arguments.folder is not None:
            outputs.make_folder("--folder", arguments.folder)
        return report.run_engines(arguments.engines, arguments.json, arguments.folder)
    if arguments.folder is not None:
        raise UsageError("--folder is for --engines")
    return report.run(as_json=arguments.json)
