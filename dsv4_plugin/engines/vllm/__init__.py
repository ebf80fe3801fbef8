"""The vLLM adapter: ``register()`` is the ``vllm.general_plugins`` entry point ``dsv4``.

vLLM calls ``register()`` in every process: API server, engine core, workers, the subprocess that
inspects models. It imports neither vLLM nor torch, never raises, and may run any number of times.
It registers three import hooks (:mod:`..shared.import_hooks`), which run after these imports:

* ``vllm.engine.arg_utils`` → it adds ``--plugin dsv4`` to the command line (:mod:`.cli_option`);
* ``vllm.model_executor.layers.sparse_attn_indexer`` → it looks for the seams and patches them
  (:mod:`.install`), and looks at every layer that is built (:mod:`.policy`);
* ``vllm.v1.metrics.prometheus`` → with ``DSV4_STATUS_DIR`` it adds the status of the workers to
  ``/metrics`` (:mod:`dsv4_plugin.metrics`).

The plugin checks whether it is switched on when a layer is built, not here: in the parent process
``register()`` runs before the command line is parsed. If the plugin is not switched on, the patched
names call the originals. With ``DSV4_PLUGIN=0`` it patches nothing. It still adds the option, so
that a command line with ``--plugin dsv4`` starts the server.
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
    """Restore every original; leave what other code has patched since, with a log line."""
    from dsv4_plugin.engines.vllm import probe

    import_hooks.forget(ARG_UTILS, INDEXER, PROMETHEUS, *probe.NEIGHBOURS)
    activation.uninstall(__name__, "install", "cli_option")
    if PROMETHEUS in sys.modules:
        metrics.withdraw(sys.modules[PROMETHEUS])


def _on_arg_utils(module: object) -> None:
    from dsv4_plugin.engines.vllm import cli_option

    cli_option.install(module)


def _on_prometheus(module: object) -> None:
    metrics.expose(module)


def _on_indexer(module: object) -> None:
    from dsv4_plugin.engines.vllm import install, probe

    for name in probe.NEIGHBOURS:
        if import_hooks.in_part(sys.modules.get(name)):  # it was imported first, and has not ended
            import_hooks.after_import(name, lambda _: _on_indexer(module))
            return
    install.install(module)
