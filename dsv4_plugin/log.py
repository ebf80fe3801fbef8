"""Logging: one logger, lines that say ``dsv4``, and a way to log a line once.

Engines configure logging at different times, before or after they load plugins. So nothing is fixed
at import: for every line this module prepares the logger again and looks for other handlers.
"""

from __future__ import annotations

import logging
import sys

__all__ = ["configure", "debug", "exception", "logger", "once", "say", "tells_everything"]

logger = logging.getLogger("dsv4_plugin")
_said: set[tuple[int, str]] = set()
_TIME = "%m-%d %H:%M:%S"
_LINE = "%(levelname)s %(asctime)s [dsv4] %(message)s"
_LINE_OF_A_PROCESS = "%(levelname)s %(asctime)s [dsv4 pid %(process)d] %(message)s"


class _Stderr(logging.StreamHandler):
    """Writes a line to stderr if no handler of the engine gets it.

    Engines configure their own loggers, and not always the root logger. Without this handler an
    INFO line of the plugin would be lost, and an A/B could not tell that the plugin engaged.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is for this handler."""
        at: logging.Logger | None = logger
        while at is not None:
            if any(h is not self and not isinstance(h, logging.NullHandler) for h in at.handlers):
                return False
            at = at.parent if at.propagate else None
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Write to the current stderr, which may have been replaced."""
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written: a failed write must not end a server."""


_stderr = _Stderr()
_stderr.setFormatter(logging.Formatter(_LINE, _TIME))


def configure(level: str) -> None:
    """Set the level. At DEBUG each line names its process, because all processes log the same."""
    logger.setLevel(level.upper())
    line = _LINE_OF_A_PROCESS if tells_everything() else _LINE
    _stderr.setFormatter(logging.Formatter(line, _TIME))


def _on(level: int) -> bool:
    logger.disabled = False  # logging.config disables the loggers that it does not name
    logger.addHandler(_stderr)  # and it removes the handlers of those that it names
    return logger.isEnabledFor(level)


def tells_everything() -> bool:
    """Whether ``DSV4_LOG=debug`` is in force; ask before a message that is costly to build."""
    return _on(logging.DEBUG)


def say(level: int, message: str, exc_info: bool = False) -> None:
    """Log ``message``; with ``exc_info`` also the traceback of the exception being handled."""
    if _on(level):
        logger.log(level, "%s", message, exc_info=exc_info)


def exception(message: str) -> None:
    """Log ``message`` at ERROR with the traceback of the exception being handled."""
    say(logging.ERROR, message, exc_info=True)


def once(level: int, message: str) -> None:
    """Log ``message`` once in this process; a line that the level suppresses does not count."""
    if (level, message) not in _said and _on(level):
        _said.add((level, message))
        say(level, message)


def debug(message: str) -> None:
    """Log ``message`` once at DEBUG; not for code that runs at every call."""
    once(logging.DEBUG, message)
