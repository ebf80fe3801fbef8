"""The command ``dsv4-plugin``."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4_plugin import __version__
from dsv4_plugin.cli.ab import command as ab
from dsv4_plugin.errors import SettingError, UnmetError

__all__ = ["main"]

# Commands that need torch: name -> (module with add_arguments() and run(), what it does).
COMMANDS = {
    "bench": ("dsv4_plugin.cli.bench.command", "time the ops against the peers that can be loaded"),
    "fuzz": ("dsv4_plugin.cli.fuzz.command", "random calls of the ops, checked and shrunk"),
    "recall": (
        "dsv4_plugin.cli.recall.command",
        "what narrower scores keep of the exact selection",
    ),
    "soak": ("dsv4_plugin.cli.soak", "graphs of 43 layers of calls, replayed under load"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dsv4-plugin", description="The sparse-attention indexer of DeepSeek-V4 and V3.2."
    )
    parser.add_argument("--version", action="version", version=f"dsv4-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what is here, what engages, and why not")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.add_argument(
        "--hosts", nargs="*", metavar="RELEASE",
        help="the seams in releases that pip downloads: vllm==0.33.0, sglang (the newest), "
        "tokenspeed@FOLDER; none: the newest of each engine",
    )  # fmt: skip
    doctor.add_argument(
        "--folder",
        type=Path,
        help="with --hosts: keep there what was downloaded (default: nowhere)",
    )
    ab.add_arguments(
        commands.add_parser("ab", help="a server without the plugin against one with it")
    )
    loaded = {}
    for name, (_, about) in COMMANDS.items():
        loaded[name] = module, _ = _load(name)
        command = commands.add_parser(name, help=about)
        if module is not None:
            module.add_arguments(command)
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    given, after = given[:at], given[at + 1 :]  # what stands after -- is not ours to parse
    arguments, rest = parser.parse_known_args(given)
    module, why = loaded.get(arguments.command, (None, ""))
    if why:
        parser.error(f"{arguments.command} cannot be loaded ({why})")
    if rest or (after and arguments.command != "ab"):
        parser.error(f"unrecognized arguments: {' '.join(rest + after)}")
    if arguments.command == "ab":
        return ab.run(arguments, after)
    if module is not None:
        return _run(module, arguments)
    from dsv4_plugin.cli.doctor import run, run_hosts

    if arguments.hosts is not None:
        return run_hosts(arguments.hosts, arguments.json, arguments.folder)
    return run(as_json=arguments.json)


def _run(module: Any, arguments: argparse.Namespace) -> int:
    """Run a command; what its user can repair is a line and exit code 2, not a traceback."""
    error: object
    file = arguments.json
    if file is not None and not file.parent.is_dir():  # now, not when all is done
        error = f"--json cannot be written: there is no folder {file.parent}"
    else:
        try:
            return module.run(arguments)
        except (SettingError, UnmetError) as refused:
            error = refused
    print(f"dsv4-plugin {arguments.command}: {error}", file=sys.stderr)
    return 2


def _load(name: str) -> tuple[Any, str]:
    """Return the module of a command, or why there is none: doctor must work without torch."""
    # torch's own warning where there is no NumPy; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        return importlib.import_module(COMMANDS[name][0]), ""
    except ImportError as error:
        return None, str(error)
