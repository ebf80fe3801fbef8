"""Register the plugin's hooks with SGLang's registry, and remove them.

The installer looks for each seam first (:mod:`.probe`). It does not hook DeepGEMM in the registry:
the registry would import DeepGEMM, in launchers too, and DeepGEMM loads a CUDA extension
(:mod:`.deep_gemm`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dsv4_plugin.engines.sglang import probe, registry, v41, wrappers
from dsv4_plugin.engines.sglang.adapter import SglangAdapter, current
from dsv4_plugin.engines.shared import adapter, decision
from dsv4_plugin.state import state

__all__ = ["install", "uninstall"]

# The hooks around the first targets of each seam, in their order.
_HOOKS: dict[str, tuple[Callable[..., Any], ...]] = {
    "forward": (wrappers.forward,),
    "topk.paged": (wrappers.topk_v1, wrappers.topk_v2),
    "topk.dsa": (wrappers.topk_dsa,),
    "budget": (wrappers.row_chunks, wrappers.nonpaged_plan),
    "topk.candidates": (v41.make_candidates,),
    "topk.full": (v41.make_full,),
}


def install() -> None:
    """Register a hook for every seam that is there."""
    if current() is not None:
        return
    now = SglangAdapter()
    adapter.start(now)
    found = probe.look()
    for name, site in found.items():
        now.found(name, site.where, site.why or "no call came yet")
        if name in _HOOKS:
            hooked = dict(zip(site.targets, _HOOKS[name], strict=False))
            now.targets[name] = tuple(hooked)
            for target, hook in hooked.items():
                registry.around(target, hook)
    state.seams["flag"].why = found["flag"].why
    # No call reaches a missing seam, so the error of an explicit setting is raised here.
    now.missing(logging.ERROR if decision.explicit() else logging.INFO, without=probe.absent())


def uninstall() -> None:
    """Restore DeepGEMM, and end the adapter; :mod:`.registry` removes its hooks itself."""
    if current() is not None:
        adapter.end()
