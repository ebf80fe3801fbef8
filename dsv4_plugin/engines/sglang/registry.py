"""SGLang's ``HookRegistry``: register AROUND hooks, recognise them, remove them.

The registry cannot remove a hook. The plugin recognises its hook by the wrapper that the registry
made, because the hook is in its closure. Any wrapper around that one comes from other code.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any

from dsv4_plugin import log
from dsv4_plugin.engines.shared.patches import called

__all__ = ["around", "hooked", "intact", "other_hooks", "uninstall"]

_hooks: dict[str, Callable[..., Any]] = {}  # target -> the plugin's hook
_owners: dict[str, Any] = {}  # the object of the path before the last dot


def _registry_module() -> Any:
    """Return SGLang's module of the registry; SGLang imports it before it calls a plugin.

    Raises:
        ImportError: this SGLang has none.
    """
    return importlib.import_module("sglang.srt.plugins.hook_registry")


def around(target: str | None, hook: Callable[..., Any]) -> None:
    """Register ``hook`` around ``target`` once; SGLang applies it after all plugins ran."""
    if target is None:
        return
    if target in _hooks:
        log.debug(f"hook around {target}: already there")
        return
    module = _registry_module()
    if target in getattr(module.HookRegistry, "_patched", ()):
        log.once(
            logging.WARNING,
            f"{target} was hooked and applied before dsv4 was registered; it is left as it is",
        )
        return
    module.HookRegistry.register(target, hook, module.HookType.AROUND)
    _hooks[target] = hook
    log.say(logging.DEBUG, f"hook around {target}: registered; SGLang applies it")


def other_hooks(target: str) -> list[str]:
    """Return the names of other hooks that are registered for ``target``."""
    registered = getattr(_registry_module().HookRegistry, "_hooks", {}).get(target, [])
    return [
        f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', repr(hook))}"
        for _, hook, *_ in registered
        if hook is not _hooks.get(target)
    ]


def _place(target: str) -> tuple[Any, str, Any]:
    """Return the owner of a target, the attribute's name and its present function."""
    path, _, name = target.rpartition(".")
    owner = _owners.get(path)
    if owner is None:
        owner = _owners[path] = pkgutil.resolve_name(path)
    return owner, name, vars(owner).get(name)


def _function(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _made_for(function: Any, hook: Any) -> bool:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            if cell.cell_contents is hook:
                return True
        except ValueError:  # an empty cell
            continue
    return False


def hooked(target: str) -> Any:
    """Return the function that a call of ``target`` runs now."""
    return _function(_place(target)[2])


def intact(target: str) -> bool:
    """Whether a call of ``target`` reaches the plugin's hook first, with no wrapper around it."""
    hook = _hooks.get(target)
    if hook is None:
        return False
    try:
        return _made_for(hooked(target), hook)
    except (ImportError, AttributeError, ValueError):
        return False


def uninstall() -> None:
    """Remove the plugin's hooks."""
    _owners.clear()
    if not _hooks:
        return
    registry = _registry_module().HookRegistry
    spread: dict[int, tuple[Any, Any]] = {}
    for target, hook in list(_hooks.items()):
        del _hooks[target]
        registered = getattr(registry, "_hooks", {}).get(target)
        if registered is not None:
            registered[:] = [entry for entry in registered if entry[1] is not hook]
        if target not in getattr(registry, "_patched", ()):
            continue
        try:
            restored = _restore(target, hook)
        except (ImportError, AttributeError, ValueError) as error:
            log.say(logging.WARNING, f"{target} could not be restored ({error})")
            continue
        if restored is not None:
            spread[id(restored[0])] = restored
            if not registered:
                registry._patched.discard(target)
    _gather_in(spread)


def _restore(target: str, hook: Any) -> tuple[Any, Any] | None:
    """Restore the original; return wrapper and original, or None if other code patched it."""
    owner, name, raw = _place(target)
    wrapper = _function(raw)
    if not _made_for(wrapper, hook):
        # The plugin's hook may still be inside; from now on it calls the original.
        log.say(
            logging.WARNING,
            f"{target} was patched by other code since ({called(wrapper)}); it is left as it is",
        )
        return None
    original = wrapper.__wrapped__
    setattr(owner, name, type(raw)(original) if raw is not wrapper else original)
    log.say(logging.DEBUG, f"hook around {target}: taken back")
    return wrapper, original


def _gather_in(spread: dict[int, tuple[Any, Any]]) -> None:
    """Restore the originals in every module to which the registry has copied its wrappers."""
    if not spread:
        return
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for attribute, value in list(vars(module).items()):
                found = spread.get(id(value))
                if found is not None and found[0] is value:
                    setattr(module, attribute, found[1])
