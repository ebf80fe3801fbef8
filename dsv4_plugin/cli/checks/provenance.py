"""Where a results file was made, found without importing torch or an engine."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit", "gpus", "output"]


def output(*command: str) -> str:
    """Return the output of a command, or ``unknown`` if it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def commit() -> str:
    """Return the commit of a checkout, else that from which the installed version was built."""
    found = output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    if found == "unknown":
        try:
            from dsv4_plugin import _version

            found = getattr(_version, "__commit_id__", None) or found
        except ImportError:
            pass
    return found


def gpus() -> list[dict[str, str]]:
    """Return name, driver and memory of every NVIDIA GPU of the machine, by the driver."""
    fields = ("index", "name", "driver_version", "memory.total")
    said = output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in said.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
