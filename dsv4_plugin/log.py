"""Logging: one logger, lines that say ``dsv4``, and a way to say a thing once."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure", "logger", "once"]

logger = logging.getLogger("dsv4_plugin")
_said: set[tuple[int, str]] = set()


def configure(level: str) -> None:
    """Set the level; give the logger a handler of its own only where nobody else listens.

    Engines configure their own loggers, not the root logger: without a handler here an INFO
    line of ours would be dropped, and an A/B could not tell that the plugin engaged.
    """
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        line = "%(levelname)s %(asctime)s [dsv4] %(message)s"
        handler.setFormatter(logging.Formatter(line, "%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def once(level: int, message: str) -> None:
    """Log ``message`` the first time it comes in this process."""
    if (level, message) not in _said:
        _said.add((level, message))
        logger.log(level, message)
