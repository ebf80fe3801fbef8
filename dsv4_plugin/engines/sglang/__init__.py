"""The SGLang adapter: ``register()`` is the ``sglang.srt.plugins`` entry point ``dsv4``.

SGLang calls ``register()`` in the launcher, the engine and every scheduler process (one for each
rank). Then it applies the hooks in its ``HookRegistry``. ``register()`` imports nothing of SGLang
but that registry. It looks for the seams in SGLang's source (:mod:`.probe`), so it never hooks a
name that does not exist.

* It adds ``--dsv4-topk`` to the command line (:mod:`.cli_option`), even if the plugin is off.
* If the plugin is switched on, it registers AROUND hooks (:mod:`.wrappers`) for the indexer's
  forward, both of its top-k functions, and the top-k of the DSA backend (V3.2, GLM).

The plugin decides at the first real use of a call (:mod:`.policy`). ``register()`` never raises.
"""

from __future__ import annotations

import logging

from dsv4_plugin import log
from dsv4_plugin.engines.shared import activation

__all__ = ["register", "unregister"]


def register() -> None:
    """Install the adapter in this process; never raises."""
    try:
        may = activation.may_patch("SGLang")
        from dsv4_plugin.engines.sglang import cli_option, registry

        try:
            registry.around(cli_option.target(), cli_option.add_cli_args)
        except (ImportError, AttributeError) as error:
            log.once(
                logging.WARNING,
                f"SGLang has no hook registry that dsv4 knows ({type(error).__name__}: {error}); "
                "nothing is patched",
            )
            return
        if may and activation.asked():
            from dsv4_plugin.engines.sglang import install

            install.install()
    except Exception:
        log.exception("dsv4 could not be registered; SGLang stays as it is")


def unregister() -> None:
    """Remove every hook; leave what other code has hooked since, with a log line."""
    activation.uninstall(__name__, "install", "registry")
