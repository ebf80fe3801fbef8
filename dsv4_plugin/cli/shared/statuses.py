"""What a server's processes report: status files, or the engine's ``/metrics``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsv4_plugin.processes import reports

__all__ = ["ENGINES", "at_work", "failures", "of_folder", "of_metrics", "served"]

ASIDE = ".aside"  # how the counters of calls end that the plugin left to the engine on purpose
ENGINES = (".upstream", ASIDE)  # and of all calls that the engine served

_SAMPLE = re.compile(r"(dsv4_[a-z_]+)\{([^}]*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def of_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the status of each running process with a file in a ``DSV4_STATUS_DIR``.

    A file that cannot be read, or is no status, is left out.
    """
    return [_sound(data) for data in reports(folder) if isinstance(data.get("counters"), dict)]


def of_metrics(text: str) -> list[dict[str, Any]]:
    """Return the same from an engine's ``/metrics``, in the text format of Prometheus."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, labels, value in _SAMPLE.findall(text):
        of = dict(_LABEL.findall(labels))
        key = of.get("node", ""), of.get("pid", "")
        status = found.setdefault(key, {"counters": {}, "failures": {}, "seams": {}})
        status |= {"node": key[0], "pid": key[1]}
        if name == "dsv4_calls":
            status["counters"][of.get("name", "")] = int(float(value))
        elif name == "dsv4_seam_engaged":
            status["seams"][of.get("seam", "")] = {"engaged": float(value) > 0}
        elif name == "dsv4_switched_off" and float(value) > 0 and of.get("part") != "any":
            status["failures"][of.get("part", "")] = "was switched off"
        elif name == "dsv4_info":
            status["plugin"] = of.get("version", "")
    return list(found.values())


def served(status: dict[str, Any]) -> dict[str, int]:
    """Return the counters of calls that the plugin served."""
    counters = status.get("counters", {})
    return {n: c for n, c in counters.items() if c > 0 and not n.endswith(ENGINES)}


def at_work(status: dict[str, Any]) -> bool:
    """Whether the plugin served a call, or left one to the engine because that is faster."""
    counters = status.get("counters", {})
    return bool(served(status)) or any(c > 0 and n.endswith(ASIDE) for n, c in counters.items())


def failures(statuses: list[dict[str, Any]]) -> list[str]:
    """Return what was switched off after an error, and in which process."""
    return [
        f"process {status.get('pid')}: {part} {why}"
        for status in statuses
        for part, why in status.get("failures", {}).items()
    ]


def _sound(data: dict[str, Any]) -> dict[str, Any]:
    """Return a status with counters that are numbers and failures that have names."""
    failed = data.get("failures") or {}
    return {
        **data,
        "counters": {
            str(name): n for name, n in data["counters"].items()
            if isinstance(n, int) and not isinstance(n, bool)
        },
        "failures": failed if isinstance(failed, dict) else {"a part": str(failed)},
    }  # fmt: skip
