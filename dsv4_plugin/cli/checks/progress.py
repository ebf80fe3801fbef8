"""The progress of a benchmark over its cells, and the time that it can take."""

from __future__ import annotations

import time
from collections.abc import Callable

from dsv4_plugin.cli.shared.screen import clock

__all__ = ["Progress"]


class Progress:
    """Prints how many cells are done and how long the rest will take."""

    def __init__(self, say: Callable[[str], None], budget_s: float | None = None) -> None:
        self._say, self._budget_s, self.out_of_time = say, budget_s, False
        self._begin = time.monotonic()
        self.start(0)

    def start(self, cells: int) -> None:
        """Begin a list of ``cells`` cells."""
        self._cells, self._done, self._since = cells, 0, time.monotonic()

    def spent(self) -> bool:
        """Whether the budget is spent, so that no further cell begins; prints that once."""
        if self.out_of_time or self._budget_s is None:
            return self.out_of_time
        if time.monotonic() - self._begin > self._budget_s:
            self.out_of_time = True
            self._say(f"--budget {self._budget_s:g} s is spent: {self._cells - self._done} cells "
                      "are not measured")  # fmt: skip
        return self.out_of_time

    def done(self, line: str) -> None:
        """Print that a cell is done."""
        self._done += 1
        took = time.monotonic() - self._since
        left = took / self._done * (self._cells - self._done)
        self._say(f"[{self._done:3d}/{self._cells} {clock(took)}, {clock(left)} left] {line}")
