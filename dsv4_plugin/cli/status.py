"""The command line of ``dsv4-plugin status``: is the plugin at work in a running server?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared import numbers, outputs, requests, statuses
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["add_arguments", "run"]

METRICS = "/metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin status``."""
    parser.description = (
        "Say in which processes of a running server the plugin serves. The server needs "
        "DSV4_STATUS_DIR in its environment. Exit code 0: the plugin serves in all of them (or in "
        "--workers), and no part of it failed. Calls that `auto` leaves to a faster kernel of the "
        "engine count as served. 1: it does not. 2: the server cannot be asked."
    )
    parser.add_argument(
        "where", metavar="DIR|URL",
        help="the server's DSV4_STATUS_DIR, or its address (http://HOST:PORT) for its /metrics",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=numbers.COUNT, metavar="N",
        help="processes in which the plugin must serve (default: all that are found)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin status``; returns the exit code.

    Raises:
        UsageError: there is no such folder, or no such server.
    """
    found = _asked(arguments.where)
    engaged = [status for status in found if statuses.at_work(status)]
    wanted = arguments.workers or len(found)
    failed = statuses.failures(found)
    good = bool(engaged) and len(engaged) >= wanted and not failed
    verdict = f"engaged in {len(engaged)} of {max(wanted, len(found))} processes"
    if not found:
        verdict = (
            "no process has a status: the plugin has not served a call, is not switched on, or "
            "the server has no DSV4_STATUS_DIR"
        )
    if failed:
        verdict += "; switched off: " + "; ".join(failed)
    if arguments.json:
        about = {"engaged": good, "verdict": verdict, "processes": found}
        print(outputs.text_of(about), end="")
    else:
        for status in found:
            print(_line(status))
        print(f"dsv4-plugin: {verdict}")
    return 0 if good else 1


def _asked(where: str) -> list[dict[str, Any]]:
    """Return the status of every process of a server."""
    if where.startswith(("http://", "https://")):
        path = "" if where.rstrip("/").endswith(METRICS) else METRICS
        reply = requests.ask(where, path)
        if reply.status != 200:
            raise UsageError(f"{where}{path}: {reply.said}")
        return statuses.of_metrics(reply.body.decode(errors="replace"))
    folder = Path(where)
    if not folder.is_dir():
        raise UsageError(f"{where} is neither a folder nor an address that begins with http://")
    return statuses.of_folder(folder)


def _line(status: dict[str, Any]) -> str:
    """Return the status of one process as a line."""
    who = f"{status.get('node', '?')} process {status.get('pid', '?')}"
    about = [str(status[key]) for key in ("engine", "plugin") if status.get(key)]
    plugin = statuses.served(status)
    engine = {n: c for n, c in status["counters"].items() if n.endswith(statuses.ENGINES) and c}
    parts = [
        f"{name} {', '.join(f'{n} {c}' for n, c in sorted(some.items())) or 'no call'}"
        for name, some in (("plugin:", plugin), ("engine:", engine))
        if some or name == "plugin:"
    ]
    return f"{' '.join([who, *about])}: {'; '.join(parts)}"
