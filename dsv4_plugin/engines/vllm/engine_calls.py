"""What the wrappers ask of vLLM at a call: the arguments by name, and the forward pass."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["by_name", "forward_pass"]


def by_name(names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name; none where there are more by position than have a name."""
    if len(args) > len(names):
        return {}
    return {**dict(zip(names, args, strict=False)), **kwargs}


def forward_pass() -> Any:
    """Return what vLLM made for this forward pass, a new object each time; None outside of one."""
    module: Any = sys.modules.get("vllm.forward_context")
    if module is None or not module.is_forward_context_available():
        return None
    return module.get_forward_context()
