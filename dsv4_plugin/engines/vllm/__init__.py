"""The vLLM adapter: ``register()`` is the ``vllm.general_plugins`` entry point ``dsv4``.

vLLM calls ``register()`` in every process: API server, engine core, workers, the subprocess that
inspects models. It imports neither vLLM nor torch, never raises, and may run any number of times.
It leaves three notes with Python's import system (:mod:`..shared.import_hooks`):

* ``vllm.engine.arg_utils`` → the command line learns ``--plugin dsv4`` (:mod:`.cli_option`);
* ``vllm.model_executor.layers.sparse_attn_indexer`` → the seams are looked for and patched
  (:mod:`.install`), and every layer that is built is looked at (:mod:`.policy`);
* ``vllm.v1.metrics.prometheus`` → with ``DSV4_STATUS_DIR`` the status of the workers is in
  ``/metrics`` (:mod:`dsv4_plugin.metrics`).

Whether the plugin is switched on is asked when a layer is built, not here: in the parent process
``register()`` runs before the command line is parsed. In a process where it is
not switched on the patched names pass straight through. ``DSV4_PLUGIN=0`` patches nothing; only
the option stays known, so that a command line with ``--plugin dsv4`` still starts the server.
"""

from __future__ import annotations

import sys

from dsv4_plugin import log, metrics
from dsv4_plugin.engines.shared import activation, import_hooks

__all__ = ["INDEXER", "register", "unregister"]

ARG_UTILS = "vllm.engine.arg_utils"
INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
PROMETHEUS = "vllm.v1.metrics.prometheus"


def register() -> None:
    """Install the adapter in this process; never raises."""
    try:
        may = activation.may_patch("vLLM")
        import_hooks.after_import(ARG_UTILS, _on_arg_utils)
        if may:
            import_hooks.after_import(INDEXER, _on_indexer)
            if metrics.wanted():
                import_hooks.after_import(PROMETHEUS, _on_prometheus)
    except Exception:
        log.exception("dsv4 could not be registered; vLLM stays as it is")


def unregister() -> None:
    """Take every patch back; what other code has patched since stays, with a log line."""
    import_hooks.forget(ARG_UTILS, INDEXER, PROMETHEUS)
    activation.uninstall(__name__, "install", "cli_option")
    if PROMETHEUS in sys.modules:
        metrics.withdraw(sys.modules[PROMETHEUS])


def _on_arg_utils(module: object) -> None:
    from dsv4_plugin.engines.vllm import cli_option

    cli_option.install(module)


def _on_prometheus(module: object) -> None:
    metrics.expose(module)


def _on_indexer(module: object) -> None:
    from dsv4_plugin.engines.vllm import install

    install.install(module)
