"""Progress lines, and an end on request: signals are noted here and raised at a safe place."""

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
    """Says what happens, with the time since the start; ``with`` it, signals end the run.

    A signal sets a mark, and :meth:`pause`, where every wait of a run is spent, raises
    :class:`Interrupted`. So no process is ever started without being remembered, and stopping is
    not itself interrupted; a second signal makes :attr:`urgent` true: no more patience. Where the
    reader of the lines has gone (``| head``), the run ends as by a signal.
    """

    def __init__(self, secrets: Secrets | None = None) -> None:
        self.secrets = secrets or Secrets()
        self.signals: list[int] = []
        self._began = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Console:
        if threading.current_thread() is threading.main_thread():
            # A handler, also where the shell ignores SIGINT for a job in the background: what is
            # started would inherit the ignoring, but not a handler.
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
        """Whether the wish to end came twice."""
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
