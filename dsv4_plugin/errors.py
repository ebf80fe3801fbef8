"""The exceptions this package raises, all under :class:`Dsv4Error`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Dsv4Error", "SettingError", "UnmetError"]


class Dsv4Error(Exception):
    """Base class of every exception that is this package's own."""


class SettingError(Dsv4Error, ValueError):
    """A ``DSV4_*`` variable, or its twin in ``additional_config``, has a value it cannot have."""


class UnmetError(Dsv4Error, RuntimeError):
    """Something asked for explicitly cannot be had here.

    ``wish`` is what was asked for, ``unmet`` every condition that stands in its way, so that
    one look at the message is enough.
    """

    def __init__(self, wish: str, unmet: Sequence[str]) -> None:
        self.wish = wish
        self.unmet = tuple(unmet)
        super().__init__(f"dsv4: {wish} cannot be met: " + "; ".join(self.unmet))
