"""The status of each process as a file, for readers outside the process: ``DSV4_STATUS_DIR``.

An engine's workers are separate processes, and ``dsv4_plugin.status()`` is per process. If the
setting names a directory, a process writes ``<host>-<pid>.json`` there when a counter reaches 1, 2,
4, 8 … and when a part is switched off. A reader never sees half a file. Without the setting the
plugin writes no file. A counter in the file is at least half of the true one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_plugin import envs, log, metrics, processes
from dsv4_plugin.version import __version__

__all__ = ["publish"]

_lock = processes.lock()


def publish(report: Callable[[], dict[str, Any]]) -> None:
    """Write ``report()`` for this process if the setting asks for it; never raises.

    It runs during a served call, also while a CUDA graph is captured, so it touches no device.
    """
    try:
        folder = envs.value("status_dir")
        if not folder:
            return
        with _lock:
            metrics.publish(_write(Path(folder), report()))
    except Exception as error:  # a full disk must not end a server
        log.once(logging.WARNING, f"DSV4_STATUS_DIR: no status is written ({error})")


def _write(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    pid = os.getpid()
    who = {"pid": pid, "node": processes.NODE, "started": processes.started(pid)}
    report = {**who, "plugin": __version__, **report}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{processes.NODE}-{pid}.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, file)
    return report
