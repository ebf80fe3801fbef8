"""What every ``register()`` asks first, and how every ``unregister()`` ends."""

from __future__ import annotations

import logging
import sys

from dsv4_plugin import envs, facts, log
from dsv4_plugin.errors import SettingError

__all__ = ["asked", "configure_log", "may_patch", "uninstall"]


def may_patch(engine: str) -> bool:
    """Set up logging; False where the kill switch ``DSV4_PLUGIN=0`` is set, with a log line."""
    if envs.killed():
        log.configure("info")
        log.once(logging.INFO, f"DSV4_PLUGIN=0: nothing is patched in {engine}")
        return False
    configure_log()
    facts.process(engine)
    return True


def configure_log() -> None:
    """Set up logging, and say once what is wrong with the settings; never raises.

    A wrong value is an error at the first real use, where the user sees it, and only in an engine
    that was asked to use the plugin: ``register()`` must not end an engine's process.
    """
    try:
        log.configure(envs.value("log"))
    except SettingError:
        log.configure("info")
    try:
        envs.settings()
    except SettingError as error:
        log.once(
            logging.WARNING,
            f"{error}. This is an error where the plugin is switched on, else nothing",
        )


def asked() -> bool:
    """Whether the plugin was switched on, with a log line where it was not."""
    enabled = envs.asked()
    if not enabled:
        log.debug("the plugin is not switched on (DSV4_PLUGIN): nothing more is looked at here")
    return enabled


def uninstall(package: str, *names: str) -> None:
    """Call ``uninstall()`` of those modules of an adapter that this process has loaded."""
    for name in names:
        module = sys.modules.get(f"{package}.{name}")
        if module is not None:
            module.uninstall()
