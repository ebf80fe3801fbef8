"""What the kernels take: one object a call, and the limits of its numbers.

An object is a tuple, so that the compiled kernel gets it as its arguments without a copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["MAX_INT32", "MAX_K", "TopkArgs", "reads_fp4"]

MAX_K = 2048
MAX_INT32 = (1 << 31) - 1  # what a page size, a row and a slot that is written can be at most


def reads_fp4(q: torch.Tensor) -> bool:
    """Return whether the keys that ``q`` is scored against are FP4, not FP8: by its dtype."""
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
