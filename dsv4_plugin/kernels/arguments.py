"""The arguments of the kernels, one object per call, and the limits of its numbers.

An object is a tuple, so that the compiled kernel takes it as its arguments without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["MAX_INT32", "MAX_K", "TopkArgs", "reads_fp4"]

MAX_K = 2048
MAX_INT32 = (1 << 31) - 1  # the most that a page size, a row number or a written slot can be


def reads_fp4(q: torch.Tensor) -> bool:
    """Return whether ``q`` is scored against FP4 keys (not FP8 keys), as its dtype says."""
    return q.dtype is torch.bfloat16


class TopkArgs(NamedTuple):
    """The checked arguments of a top-k, in the order of ``dsv4_topk`` (``csrc/bindings/topk.cu``).

    :func:`dsv4_plugin.topk` describes each of them.
    """

    logits: torch.Tensor
    lengths: torch.Tensor
    out: torch.Tensor
    out_raw: torch.Tensor | None
    row_starts: torch.Tensor | None
    page_table: torch.Tensor | None
    k: int
    next_n: int
    page_size: int
    sort: bool
    out_counts: torch.Tensor | None
