"""The first checks of every ``register()``, and the last step of every ``unregister()``."""

from __future__ import annotations

import logging
import sys

from dsv4_plugin import envs, facts, log
from dsv4_plugin.errors import SettingError

__all__ = ["asked", "configure_log", "may_patch", "uninstall"]


def may_patch(engine: str) -> bool:
    """Set up logging; return False, with a log line, if ``DSV4_PLUGIN=0`` forbids the plugin."""
    if envs.killed():
        log.configure("info")
        log.once(logging.INFO, f"DSV4_PLUGIN=0: nothing is patched in {engine}")
        return False
    configure_log()
    facts.process(engine)
    return True


def configure_log() -> None:
    """Set up logging, and log once which settings are wrong; never raise.

    ``register()`` must not end an engine's process. So a wrong value is an error only at the first
    real use, and only in an engine in which the plugin is switched on.
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
            f"{error}. If the plugin is switched on, this becomes an error",
        )


def asked() -> bool:
    """Whether the plugin was switched on, with a log line if it was not."""
    enabled = envs.asked()
    if not enabled:
        log.debug("the plugin is not switched on (DSV4_PLUGIN): it does nothing in this process")
    return enabled


def uninstall(package: str, *names: str) -> None:
    """Call ``uninstall()`` of those modules of an adapter that this process has loaded."""
    for name in names:
        module = sys.modules.get(f"{package}.{name}")
        if module is not None:
            module.uninstall()
