"""Logging: one logger, lines that say ``dsv4``, and a way to say a thing once."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure", "debug", "logger", "once", "tells_everything"]

logger = logging.getLogger("dsv4_plugin")
_said: set[tuple[int, str]] = set()
_own: logging.Handler | None = None
_TIME = "%m-%d %H:%M:%S"
_LINE = "%(levelname)s %(asctime)s [dsv4] %(message)s"
_LINE_OF_A_PROCESS = "%(levelname)s %(asctime)s [dsv4 pid %(process)d] %(message)s"


def configure(level: str) -> None:
    """Set the level; give the logger a handler of its own only where nobody else listens.

    Engines configure their own loggers, not the root logger: without a handler here an INFO
    line of ours would be dropped, and an A/B could not tell that the plugin engaged. At DEBUG
    our own lines have the process, because every process of a server says as much.
    """
    global _own
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        _own = logging.StreamHandler(sys.stderr)
        logger.addHandler(_own)
    if _own is not None:
        line = _LINE_OF_A_PROCESS if tells_everything() else _LINE
        _own.setFormatter(logging.Formatter(line, _TIME))


def tells_everything() -> bool:
    """Whether ``DSV4_LOG=debug`` is in force; ask before a message is put together at length."""
    return logger.isEnabledFor(logging.DEBUG)


def once(level: int, message: str) -> None:
    """Log ``message`` the first time it comes in this process and the level lets it through."""
    if (level, message) not in _said and logger.isEnabledFor(level):
        _said.add((level, message))
        logger.log(level, message)


def debug(message: str) -> None:
    """Log ``message`` at DEBUG the first time it comes; not for a path that runs at every call."""
    once(logging.DEBUG, message)
