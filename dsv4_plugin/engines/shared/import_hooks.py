"""Run a function right after a module has been imported, without importing it.

A finder at the head of ``sys.meta_path`` lets the other finders find the module. They may keep the
spec that they return and return it again, so the finder does not change it. The import gets a copy
of the spec. Its loader lets the original loader execute the module and then calls back. Before the
module is executed, it gets its original loader again, so that ``inspect.getsource``,
``importlib.resources`` and reloading work as usual.

Why a hook: vLLM decides at the import of its indexer module how calls behave under CUDA-graph
capture. Its configuration sets the variable for that after plugins are loaded. If ``register()``
imported the module, vLLM would decide wrongly.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from dsv4_plugin import log, processes

__all__ = ["after_import", "forget", "in_part"]

Callback = Callable[[ModuleType], None]
_lock = processes.lock()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.pending: dict[str, Callback] = {}
        self._looking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        looking = self._looking.__dict__.setdefault("names", set())
        if fullname not in self.pending or fullname in looking:
            return None  # another finder like this one asks it back
        looking.add(fullname)
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec = None if finder is self or find is None else find(fullname, path, target)
                if spec is not None:
                    return _followed(spec)
        finally:
            looking.discard(fullname)
        return None

    def leave(self) -> None:
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


_finder = _Finder()


def _followed(spec: ModuleSpec) -> ModuleSpec:
    """Return a copy of a spec that imports the module in the same way and then calls back."""
    try:
        if hasattr(spec.loader, "exec_module"):
            followed = copy.copy(spec)
            followed.loader = _Loader(followed, spec.loader)
            return followed
    except Exception as error:
        log.debug(f"a spec that cannot be copied ({type(error).__name__}: {error})")
    _cannot_be_followed(getattr(spec, "name", "a module"))
    return spec


def _cannot_be_followed(name: str) -> None:
    said = f"{name} is imported in a way that cannot be followed; it stays as it is"
    log.once(logging.WARNING, said)


class _Loader(importlib.abc.Loader):
    """Another finder's loader; every other attribute is read from that loader."""

    def __init__(self, spec: ModuleSpec, loader: Any) -> None:
        self._spec, self._loader = spec, loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = self._loader
        with contextlib.suppress(AttributeError):  # the object is not one of Python's modules
            module.__loader__ = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            self._spec.loader = self  # the owner of the spec may try again
            raise
        _imported(self._spec.name, module)


def _imported(name: str, module: ModuleType) -> None:
    """Call the callbacks that waited for a module."""
    with _lock:
        callback = _finder.pending.pop(name, None)
        _finder.leave()
    if callback is not None:
        log.debug(f"{name} is imported; the plugin looks at it now")
        _call(callback, module)


def in_part(module: Any) -> bool:
    """Whether a module is being imported right now, by this thread or by another one."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _InPart(ModuleSpec):
    """The spec of a module whose import had begun and not ended when a callback was registered.

    Only a mark in the spec, which Python removes, shows that the import has ended.
    """

    _initializing: bool

    def __setattr__(self, attribute: str, value: Any) -> None:
        super().__setattr__(attribute, value)
        if attribute == "_initializing" and not value:
            super().__setattr__("__class__", ModuleSpec)
            module = sys.modules.get(self.name)
            if module is not None:  # else its import failed, and the hook waits for the next
                _imported(self.name, module)


def _follow(name: str, module: ModuleType) -> None:
    spec: Any = module.__spec__
    kind = type(spec)
    if kind is ModuleSpec and spec.name == name:
        spec.__class__ = _InPart
        if not in_part(module):  # another thread has ended the import in the meantime
            spec._initializing = False
    elif kind is not _InPart:
        _cannot_be_followed(name)


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception:
        log.exception(f"{module.__name__} could not be patched; it stays as it is")


def after_import(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once ``name`` is imported: now if it already is, otherwise later.

    An exception in the callback is logged and never raised into the import. A module has one
    callback: a second request before the import changes nothing.
    """
    with _lock:
        _finder.pending.setdefault(name, callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    module = sys.modules.get(name)
    if module is not None and not in_part(module):
        _imported(name, module)
        return
    log.debug(f"{name} is not imported yet; the plugin looks at it after its import")
    if module is not None:
        _follow(name, module)


def forget(*names: str) -> None:
    """Drop the callbacks that still wait for the import of ``names``."""
    with _lock:
        for name in names:
            _finder.pending.pop(name, None)
        _finder.leave()
