"""The public op that selects the ``k`` best columns of every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.kernels.arguments import TopkArgs
from dsv4_plugin.ops import checks
from dsv4_plugin.ops.dispatch import Call, resolve
from dsv4_plugin.ops.torch_library import op

__all__ = ["indices", "prepare", "topk"]


def indices(logits: torch.Tensor, k: int, **_: Any) -> torch.Tensor:
    """Check ``k`` and return a new ``[rows, k]`` tensor for the indices of a selection."""
    checks.size("k", k)
    return torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)


@op(indices, outputs=("out", "out_raw", "out_counts"))
def topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    next_n: int = 1,
    row_starts: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    out_raw: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
    sort: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Select the ``k`` largest of the first columns of every row, exactly.

    Set, ties and order are separate promises:

    * **set**: exactly the ``k`` largest of the row's ``length`` columns, compared in the dtype of
      ``logits``. ``-inf`` and ``inf`` are numbers like any other. ``-0.0`` equals ``0.0``. A NaN is
      chosen only when no number is left.
    * **ties**: the lowest column wins, also among NaN.
    * **order**: ascending columns, then -1. With ``sort`` the largest value comes first, and among
      equal values the lower column.
    * **short rows**: ``length <= k`` gives ``0 … length - 1`` and then -1, in this order even with
      ``sort``. The scores of such a row do not matter and may be uninitialised. ``length <= 0``
      gives -1.
    * **independence**: no column at or past a row's length matters. A row's answer depends on that
      row alone, not on the batch, the grid or the width of the buffer.

    Args:
        logits: ``[rows, columns]`` float32, bfloat16 or float16; unit inner stride, any row stride.
        lengths: int32 or int64 number of columns of each row: ``[rows]``, or ``[batch, next_n]``
            with ``rows = batch · next_n``; or one per request, ``[batch]`` or ``[batch, 1]``. In
            that form, by the engines' rule, row ``b · next_n + j`` has ``lengths[b] - next_n + 1 +
            j`` columns. Clipped to the columns that the row has.
        k: 1 … 2048.
        next_n: rows per request (speculative decoding).
        row_starts: ``[rows]`` int32 or int64: the row's columns begin there, and the indices count
            from there. A start below zero gives an empty row.
        page_table: ``[rows, pages]`` or ``[batch, pages]`` int32 page numbers, unit inner stride.
            ``out`` then holds pool slots, ``page_table[r, i // page_size] · page_size + i %
            page_size``, in the order of the indices. A slot is -1 if there is no index, if the page
            is below zero or not in the table, or if it does not fit in int32.
        page_size: columns per page of ``page_table``.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_raw: ``[rows, k]`` int32, to fill with the indices when ``page_table`` is given.
        out_counts: ``[rows]`` int32, contiguous, to fill with the number of indices of each row:
            its clipped length, at most ``k``. They come first in the row, -1 after them.
        sort: sort by value. A row no longer than ``k`` keeps the order of its columns.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM #40811 for the bfloat16 input; the engines' top-k kernels for the other forms.
    """
    filled = indices(checks.scores("logits", logits), k) if out is None else out
    args = TopkArgs(
        logits, lengths, filled, out_raw, row_starts, page_table, k, next_n, page_size, sort,
        out_counts,
    )  # fmt: skip
    prepare(args, out, backend)(args)
    return filled


def prepare(
    args: TopkArgs, out: torch.Tensor | None, backend: str | None
) -> Callable[[TopkArgs], None]:
    """Check a top-k and return the function that computes it.

    Args:
        args: the arguments of the caller; ``out`` is a new tensor if the caller gave none.
        out: as the caller gave it. If None, logits and ``k`` are already checked.
        backend: as in :func:`topk`.
    """
    checks.topk(args, out)
    logits = args.logits
    if not logits.shape[0]:
        return _nothing
    return resolve(Call("topk", logits.device, logits.dtype, args.k), backend)


def _nothing(args: TopkArgs) -> None:
    """Run in place of an implementation if there is no row."""
