"""The exceptions this package raises, all under :class:`Dsv4Error`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Dsv4Error", "SettingError", "UnmetError"]


class Dsv4Error(Exception):
    """Base class of every exception that this package defines."""


class SettingError(Dsv4Error, ValueError):
    """A ``DSV4_*`` variable, or its twin in ``additional_config``, has a forbidden value."""


class UnmetError(Dsv4Error, RuntimeError):
    """An explicit request cannot be met here.

    ``wish`` is what was asked for. ``unmet`` has every condition that is not met, so that the
    message names all of them at once.
    """

    def __init__(self, wish: str, unmet: Sequence[str]) -> None:
        self.wish = wish
        self.unmet = tuple(unmet)
        super().__init__(f"dsv4: {wish} cannot be met: " + "; ".join(self.unmet))
