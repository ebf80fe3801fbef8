"""The command ``dsv4-plugin``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dsv4_plugin.testing.ab import command as ab

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dsv4-plugin", description="The sparse-attention indexer of DeepSeek-V4 and V3.2."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what is here, what engages, and why not")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    bench = commands.add_parser("bench", help="time the ops against the peers that can be loaded")
    module, why = _bench()
    if module is not None:
        module.add_arguments(bench)
    ab.add_arguments(
        commands.add_parser("ab", help="a server without the plugin against one with it")
    )
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    given, after = given[:at], given[at + 1 :]  # what stands after -- is not ours to parse
    arguments, rest = parser.parse_known_args(given)
    if arguments.command == "bench" and module is None:
        parser.error(f"bench cannot be loaded ({why})")
    if rest or (after and arguments.command != "ab"):
        parser.error(f"unrecognized arguments: {' '.join(rest + after)}")
    if arguments.command == "ab":
        return ab.run(arguments, after)
    if arguments.command == "bench":
        return module.run(arguments)
    from dsv4_plugin.doctor import run

    return run(as_json=arguments.json)


def _bench() -> tuple[Any, str]:
    """Return the module of the benchmark, or why there is none: doctor must work without torch."""
    try:
        from dsv4_plugin.testing import bench
    except ImportError as error:
        return None, str(error)
    return bench, ""


if __name__ == "__main__":
    sys.exit(main())
