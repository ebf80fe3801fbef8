"""The one reader of numbers on every command line: types for argparse, each with its bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["BUDGET", "COUNT", "LENGTH", "PORT", "SECONDS", "SEED", "real", "whole"]

UNITS = {"k": 1024, "m": 1024 * 1024}


def whole(least: int, most: int, *, units: bool = False) -> Callable[[str], int]:
    """Return a reader of whole numbers from ``least`` to ``most``; with ``units`` also ``64K``.

    The reader raises :class:`UsageError`, which says what is allowed and what came.
    """

    def read(text: str) -> int:
        digits = text.strip()
        factor = UNITS.get(digits[-1:].lower(), 1) if units else 1
        digits = digits[:-1] if factor > 1 else digits
        # Python refuses to convert very long numbers; they are out of bounds in any case.
        if re.fullmatch(r"[+-]?[0-9]{1,30}", digits):
            value = int(digits) * factor
            if least <= value <= most:
                return value
        form = ", such as 4096 or 64K," if units else ""
        raise UsageError(f"must be a whole number{form} from {least} to {most}, got {text!r}")

    return read


def real(*, most: float, least: float | None = None) -> Callable[[str], float]:
    """Return a reader of finite numbers up to ``most``, from ``least`` or above zero.

    The reader raises :class:`UsageError`, which says what is allowed and what came.
    """
    bounds = (
        f"above 0 and at most {most:.15g}" if least is None else f"from {least:.15g} to {most:.15g}"
    )

    def read(text: str) -> float:
        try:
            value = float(text) if text.isascii() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if (
            math.isfinite(value)
            and value <= most
            and (value > 0 if least is None else value >= least)
        ):
            return value
        raise UsageError(f"must be a number {bounds}, got {text!r}")

    return read


COUNT = whole(1, 2**31 - 1)  # of cases, rows, columns, replays …
LENGTH = whole(1, 2**31 - 1, units=True)  # in tokens
SEED = whole(0, 2**31 - 1)
PORT = whole(1, 65_535)
SECONDS = real(most=6e7)
BUDGET = real(least=0, most=6e7)  # in seconds; with 0 the command measures nothing and says so
