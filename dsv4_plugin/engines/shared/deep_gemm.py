"""The abilities of the DeepGEMM that an engine brings."""

from __future__ import annotations

import functools
import inspect
from typing import Any

__all__ = ["has_logits_dtype"]


@functools.lru_cache(maxsize=64)
def has_logits_dtype(function: Any) -> bool:
    """Whether a logits function of DeepGEMM can write bfloat16 on request."""
    if function is None:
        return False
    try:
        return "logits_dtype" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # pybind11: the signature is in the docstring
        return "logits_dtype" in (getattr(function, "__doc__", None) or "")
