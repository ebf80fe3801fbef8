"""The state of the TokenSpeed adapter; its two entry points share one object."""

from __future__ import annotations

from importlib import metadata

from dsv4_plugin.engines.shared import adapter

__all__ = ["TokenspeedAdapter", "current", "ensure"]


class TokenspeedAdapter(adapter.Adapter):
    """``kernels`` are the names of the plugin's kernels in TokenSpeed's registry."""

    def __init__(self) -> None:
        try:
            version = metadata.version("tokenspeed")
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        super().__init__(f"TokenSpeed {version}")
        self.kernels: list[str] = []


def current() -> TokenspeedAdapter | None:
    """Return the adapter of this process; None before it is registered and after its end."""
    found = adapter.current()
    return found if isinstance(found, TokenspeedAdapter) else None


def ensure() -> TokenspeedAdapter:
    """Return the adapter of this process; the first of the two entry points starts it."""
    found = current()
    if found is None:
        found = TokenspeedAdapter()
        adapter.start(found)
    return found
