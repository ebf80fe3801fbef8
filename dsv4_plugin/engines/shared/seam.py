"""The record of a seam: a place in an engine that the plugin can change, and how to recognise it.

An adapter has one tuple of records. The probe (:func:`in_source`) looks for them in the engine's
source, for ``dsv4-plugin doctor``. The installer (:meth:`Place.in_process`) looks for them in the
modules that this process has imported. ``python -m dsv4_plugin.engines.shared.seam vllm`` prints
the list in ``docs/development/<engine>.md`` from them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.source import Missing, Site

__all__ = ["Found", "Place", "Seam", "in_source", "listing", "look"]


@dataclass(frozen=True)
class Found:
    """An attribute of an imported module: ``owner.name`` holds ``original``, as it is stored."""

    owner: Any
    name: str
    original: Any

    @property
    def function(self) -> Any:
        """The function itself, without a ``staticmethod`` around it."""
        return self.original.__func__ if isinstance(self.original, staticmethod) else self.original


@dataclass(frozen=True)
class Place:
    """One attribute of an engine, and the form by which the plugin recognises it.

    ``takes``: its first parameters from position ``skip`` on; with ``exactly`` it has no others.
    ``has``: parameters that it has at any position. ``source``: the module that defines it, if
    ``module`` only imports it, and ``defined`` its name there. ``used``: (module, function, text):
    the source of that function, or of the whole module for the function ``""``, contains the text.
    ``op``: it is an operator of torch, which has no source. ``optional``: the seam can exist
    without it. ``shown``: its name in the log and the doctor.
    """

    module: str
    attribute: str
    takes: tuple[str, ...] = ()
    exactly: bool = False
    skip: int = 0
    has: tuple[str, ...] = ()
    source: str = ""
    defined: str = ""
    used: tuple[str, str, str] | None = None
    op: bool = False
    optional: bool = False
    shown: str = ""

    def __str__(self) -> str:
        """Return the name that the log and the doctor show."""
        return self.shown or self.attribute

    def in_source(self) -> None:
        """Check the engine's source; imports nothing.

        Raises:
            Missing: the attribute is not there, or has another form.
        """
        if not self.op:
            module = source.find(self.module)
            name = self.attribute.partition(".")[0]
            if not module.binds(name):
                raise Missing(f"{self.module} has no {name}")
            if self.takes or self.has:
                defined = source.find(self.source) if self.source else module
                _check(defined.parameters(self.defined or self.attribute), self)
        if self.used is not None:
            _contains(source.find(self.used[0]).text_of(self.used[1]), self.used)

    def in_process(self, module: Any = None) -> Found:
        """Return the attribute of the imported module, or of the module given.

        Raises:
            Missing: the attribute is not there, or has another form.
        """
        if self.used is not None:
            _contains(_live_source(*self.used[:2]), self.used)
        if self.op:
            import torch

            owner: Any = getattr(torch.ops, self.module.rpartition(".")[2])
            return Found(owner, self.attribute, vars(owner).get(self.attribute))
        owner = _imported(self.module) if module is None else module
        *classes, name = self.attribute.split(".")
        for cls in classes:
            owner = vars(owner).get(cls)
            if owner is None:
                raise Missing(f"{cls} is gone")
        found = Found(owner, name, vars(owner).get(name))
        if found.original is None:
            raise Missing(f"{self} is gone")
        if self.takes or self.has:
            try:
                parameters = inspect.signature(found.function).parameters
            except (TypeError, ValueError) as error:
                raise Missing(f"{self} has no readable signature") from error
            _check(tuple(parameters), self)
        return found


def _contains(text: str, used: tuple[str, str, str]) -> None:
    module, function, wanted = used
    if wanted not in text:
        raise Missing(f"{function or module} does not contain {wanted}")


def _check(got: tuple[str, ...], place: Place) -> None:
    missing = [name for name in place.has if name not in got]
    if missing:
        raise Missing(f"{place} takes no {' and no '.join(missing)}")
    end = place.skip + len(place.takes)
    if got[place.skip : end] != place.takes or (place.exactly and len(got) != end):
        want = ", ".join((*["…"] * place.skip, *place.takes))
        raise Missing(f"{place} takes ({', '.join(got)}), not ({want})")


@dataclass(frozen=True)
class Seam:
    """One seam of an engine: where it is, what the plugin puts there, why, and until when.

    ``forms``: the forms that the seam has in the releases, newest first. A form is a group of
    places; the plugin takes the first complete form. ``puts``: what the plugin does
    there. ``until``: when the seam can go. ``upstream``: the engine's issue or pull request about
    it, empty if none is known. ``late``: its module is imported after the adapter is installed, so
    the installer looks at its source, and the plugin patches it when it is needed. ``optional``: a
    release may lack it, and the log does not mention that.
    """

    name: str
    forms: tuple[tuple[Place, ...], ...]
    puts: str
    why: str
    until: str
    upstream: str = ""
    late: bool = False
    optional: bool = False

    def first(self, there: Callable[[Place], Any]) -> list[tuple[Place, Any]]:
        """Return the places of the first complete form, each with what ``there`` returns for it.

        Raises:
            Missing: no form is complete; the reason is that of the newest form.
        """
        reasons: list[Missing] = []
        for form in self.forms:
            found = []
            try:
                for place in form:
                    try:
                        found.append((place, there(place)))
                    except Missing:
                        if not place.optional:
                            raise
                return found
            except Missing as error:
                reasons.append(error)
        if len(reasons) == 1:
            raise reasons[0]
        raise Missing("; ".join(dict.fromkeys(map(str, reasons))))


def shown(places: Iterable[Place]) -> str:
    """Return the names of places for the log and the doctor."""
    return "/".join(map(str, places))


def in_source(seam: Seam) -> Site:
    """Look for a seam in the engine's source; imports nothing."""
    try:
        places = [place for place, _ in seam.first(Place.in_source)]
    except Missing as error:
        return Site(None, str(error))
    return Site(shown(places), None, tuple(f"{p.module}.{p.attribute}" for p in places))


