"""One call of a top-k: ours, or the engine's own on the same arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv4_plugin.engines.shared import plan
from dsv4_plugin.engines.shared.plan import Topk
from dsv4_plugin.engines.shared.tensors import dtype_name
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.state import state

__all__ = ["serve"]


def serve(
    kind: str,
    topk: Topk | None,
    dtype: torch.dtype,
    ours: Callable[[Topk], None],
    upstream: Callable[[], None],
    beside: Callable[[], None] | None = None,
) -> None:
    """Run ``ours`` where there is a ``topk`` for this call, else or if it raises ``upstream``.

    An error of ours is logged once and switches the top-k off for the process (one that is about
    this call's form only, :class:`UnmetError`, does not); with ``DSV4_STRICT=1`` it is raised.
    ``beside`` runs once ours has served: it watches (:mod:`.shadow`) and must not raise.
    """
    now = plan.current()
    if topk is not None:
        try:
            ours(topk)
        except Exception as error:
            if now.strict:
                raise
            if not isinstance(error, UnmetError):
                plan.switch_off("topk", error)
        else:
            state.count(f"topk.{kind}")
            state.count(f"topk.{kind}.{dtype_name(dtype)}.{topk.backend}")
            if beside is not None:
                beside()
            return
    if now.enabled:
        state.count(f"topk.{kind}.upstream")
    upstream()
