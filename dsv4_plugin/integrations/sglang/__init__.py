"""The SGLang adapter: ``register()`` is the ``sglang.srt.plugins`` entry point ``dsv4``.

SGLang calls ``register()`` in the launcher, the engine and every scheduler process (one a rank),
then applies what was registered with its ``HookRegistry``. Here nothing of SGLang is imported but
that registry; the seams are looked for in SGLang's source (:mod:`.sites`), so a name that is not
there is never asked for.

* ``--dsv4-topk`` is added to the command line (:mod:`.flag`), also where nobody asked for more;
* the indexer's forward and both of its top-k functions, and the top-k of the DSA backend (V3.2,
  GLM), are hooked AROUND (:mod:`.calls`) where the plugin is switched on.

What a call gets is decided at its first real use (:mod:`.guard`). ``register()`` never raises.
"""

from __future__ import annotations

import logging
from typing import Any

from dsv4_plugin import log
from dsv4_plugin.integrations import startup

__all__ = ["probe", "register", "unregister"]


def register() -> None:
    """Install the adapter in this process; never raises."""
    try:
        may = startup.may_patch("SGLang")
        from dsv4_plugin.integrations.sglang import flag, registry

        try:
            registry.around(flag.target(), flag.add_cli_args)
        except (ImportError, AttributeError) as error:
            log.once(
                logging.WARNING,
                f"SGLang has no hook registry that dsv4 knows ({type(error).__name__}: {error}); "
                "nothing is patched",
            )
            return
        if may and startup.asked():
            from dsv4_plugin.integrations.sglang import seams

            seams.install()
    except Exception:
        log.exception("dsv4 could not be registered; SGLang stays as it is")


def unregister() -> None:
    """Take every hook back; what somebody else has hooked since stays theirs, with a log line."""
    startup.uninstall(__name__, "seams", "registry")


def probe() -> dict[str, dict[str, Any]]:
    """Return, for ``dsv4-plugin doctor``, where each seam is; reads source, imports nothing."""
    from dsv4_plugin.integrations.sglang import sites
    from dsv4_plugin.integrations.source import shown

    return shown(sites.look())
