"""Checks of tensors that every adapter needs: shape and stride only, never data."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LENGTHS", "dtype_name", "is_matrix", "is_output", "rows_of", "saved_mib", "widen"]

LENGTHS = (torch.int32, torch.int64)


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Return float32 logits with the same row stride, on which the engines' kernels rely."""
    if logits.dtype == torch.float32:
        return logits
    wide = torch.empty_strided(
        logits.shape, logits.stride(), dtype=torch.float32, device=logits.device
    )
    return wide.copy_(logits)


def saved_mib(logits: torch.Tensor) -> float:
    """Return how many MiB smaller the buffer of these logits is than one in float32."""
    elements = logits.shape[0] * max(logits.stride(0), logits.shape[1])
    return round(elements * (4 - logits.dtype.itemsize) / (1 << 20), 3)


def dtype_name(dtype: torch.dtype) -> str:
    """Name the dtype of index logits as the counters do."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")


def rows_of(value: Any) -> int:
    """Return how many rows a call has, by its first tensor; 1 if that is no tensor."""
    value = value[0] if isinstance(value, tuple) and value else value
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 1


def is_matrix(scores: Any) -> bool:
    """Whether ``scores`` are index logits that the plugin's top-k reads as they are."""
    return (
        isinstance(scores, torch.Tensor)
        and scores.dim() == 2
        and scores.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (scores.stride(1) == 1 or scores.shape[1] == 1)
        and scores.shape[0] > 0
        and scores.shape[1] > 0
    )


def is_output(out: Any, rows: int, k: int) -> bool:
    """Whether ``out`` is an index buffer that the plugin's top-k fills as it is."""
    return (
        isinstance(out, torch.Tensor)
        and out.dtype == torch.int32
        and tuple(out.shape) == (rows, k)
        and out.stride(1) == 1
    )
