"""Read an engine's source without importing it: its definitions and their parameters.

The import of an engine takes seconds and may use a GPU. ``dsv4-plugin doctor`` and the
``register()`` of an adapter need only know whether a seam is there.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Missing", "Module", "Site", "find", "packages_in", "shown"]

_FOLDER: ContextVar[Path | None] = ContextVar("dsv4_packages_in", default=None)


class Missing(Exception):
    """A module, name or parameter is not where the plugin looks for it."""


@dataclass(frozen=True)
class Site:
    """The place of a seam in the log; why it is missing; the attributes of which it consists."""

    where: str | None
    why: str | None = None
    targets: tuple[str, ...] = ()


def shown(sites: dict[str, Site]) -> dict[str, dict[str, str | None]]:
    """Return what ``dsv4-plugin doctor`` shows of the seams."""
    return {name: {"where": site.where, "why": site.why} for name, site in sites.items()}


@functools.lru_cache(maxsize=32)
def _parse(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8", errors="replace"))


def find(name: str) -> Module:
    """Return the source of a module, found beside its top-level package.

    Raises:
        Missing: the package is not installed, or has no such file.
    """
    package, *rest = name.split(".")
    for location in _locations(package):
        stem = Path(location, *rest)
        for path in (stem.with_suffix(".py") if rest else stem, stem / "__init__.py"):
            if path.is_file():
                return Module(name, path)
    raise Missing(f"{name} is gone")


@contextlib.contextmanager
def packages_in(folder: Path) -> Iterator[None]:
    """Look for packages in this folder, not among the installed ones."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def _locations(package: str) -> list[str]:
    """Return the folders of a top-level package, imported or not."""
    folder = _FOLDER.get()
    if folder is not None:
        if not (folder / package).is_dir():
            raise Missing(f"{package} is not there")
        return [str(folder / package)]
    path = getattr(sys.modules.get(package), "__path__", None)
    if path is not None:
        return list(path)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise Missing(f"{package} cannot be found ({error})") from error
    if spec is None:
        raise Missing(f"{package} is not installed")
    return list(spec.submodule_search_locations or ())


class Module:
    """The parsed source of one module."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        try:
            self._tree = _parse(path, path.stat().st_mtime_ns)
        except (OSError, SyntaxError, ValueError) as error:
            raise Missing(f"{name} cannot be read ({error})") from error

    def _top(self) -> Iterator[ast.stmt]:
        """Yield the statements of the module, those under ``if`` and ``try`` too."""
        stack = list(reversed(self._tree.body))
        while stack:
            node = stack.pop()
            yield node
            for block in ("body", "orelse", "finalbody"):
                if isinstance(node, (ast.If, ast.Try)):
                    stack.extend(reversed(getattr(node, block, [])))

    def binds(self, name: str) -> bool:
        """Whether the module's namespace gets ``name``: by import, definition or assignment."""
        for node in self._top():
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if any((a.asname or a.name) == name for a in node.names):
                    return True
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if node.name == name:
                    return True
            elif isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == name for t in node.targets
            ):
                return True
        return False

    def _function(self, path: str) -> ast.FunctionDef:
        *owner, name = path.split(".")
        body: Any = list(self._top())
        for cls in owner:
            inner = [n for n in body if isinstance(n, ast.ClassDef) and n.name == cls]
            if not inner:
                raise Missing(f"{self.name}.{cls} is gone")
            body = inner[-1].body
        found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
        if not found:
            raise Missing(f"{self.name}.{path} is gone")
        return found[-1]

    def parameters(self, path: str) -> tuple[str, ...]:
        """Return the parameters of ``function`` or ``Class.method``.

        Raises:
            Missing: it is not defined here.
        """
        args = self._function(path).args
        return tuple(a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))

    def text_of(self, path: str) -> str:
        """Return the source of ``function`` or ``Class.method``, or with ``""`` the module's.

        Raises:
            Missing: it is not defined here.
        """
        text = self.path.read_text(encoding="utf-8", errors="replace")
        if not path:
            return text
        node = self._function(path)
        return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
