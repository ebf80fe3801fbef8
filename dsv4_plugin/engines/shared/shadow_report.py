"""The counts of the shadow: as data, as a line in the log, and the thread that logs.

Reading needs no CUDA call. The thread and ``dsv4_plugin.status()`` read the pinned mirror of the
counters, which each call updates in the order of its stream. A thread that copied from the device
itself could end a capture in progress: under ``cudaStreamCaptureModeGlobal``, torch's default, no
thread may make calls like ``cudaMalloc`` or ``cudaEventQuery``.
"""

from __future__ import annotations

import atexit
import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_plugin import log

__all__ = [
    "EVERY_S", "MILLION", "SUMS", "Field", "Kept", "begin_in_child", "kept", "line",
    "log_what_changed", "report", "said", "start",
]  # fmt: skip

EVERY_S = 60.0  # seconds between two lines in the log


class Field(enum.IntEnum):
    """The counters of a seam, int64 each; rows in which neither side chose a position do not count.

    An entry is a chosen position; a row has as many entries as the longer of the two sets.
    ``AGREE`` counts those in both. If the caller passes the scores, the score of the engine's
    position classifies the others: as large as the plugin's last (``TIED``: both answers are
    right), smaller (``LOWER``: the engine's answer is not exact) or larger (``HIGHER``: the
    plugin's answer is not exact). The rest are positions that the engine wrote twice or not at all.
    """

    ROWS = 0
    EQUAL = 1  # rows whose sets are the same
    ENTRIES = 2
    AGREE = 3
    TIED = 4
    LOWER = 5
    HIGHER = 6
    WORST = 7  # the largest share of a row's entries that does not agree, in millionths, rounded up


SUMS = int(Field.WORST)
MILLION = 1_000_000


@dataclass
class Kept:
    """The counters of one seam on one device. ``mirror``: pinned host memory, or the counters.

    ``seal`` is :data:`_SEAL` plus the sum of the counters. If it is not, the counters are invalid.
    """

    counters: torch.Tensor
    mirror: torch.Tensor
    seal: torch.Tensor

    def check(self) -> None:
        """Set the counters to zero if they are invalid; no host sync."""
        self.counters.mul_(self.counters.sum() + _SEAL == self.seal)

    def close(self) -> None:
        """Write the seal of the new counts, and update the mirror."""
        torch.add(self.counters.sum(), _SEAL, out=self.seal)
        if self.mirror is not self.counters:
            self.mirror.copy_(self.counters, non_blocking=True)


_SEAL = 0xD54D54D54


kept: dict[tuple[str, torch.device], Kept] = {}
said: dict[str, list[int]] = {}  # what the log last reported about each seam
_thread: threading.Thread | None = None
_failed: Callable[[Exception], None] = logging.exception


def _read(one: Kept) -> list[int]:
    """Read the mirror until two looks agree: the device may be writing it."""
    values = one.mirror.tolist()
    for _ in range(8):
        again = one.mirror.tolist()
        if again == values:
            break
        values = again
    return values


def _totals() -> dict[str, list[int]]:
    totals: dict[str, list[int]] = {}
    for (seam, _), one in list(kept.items()):
        values = _read(one)
        before = totals.get(seam, [0] * len(Field))
        sums = [a + b for a, b in zip(before[:SUMS], values[:SUMS], strict=True)]
        totals[seam] = [*sums, max(before[SUMS], values[SUMS])]
    return totals


def report() -> dict[str, dict[str, float]]:
    """Return the counters of every seam as plain data; ``worst`` is the worst row's overlap."""
    found: dict[str, dict[str, float]] = {}
    for seam, values in _totals().items():
        found[seam] = {f.name.lower(): values[f] for f in Field if f is not Field.WORST}
        found[seam]["worst"] = 1 - values[Field.WORST] / MILLION
    return found


def line(seam: str, values: dict[str, float]) -> str:
    """Return one seam's counters as a line of the log."""
    entries = max(values["entries"], 1)
    shares = {name: 100 * values[name] / entries for name in ("agree", "tied", "lower", "higher")}
    text = (
        f"dsv4 shadow: {seam} {shares['agree']:.2f} % of entries agree over {values['rows']:.0f} "
        f"rows (worst row {100 * values['worst']:.2f} %, {values['equal']:.0f} rows equal)"
    )
    why = {
        "tied": "tie with the plugin's last score",
        "lower": "have a lower score",
        "higher": "have a HIGHER score, so the plugin's is not exact",
    }
    parts = [
        f"{shares[n]:.2f} % of the engine's {reason}" for n, reason in why.items() if values[n]
    ]
    return "; ".join([text, *parts])


def log_what_changed() -> None:
    """Log the seams whose counters have changed since the last line."""
    for seam, values in report().items():
        now = [int(values[f.name.lower()]) for f in Field if f is not Field.WORST]
        if values["rows"] and said.get(seam) != now:
            said[seam] = now
            level = logging.WARNING if values["higher"] else logging.INFO
            log.say(level, line(seam, values))


def _loop(every_s: float) -> None:
    while True:
        time.sleep(every_s)
        try:
            log_what_changed()
        except Exception as error:
            _failed(error)
            return


def begin_in_child() -> None:
    """Drop the parent's state in a forked child: the thread and its last reports."""
    global _thread
    said.clear()
    _thread = None


def start(failed: Callable[[Exception], None]) -> None:
    """Start the thread that logs, once a process; ``failed`` gets an error of the thread."""
    global _thread, _failed
    _failed = failed
    if _thread is not None and _thread.is_alive():
        return
    _thread = threading.Thread(target=_loop, args=(EVERY_S,), name="dsv4-shadow", daemon=True)
    _thread.start()
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    log.once(
        logging.INFO,
        "dsv4 shadow: the engine's selection runs beside the plugin's, whose answer is served; "
        f"agreement is logged every {EVERY_S:.0f} s",
    )


def _at_exit() -> None:
    try:
        log_what_changed()
    except Exception as error:
        _failed(error)
