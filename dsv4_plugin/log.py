"""Logging: one logger, lines that say ``dsv4``, and a way to say a thing once.

Engines set up logging when they like, before plugins are loaded or after it. So nothing here is
settled beforehand: at every line the logger is made ready again, and it is asked who else listens.
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
    """Writes to stderr what no handler of the engine gets.

    Engines configure their own loggers and not always the root logger: without this an INFO line
    of the plugin would be dropped, and an A/B could not tell that the plugin engaged.
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
        """Write to what is stderr now; it may have been replaced."""
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written: it must not end a server."""


_stderr = _Stderr()
_stderr.setFormatter(logging.Formatter(_LINE, _TIME))


def configure(level: str) -> None:
    """Set the level. At DEBUG a line has its process: every process of a server says as much."""
    logger.setLevel(level.upper())
    line = _LINE_OF_A_PROCESS if tells_everything() else _LINE
    _stderr.setFormatter(logging.Formatter(line, _TIME))


def _on(level: int) -> bool:
    logger.disabled = False  # logging.config switches off the loggers that it does not name
    logger.addHandler(_stderr)  # and takes away the handlers of those that it does
    return logger.isEnabledFor(level)


def tells_everything() -> bool:
    """Whether ``DSV4_LOG=debug`` is in force; ask before a message is put together at length."""
    return _on(logging.DEBUG)


def say(level: int, message: str, exc_info: bool = False) -> None:
    """Log ``message``, with ``exc_info`` and the traceback of the exception that is handled."""
    if _on(level):
        logger.log(level, "%s", message, exc_info=exc_info)


def exception(message: str) -> None:
    """Log ``message`` at ERROR with the traceback of the exception that is handled."""
    say(logging.ERROR, message, exc_info=True)


def once(level: int, message: str) -> None:
    """Log ``message`` the first time it comes in this process and the level lets it through."""
    if (level, message) not in _said and _on(level):
        _said.add((level, message))
        say(level, message)


def debug(message: str) -> None:
    """Log ``message`` at DEBUG the first time it comes; not for a path that runs at every call."""
    once(logging.DEBUG, message)
