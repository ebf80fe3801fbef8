"""One call of a top-k: by the plugin, or by the engine's own code on the same arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.tensors import dtype_name
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.state import state

__all__ = ["serve"]


def serve(
    kind: str,
    selection: Selection | None,
    dtype: torch.dtype,
    plugin: Callable[[Selection], None],
    engine: Callable[[], None],
    watch: Callable[[], None] | None = None,
    rows: int = 1,
    aside: bool = False,
) -> None:
    """Run ``plugin`` if there is a ``selection`` for this call; else, or if it fails, ``engine``.

    ``aside``: the plugin leaves the call to the engine, whose own kernel is faster in its shape.

    An error of the plugin is logged once and switches the top-k off for the process. An
    :class:`UnmetError` does not switch it off, because it concerns the form of this call only.
    With ``DSV4_STRICT=1`` every error is raised. ``watch`` runs after the plugin has served: it is
    the shadow, and must not raise. A call of no ``rows`` is not counted.
    """
    now = adapter.current()
    if selection is not None and aside:
        state.count(f"topk.{kind}.aside", rows)
        engine()
        return
    if selection is not None:
        try:
            plugin(selection)
        except Exception as error:
            if now.decision.strict:
                raise
            if not isinstance(error, UnmetError):
                now.switch_off("topk", error)
        else:
            state.count(f"topk.{kind}", rows)
            state.count(f"topk.{kind}.{dtype_name(dtype)}.{selection.backend}", rows)
            if watch is not None:
                watch()
            return
    if now.decision.enabled:
        state.count(f"topk.{kind}.upstream", rows)
    engine()
