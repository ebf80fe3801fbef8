"""The TokenSpeed adapter: two entry points named ``dsv4``.

* ``tokenspeed_kernel.plugins`` → :func:`register_kernels`: the indexer's top-k is registered in
  TokenSpeed's own kernel registry, with a plugin's priority (:mod:`.registration`);
* ``tokenspeed.plugins`` → :func:`register`: the readers of the indexer cache, which have no
  registry, are replaced once their module is imported (:mod:`.readers`).

Both run in every process that builds a model's configuration, never raise, and do nothing unless
``DSV4_PLUGIN=1`` switches the plugin on. TokenSpeed has no hook for its command line.
"""

from __future__ import annotations

from dsv4_plugin import log
from dsv4_plugin.engines.shared import activation, import_hooks

__all__ = ["register", "register_kernels", "unregister"]


def register_kernels() -> None:
    """Register the plugin's kernels in this process; never raises."""
    try:
        if activation.may_patch("TokenSpeed") and activation.asked():
            from dsv4_plugin.engines.tokenspeed import registration

            registration.install()
    except Exception:
        log.exception("dsv4's kernels could not be registered; TokenSpeed's own run")


def register() -> None:
    """Replace the readers of the indexer cache in this process; never raises."""
    try:
        if activation.may_patch("TokenSpeed") and activation.asked():
            from dsv4_plugin.engines.tokenspeed import probe, readers

            readers.look()
            import_hooks.after_import(probe.OPS, readers.install)
    except Exception:
        log.exception("dsv4 could not be registered; TokenSpeed stays as it is")


def unregister() -> None:
    """Take the kernels out of the registry and restore the readers."""
    from dsv4_plugin.engines.tokenspeed import probe

    import_hooks.forget(probe.OPS)
    activation.uninstall(__name__, "registration")
