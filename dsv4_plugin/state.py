"""What the plugin did in this process: which seams engaged, and how often each one ran.

A *seam* is a place in an engine that the plugin can replace. The counters count *Python calls*.
Under full CUDA graphs an engine runs Python while it captures a graph and not while it replays it.
There a counter above zero says that the plugin's kernel is in the graph, and it does not grow while
the server decodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv4_plugin import log, processes, status_file

__all__ = ["Seam", "State", "state", "status"]


@dataclass
class Seam:
    """One place where an engine can be changed.

    ``where`` names what was patched (``None``: not found). ``why`` says why it is not engaged.
    """

    name: str
    where: str | None = None
    why: str | None = None

    @property
    def engaged(self) -> bool:
        """Whether the patch is in place and no reason speaks against using it."""
        return self.where is not None and self.why is None


@dataclass
class State:
    """The state of one process; an engine runs one process a worker."""

    engine: str | None = None
    seams: dict[str, Seam] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, float] = field(default_factory=dict)
    reports: dict[str, Callable[[], Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # part -> why it was switched off
    _lock: Any = field(default_factory=processes.lock, repr=False)

    def found(self, seam: Seam) -> None:
        """Record the result of looking for a seam."""
        self.seams[seam.name] = seam
        said = f"missing: {seam.why}" if seam.where is None else f"found: {seam.where}"
        log.debug(f"{self.engine}: seam {seam.name} {said}")

    def count(self, name: str, rows: int = 1) -> None:
        """Add one to a counter (``topk.decode``, ``topk.decode.upstream`` …).

        A call without rows is not counted, because it serves nothing.
        """
        if rows == 0:
            return
        with self._lock:
            self.counters[name] += 1
            number = self.counters[name]
        if number == 1:
            log.debug(f"{self.engine}: first call of {name}")
        # 1, 2, 4, 8 …: the file shows at least half of the true number
        if number & (number - 1) == 0:
            status_file.publish(self.report)

    def fail(self, part: str, why: str) -> None:
        """Record that a part failed at a call and is switched off."""
        with self._lock:
            self.failures[part] = why
        status_file.publish(self.report)

    def report(self) -> dict[str, Any]:
        """Return what the file of ``DSV4_STATUS_DIR`` says about this process."""
        return {**status(), "failures": dict(self.failures)}

    def peak(self, name: str, value: float) -> bool:
        """Keep the largest value of a name (``logits.saved_mib``); True if this is the largest."""
        with self._lock:
            largest = value > self.peaks.get(name, 0.0)
            if largest:
                self.peaks[name] = value
        return largest

    def begin(self) -> None:
        """Count from zero: a forked child has its parent's patches but has made no call."""
        self.counters.clear()
        self.peaks.clear()

    def reset(self) -> None:
        """Forget everything (``unregister()``, tests)."""
        with self._lock:
            self.engine = None
            self.seams.clear()
            self.begin()
            self.reports.clear()
            self.failures.clear()


state = State()
processes.in_child(state.begin)


def status() -> dict[str, Any]:
    """Return what the plugin did in this process, as plain data.

    ``engine`` is the engine that loaded the plugin. ``seams`` maps each place that the plugin can
    change to where it is, whether it is engaged, and if not, why. ``counters`` says how often each
    ran (Python calls: under full CUDA graphs these happen at capture, not at replay). Two entries
    are optional. ``peaks`` has the largest value of each name (``logits.saved_mib``: by how much
    the logits of one call were smaller than in float32). ``shadow`` says how the selections agreed
    at each seam.
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
