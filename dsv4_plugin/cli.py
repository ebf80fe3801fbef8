"""The command ``dsv4-plugin``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dsv4-plugin", description="The sparse-attention indexer of DeepSeek-V4 and V3.2."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what is here, what engages, and why not")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    bench = commands.add_parser("bench", help="time the ops against the peers that are installed")
    try:
        from dsv4_plugin.testing import bench as bench_module
    except ImportError as error:  # no torch: doctor must work all the same
        bench_module, why = None, error
    else:
        bench_module.add_arguments(bench)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (arguments.command == "bench" and bench_module is None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "bench":
        if bench_module is None:
            parser.error(f"bench cannot be loaded ({why})")
        return bench_module.run(arguments)
    from dsv4_plugin.doctor import run

    return run(as_json=arguments.json)
