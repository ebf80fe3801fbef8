"""What the plugin did in this process: the seams that engaged, and how often each one ran.

The counters count *Python calls*. Under full CUDA graphs an engine runs Python while it captures
and never while it replays, so there a counter that is above zero says that the plugin's kernel is
in the graph, and it stays where it is while the server decodes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv4_plugin import log, status_file

__all__ = ["Seam", "State", "state", "status"]


@dataclass
class Seam:
    """One place where an engine can be changed.

    ``where`` names what was patched (``None``: not found), ``why`` says why it is not engaged.
    """

    name: str
    where: str | None = None
    why: str | None = None

    @property
    def engaged(self) -> bool:
        """Whether the patch is in place and nothing speaks against using it."""
        return self.where is not None and self.why is None


@dataclass
class State:
    """Per process; engines run one process a worker."""

    engine: str | None = None
    seams: dict[str, Seam] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, float] = field(default_factory=dict)
    reports: dict[str, Callable[[], Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # part -> why it was switched off
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def found(self, seam: Seam) -> None:
        """Note what looking for a seam found."""
        self.seams[seam.name] = seam
        said = f"missing: {seam.why}" if seam.where is None else f"found: {seam.where}"
        log.debug(f"{self.engine}: seam {seam.name} {said}")

    def count(self, name: str) -> None:
        """Add one to a counter (``topk.decode``, ``topk.decode.upstream`` …)."""
        with self._lock:
            self.counters[name] += 1
            number = self.counters[name]
        if number == 1:
            log.debug(f"{self.engine}: first call of {name}")
        if number & (number - 1) == 0:  # 1, 2, 4, 8 …: a file that is at most half behind
            status_file.publish(self.report)

    def fail(self, part: str, why: str) -> None:
        """Note that a part failed at a call and serves no more."""
        with self._lock:
            self.failures[part] = why
        status_file.publish(self.report)

    def report(self) -> dict[str, Any]:
        """Return what the file of ``DSV4_STATUS_DIR`` says of this process."""
        return {**status(), "failures": dict(self.failures)}

    def peak(self, name: str, value: float) -> bool:
        """Keep the largest value of a name (``logits.saved_mib``); True where this one is it."""
        with self._lock:
            largest = value > self.peaks.get(name, 0.0)
            if largest:
                self.peaks[name] = value
        return largest

    def reset(self) -> None:
        """Forget everything (``unregister()``, tests)."""
        with self._lock:
            self.engine = None
            self.seams.clear()
            self.counters.clear()
            self.peaks.clear()
            self.reports.clear()
            self.failures.clear()


state = State()


def status() -> dict[str, Any]:
    """Return what the plugin did in this process, as plain data.

    ``engine`` is the engine that loaded it, ``seams`` maps each place it can change to where that
    is, whether it is engaged and why not, ``counters`` says how often each ran (Python calls:
    under full CUDA graphs these happen at capture, not at replay). Where there is something to say,
    ``peaks`` has the largest value of each name (``logits.saved_mib``: by how much the logits of
    one call were smaller than in float32), and ``shadow`` how the selections agreed at each seam.
    """
    return {
        "engine": state.engine,
        "seams": {
            name: {"where": seam.where, "engaged": seam.engaged, "why": seam.why}
            for name, seam in state.seams.items()
        },
        "counters": dict(state.counters),
        **({"peaks": dict(state.peaks)} if state.peaks else {}),
        **{name: report() for name, report in state.reports.items()},
    }
