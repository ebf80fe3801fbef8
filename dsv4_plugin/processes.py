"""What the plugin has to know of processes: that they fork, and that an id is used again."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["NODE", "alive", "in_child", "lock", "reports", "started"]

NODE = platform.node() or "unknown"


def lock() -> Any:
    """Return a lock that a forked child finds free, and what it guards whole.

    A fork waits for it. Were it inherited as another thread of the parent holds it, the child would
    wait for ever.
    """
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=made.acquire, after_in_parent=made.release, after_in_child=made.release
        )
    return made


def in_child(begin: Callable[[], None]) -> None:
    """Have ``begin`` called in every child that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=begin)


def started(pid: Any) -> int | None:
    """Return when a process began, in ticks since this machine did; None: it is not known here."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(stat.rpartition(")")[2].split()[19])  # behind the name, which may hold anything
    except (OSError, ValueError, IndexError):
        return None


def alive(report: dict[str, Any]) -> bool:
    """Whether the process of a status file runs, as far as this machine can tell.

    One of another node is believed. An id that is used again is another process: ``started`` says
    so.
    """
    if report.get("node") != NODE:
        return True
    pid, began = report.get("pid"), report.get("started")
    return Path(f"/proc/{pid}").is_dir() and began in (None, started(pid))


def reports(folder: Path) -> list[dict[str, Any]]:
    """Return the status files of a folder, of processes that run; what is none is left out."""
    found = []
    try:
        files = sorted(file for file in folder.glob("*.json") if file.is_file())
    except (OSError, ValueError):
        return []
    for file in files:
        try:
            report = json.loads(file.read_text())
            if isinstance(report, dict) and alive(report):
                found.append(report)
        except (OSError, ValueError, RecursionError):  # something else, or gone meanwhile
            continue
    return found
