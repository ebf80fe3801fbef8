"""Run a function right after a module has been imported, without importing it.

A finder at the head of ``sys.meta_path`` lets the other finders find the module and wraps
``exec_module`` of the very loader they return, for one call. The module keeps its own loader and
spec, so ``inspect.getsource``, ``importlib.resources`` and reloading work as ever.

Why a hook: vLLM decides at the import of its indexer module how calls behave under CUDA-graph
capture, and its configuration sets the variable for that later than plugins are loaded. Importing
the module from ``register()`` would freeze the wrong answer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from dsv4_plugin import log

__all__ = ["after_import", "forget"]

Callback = Callable[[ModuleType], None]
_lock = threading.RLock()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.pending: dict[str, Callback] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.pending:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                self._wrap(spec)
                return spec
        return None

    def _wrap(self, spec: importlib.machinery.ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the class's own again
            execute(module)
            with _lock:
                callback = self.pending.pop(spec.name, None)
                self.leave()
            if callback is not None:
                log.debug(f"{spec.name} is imported; it is looked at now")
                _call(callback, module)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            log.say(
                logging.WARNING,
                f"{spec.name} has a loader that cannot be followed; it stays as it is",
            )

    def leave(self) -> None:
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


_finder = _Finder()


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception:
        log.exception(f"{module.__name__} could not be patched; it stays as it is")


def after_import(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once ``name`` is imported: now if it is, later if it is not.

    An exception in the callback is logged, never raised into the import. Callbacks are kept by
    module name: asking twice before the import changes nothing.
    """
    with _lock:
        module = sys.modules.get(name)
        if module is None:
            log.debug(f"{name} is not imported yet; it is looked at when it is")
            _finder.pending.setdefault(name, callback)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
            return
    _call(callback, module)


def forget(*names: str) -> None:
    """Drop what is still waiting for the import of ``names``."""
    with _lock:
        for name in names:
            _finder.pending.pop(name, None)
        _finder.leave()