def look(seams: Iterable[Seam]) -> dict[str, Site]:
    """Look for every seam in the engine's source; imports nothing."""
    return {seam.name: in_source(seam) for seam in seams}


def _imported(name: str) -> Any:
    module = sys.modules.get(name)
    if module is None:
        raise Missing(f"{name} is not imported in this process")
    return module


def _live_source(module: str, function: str) -> str:
    found: Any = _imported(module)
    for name in filter(None, function.split(".")):
        found = getattr(found, name, None)
    try:
        return inspect.getsource(inspect.unwrap(found))
    except (OSError, TypeError) as error:
        raise Missing(f"{function} has no source to look into") from error


def listing(seams: Iterable[Seam]) -> str:
    """Return the records as the Markdown list of the adapter's page in ``docs/development``."""
    lines = []
    for seam in seams:
        forms = "; or ".join(" and ".join(map(_known_by, form)) for form in seam.forms)
        until = seam.until + (f" ({seam.upstream})" if seam.upstream else "")
        lines += [
            f"### {seam.name}",
            "",
            f"- **Recognised by**: {forms}.",
            f"- **In its place**: {seam.puts}.",
            f"- **Why**: {seam.why}.",
            f"- **It can go when**: {until}.",
            "",
        ]
    return "\n".join(lines).rstrip()


def _known_by(place: Place) -> str:
    names = [*["…"] * place.skip, *place.takes]
    if not place.exactly and (place.takes or place.has):
        names.append("…")
    said = f"`{place.module}.{place.attribute}" + (f"({', '.join(names)})`" if names else "`")
    if place.has:
        said += f" with {', '.join(f'`{name}`' for name in place.has)}"
    if place.used is not None:
        said += f", `{place.used[2]}` in `{place.used[1] or place.used[0]}`"
    return said + (" if it is there" if place.optional else "")


if __name__ == "__main__":
    import importlib

    print(listing(importlib.import_module(f"dsv4_plugin.engines.{sys.argv[1]}.probe").SEAMS))
