"""What the plugin must know about processes: they fork, and process ids are used again."""

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
    """Return a lock that is free in a forked child, with the data that it guards in a whole state.

    A fork waits for the lock. If another thread of the parent held it during the fork, the child
    would wait for ever.
    """
    made = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=made.acquire, after_in_parent=made.release, after_in_child=made.release
        )
    return made


def in_child(begin: Callable[[], None]) -> None:
    """Call ``begin`` in every child that is forked from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=begin)


def started(pid: Any) -> int | None:
    """Return when a process began, in clock ticks since boot; None if that is not known here."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        # after the name, which may hold any character
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def alive(report: dict[str, Any]) -> bool:
    """Whether the process of a status file still runs, as far as this machine can tell.

    A process of another node counts as running. A process id may be used again by another process;
    the field ``started`` tells the two apart.
    """
    if report.get("node") != NODE:
        return True
    pid, began = report.get("pid"), report.get("started")
    return Path(f"/proc/{pid}").is_dir() and began in (None, started(pid))


def reports(folder: Path) -> list[dict[str, Any]]:
    """Return the status files of a folder whose processes run; other files are left out."""
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
        except (OSError, ValueError, RecursionError):  # another kind of file, or deleted meanwhile
            continue
    return found
