"""Empty modules in place of native packages that an engine imports and that are not installed.

The code under test calls nothing of them. They have every attribute that an import asks for. A
package that is installed is never replaced.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

__all__ = ["Empty", "alias", "stand_in"]


class _Anything:
    """Acts as anything that an import asks of a package: a decorator, a constant, a base class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    # TokenSpeed looks for ``enable_pdl`` in the signatures of flashinfer's functions.
    def __call__(self, *args: Any, enable_pdl: Any = None, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Be a field's type in SGLang's API models."""
        return importlib.import_module("pydantic_core.core_schema").any_schema()


class Empty(types.ModuleType):
    """A module in which every attribute exists."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Anything()


class _Finder:
    """Finds the packages that are not installed, and what is below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = {name for name in names if importlib.util.find_spec(name) is None}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Empty(spec.name)
        module.__file__ = "<stand-in>"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Alias:
    """Finds a package, and what is below it, under a second name; the modules are the same."""

    def __init__(self, name: str, real: str) -> None:
        self.name, self.real = name, real

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != self.name:
            return None
        try:
            module = self.create_module(name)
        except ImportError:
            return None
        is_package = hasattr(module, "__path__")
        return importlib.machinery.ModuleSpec(name, self, is_package=is_package)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        name = getattr(spec, "name", spec)
        # Import machinery writes the alias' spec into the module; its own goes back afterwards.
        module = importlib.import_module(self.real + name[len(self.name) :])
        self._kept = module.__spec__, getattr(module, "__loader__", None), module.__package__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__, module.__loader__, module.__package__ = self._kept


def stand_in(names: Sequence[str]) -> list[str]:
    """Let those of ``names`` that are not installed be imported; returns which these are."""
    finder = _Finder(names)
    sys.meta_path.append(finder)
    return sorted(finder.names)


def alias(name: str, real: str) -> bool:
    """Let ``real`` be imported as ``name`` too, unless that is installed; whether it was done."""
    if importlib.util.find_spec(name) is not None:
        return False
    sys.meta_path.insert(0, _Alias(name, real))
    return True
