"""Replace an attribute, remember what was there, and put it back.

A replacement is known by identity. Where, at the time of restoring or of use, the attribute holds
something else, other code patched it later: it is left alone and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv4_plugin import log

__all__ = ["Ledger", "Patch", "called"]

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """One replaced attribute. ``original`` is the raw entry of the owner's ``__dict__``."""

    owner: Any
    name: str
    original: Any
    replacement: Any
    where: str

    @property
    def in_place(self) -> bool:
        """Whether the replacement is what the owner holds now."""
        return vars(self.owner).get(self.name) is self.replacement


class Ledger:
    """The patches of one adapter, in the order in which they were made."""

    def __init__(self) -> None:
        self.patches: list[Patch] = []

    def replace(self, owner: Any, name: str, replacement: Any, where: str) -> Patch:
        """Set ``owner.name``; a second patch of the plugin on one attribute is refused."""
        if any(p.owner is owner and p.name == name for p in self.patches):
            log.debug(f"patch {where}: already there")
            raise RuntimeError(f"{where} is patched already")
        patch = Patch(owner, name, vars(owner).get(name, _ABSENT), replacement, where)
        setattr(owner, name, replacement)
        self.patches.append(patch)
        log.say(logging.DEBUG, f"patch {where}: applied, in place of {called(patch.original)}")
        return patch

    def restore(self, resolve: Callable[[Patch], Any] | None = None) -> None:
        """Put everything back, last first; ``resolve`` may name what belongs where nothing was."""
        while self.patches:
            patch = self.patches.pop()
            if not patch.in_place:
                current = called(vars(patch.owner).get(patch.name))
                log.say(
                    logging.WARNING,
                    f"{patch.where} was patched by other code since ({current}); it is left as it "
                    "is",
                )
                continue
            original = patch.original
            if original is _ABSENT:
                found = resolve(patch) if resolve is not None else None
                original = _ABSENT if found is None else found
            if original is _ABSENT:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, original)
            log.say(logging.DEBUG, f"patch {patch.where}: reverted to {called(original)}")


def called(value: Any) -> str:
    """Name what an attribute holds."""
    if value is _ABSENT:
        return "what the owner looks up itself"
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    names = (getattr(function, n, getattr(type(value), n)) for n in ("__module__", "__qualname__"))
    return ".".join(map(str, names))
