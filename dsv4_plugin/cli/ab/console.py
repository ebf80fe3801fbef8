"""Progress lines, and an end on request: signals are noted and raised at a safe place."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from dsv4_plugin.cli.ab import Interrupted
from dsv4_plugin.cli.shared.secrets import Secrets

__all__ = ["Console"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Console:
    """Prints what happens, with the time since the start; in ``with``, signals end the run.

    A signal sets a mark. :meth:`pause`, which does every wait of a run, raises
    :class:`Interrupted`. So every started process is remembered, and a stop is not interrupted
    itself. A second signal makes :attr:`urgent` true, and the run waits no longer. If the reader of
    the lines has gone (``| head``), the run ends as by a signal.
    """

    def __init__(self, secrets: Secrets | None = None) -> None:
        self.secrets = secrets or Secrets()
        self.signals: list[int] = []
        self._began = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Console:
        if threading.current_thread() is threading.main_thread():
            # Set a handler even if the shell ignores SIGINT for a background job. A started process
            # would inherit the ignoring, but it does not inherit a handler.
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    @property
    def urgent(self) -> bool:
        """Whether a second signal asked for the end."""
        return len([number for number in self.signals if number != signal.SIGPIPE]) > 1

    def say(self, text: str) -> None:
        """Print a line."""
        line = f"[{time.monotonic() - self._began:7.1f} s] {self.secrets.text(text)}"
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.signals.append(signal.SIGPIPE)

    def pause(self, seconds: float = 0.0) -> None:
        """Wait.

        Raises:
            Interrupted: a signal came.
        """
        end = time.monotonic() + seconds
        while not self.signals and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        if self.signals:
            raise Interrupted(self.signals[0])
