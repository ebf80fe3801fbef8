"""What every ``register()`` asks first, and how every ``unregister()`` ends."""

from __future__ import annotations

import logging
import sys

from dsv4_plugin import envs, facts, log
from dsv4_plugin.errors import SettingError

__all__ = ["asked", "may_patch", "uninstall"]


def may_patch(engine: str) -> bool:
    """Set up logging; False where the kill switch ``DSV4_PLUGIN=0`` is set, with a log line.

    A setting of a wrong value is logged here and raised at the first real use, where the user
    sees it as an error: ``register()`` must not end an engine's process.
    """
    if envs.killed():
        log.configure("info")
        log.once(logging.INFO, f"DSV4_PLUGIN=0: nothing is patched in {engine}")
        return False
    try:
        log.configure(envs.settings().log)
    except SettingError as error:
        log.configure("info")
        log.once(logging.WARNING, str(error))
    facts.process(engine)
    return True


def asked() -> bool:
    """Whether somebody switched the plugin on; True as well where a setting is wrong."""
    try:
        enabled = envs.settings().enabled
    except SettingError:
        return True
    if not enabled:
        log.debug("nobody switched the plugin on (DSV4_PLUGIN): nothing more is looked at here")
    return enabled


def uninstall(package: str, *names: str) -> None:
    """Call ``uninstall()`` of those modules of an adapter that this process has loaded."""
    for name in names:
        module = sys.modules.get(f"{package}.{name}")
        if module is not None:
            module.uninstall()
