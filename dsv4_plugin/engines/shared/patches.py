"""Replace an attribute, remember the original, and restore it.

The plugin recognises its replacement by identity. If the attribute holds another object when the
plugin restores or uses it, other code has patched it later. The plugin leaves it and reports it.
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
        """Whether the owner still holds the replacement."""
        return vars(self.owner).get(self.name) is self.replacement


class Ledger:
    """The patches of one adapter, in the order in which they were made."""

    def __init__(self) -> None:
        self.patches: list[Patch] = []

    def replace(self, owner: Any, name: str, replacement: Any, where: str) -> Patch:
        """Set ``owner.name``; refuse a second patch of the plugin on the same attribute."""
        if any(p.owner is owner and p.name == name for p in self.patches):
            log.debug(f"patch {where}: already there")
            raise RuntimeError(f"{where} is patched already")
        patch = Patch(owner, name, vars(owner).get(name, _ABSENT), replacement, where)
        setattr(owner, name, replacement)
        self.patches.append(patch)
        log.say(logging.DEBUG, f"patch {where}: applied, in place of {called(patch.original)}")
        return patch

    def restore(self, resolve: Callable[[Patch], Any] | None = None) -> None:
        """Restore all originals, last first; ``resolve`` may name one where none was stored."""
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
    """Return a name of an attribute's value."""
    if value is _ABSENT:
        return "what the owner looks up itself"
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    names = (getattr(function, n, getattr(type(value), n)) for n in ("__module__", "__qualname__"))
    return ".".join(map(str, names))
