"""The public ops that make index logits, and the chain from logits to indices.

The score of a key is ``scale · Σ_h weights[h] · ReLU(q[h] · key)``. The dot products are of e4m3
values, all sums are in float32, and the score is rounded once to the dtype of the result. The
layout of the cache is described in :mod:`dsv4_plugin.ops.cache`.

**FP4 keys.** Every op on pages scores bfloat16 queries against the MXFP4 form of the cache. The
score then is ``Σ_h weights[h] · ReLU(q[h] · key)``, rounded as SGLang's reference does it. A dot
product is rounded to float32 and then to bfloat16, and its product with the weight to bfloat16. The
heads are summed in float32, and the sum is rounded to bfloat16. The order of the sum is fixed.
``s[t, c]`` sums the heads ``8 i + 2 t + c`` one after the other, ``a[t] = s[t, 0] + s[t, 1]``, and
the sum is ``(a[0] + a[1]) + (a[2] + a[3])``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.kernels import reference_logits
from dsv4_plugin.kernels.arguments import TopkArgs, reads_fp4
from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.ops import checks
from dsv4_plugin.ops.dispatch import Call, resolve
from dsv4_plugin.ops.topk import indices, prepare
from dsv4_plugin.ops.torch_library import op

__all__ = ["paged_logits", "ragged_logits", "select"]

ROW_BYTES = 16  # the alignment of the rows of a new result


def new_logits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised ``[rows, columns]`` whose rows start at multiples of 16 bytes."""
    step = ROW_BYTES // dtype.itemsize
    stride = max(1, (columns + step - 1) // step) * step
    return torch.empty_strided((rows, columns), (stride, 1), dtype=dtype, device=device)


def _new_paged(
    q: torch.Tensor, block_table: torch.Tensor, block_size: int, dtype: torch.dtype, **_: Any
) -> torch.Tensor:
    return new_logits(rows_of(q), block_table.shape[1] * block_size, dtype, q.device)


def _new_ragged(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return new_logits(q.shape[0], k.shape[0], dtype, q.device)


def _new_indices(q: torch.Tensor, k: int, **_: Any) -> torch.Tensor:
    checks.size("k", k)
    return torch.empty(rows_of(q), k, dtype=torch.int32, device=q.device)


def rows_of(q: torch.Tensor) -> int:
    """Return how many rows ``q`` has, in any form that a caller may give it."""
    return q.shape[0] * (q.shape[1] if q.dim() == 4 else 1)


@op(_new_paged)
def paged_logits(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score the keys of every request's pages: the logits of decode.

    Column ``c`` of row ``b · next_n + j`` is key ``c % block_size`` of page
    ``block_table[b, c // block_size]``.

    * **what is written**: the first ``length`` columns of a row, clipped to the columns of ``out``.
      Columns past these are not written; in a new tensor they are uninitialised. ``topk(out,
      lengths, k)`` reads only columns that were written.
    * **what is read**: the pages and the entries of ``block_table`` that these columns need. If the
      batch is one request, other entries of its row may be read too, because the kernel reads ahead
      of the length. A page below zero, past the end of the cache or not in the table scores
      ``-inf``, and nothing is read for it.
    * **NaN**: a NaN in a query, a key, a scale or a weight of a score makes that score NaN.
    * **independence**: a score depends bit for bit on its query, weights and key alone. It does not
      depend on the batch, the key's place in the table, the row's length or the grid.

    Args:
        q: ``[batch, next_n, heads, head_dim]``, or ``[batch, heads, head_dim]`` for ``next_n`` 1.
            The dtype is float8_e4m3fn, or uint8 with the same bytes; for FP4 keys it is bfloat16.
            Each ``[heads, head_dim]`` is contiguous; the outer strides are free.
        cache: uint8 indexer cache; see :mod:`dsv4_plugin.ops.cache` for its layout. For bfloat16
            queries it has the MXFP4 form, ``head_dim / 2 + head_dim / 32`` bytes per key.
        weights: ``[batch · next_n, heads]`` float32 (bfloat16 for FP4 keys), unit inner stride;
            they include the scales of the queries.
        lengths: int32 or int64 keys that each row sees: ``[rows]`` or ``[batch, next_n]``; or one
            per request, ``[batch]`` or ``[batch, 1]``, by the rule of :func:`dsv4_plugin.topk`: row
            ``b · next_n + j`` sees ``lengths[b] - next_n + 1 + j``.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride.
        block_size: keys per page.
        dtype: bfloat16, float16 or float32, for FP4 keys bfloat16; ignored when ``out`` is given.
        out: ``[rows, columns]`` to fill, of such a dtype, unit inner stride, any row stride.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, pages · block_size]`` tensor whose rows start at multiples of
        16 bytes.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: the contract of DeepGEMM's paged MQA logits, which the engines call; for FP4 keys the
    scores of ``fp4_index_logits_paged`` in SGLang (0.5.22 and later).
    """
    out, run, arguments = _prepare_paged(
        q, cache, weights, lengths, block_table, block_size, dtype, out, backend
    )
    run(*arguments)
    return out


def _prepare_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    backend: str | None,
    table_only: bool = False,
) -> tuple[torch.Tensor, Callable[..., None], tuple[Any, ...]]:
    """Check paged logits. Return their result, the function that fills it, and its arguments.

    ``table_only``: the result has no more columns than the table has keys.
    """
    q, pages, lengths = paged_arguments(q, cache, weights, lengths, block_table, block_size)
    batch, next_n, heads, head_dim = q.shape
    rows, device = batch * next_n, q.device
    columns = block_table.shape[1] * block_size
    inputs = (("q", q), ("cache", cache), ("weights", weights), ("lengths", lengths),
              ("block_table", block_table))  # fmt: skip
    out = new_result(out, rows, columns, dtype, device, inputs)
    checks.scores_dtype("out", out.dtype, q)
    if table_only and out.shape[1] > columns:
        out = out[:, :columns]
    if not rows or not out.shape[1]:
        return out, _nothing, ()
    call = Call(
        "paged_logits", device, out.dtype, head_dim=head_dim, heads=heads,
        block_size=block_size, fp4=reads_fp4(q), alignment=alignment(pages, q),
    )  # fmt: skip
    run = resolve(call, backend, has_keys=pages.shape[0] > 0)
    return out, run, (q, pages, weights, lengths, block_table, out, block_size)


@op(_new_ragged)
def ragged_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    one_request: bool = False,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score a window of gathered keys for every row: the logits of prefill.

    Column ``j`` of row ``r`` is key ``row_starts[r] + j``: every row begins at column zero. A key
    below zero or past the last one scores ``-inf``, and nothing is read for it. The promises for
    NaN and independence are those of :func:`paged_logits`.

    Args:
        q: ``[rows, heads, head_dim]`` float8_e4m3fn, or uint8 with the same bytes. Each ``[heads,
            head_dim]`` is contiguous; the row stride is free.
        k: ``[keys, head_dim]`` float8_e4m3fn, or uint8 with the same bytes; contiguous.
        k_scale: ``[keys]`` float32, contiguous.
        weights: ``[rows, heads]`` float32, unit inner stride; they include the scales of the
            queries.
        row_starts: ``[rows]`` int32 or int64, the row's first key.
        row_ends: ``[rows]`` int32 or int64, one past the row's last key. Clipped to the columns of
            ``out``. An end at or below the start gives an empty row.
        dtype: bfloat16, float16 or float32; ignored when ``out`` is given.
        one_request: whether the rows are the last ones of one request, whose keys ``k`` are. It
            changes the time of a call and nothing else: the kernel then expects that all rows need
            about as many keys.
        out: ``[rows, columns]`` to fill, of such a dtype, unit inner stride, any row stride.
            Columns past a row's window are not written.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, keys]`` tensor whose rows start at multiples of 16 bytes,
        uninitialised past a row's window. ``topk(logits, row_ends - row_starts, k)`` selects in it
        and reads only columns that were written.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: the contract of DeepGEMM's MQA logits, in its compressed form.
    """
    q, k = ragged_arguments(q, k, k_scale, weights, row_starts, row_ends)
    rows, heads, head_dim = q.shape
    device = q.device
    inputs = (("q", q), ("k", k), ("k_scale", k_scale), ("weights", weights),
              ("row_starts", row_starts), ("row_ends", row_ends))  # fmt: skip
    out = new_result(out, rows, k.shape[0], dtype, device, inputs)
    if rows and out.shape[1]:
        call = Call(
            "ragged_logits", device, out.dtype, head_dim=head_dim, heads=heads,
            alignment=alignment(k, q),
        )  # fmt: skip
        run = resolve(call, backend, has_keys=k.shape[0] > 0)
        run(q, k, k_scale, weights, row_starts, row_ends, out, one_request)
    return out


@op(_new_indices, outputs=("out", "out_raw", "logits"))
def select(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    k: int,
    *,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    out_raw: torch.Tensor | None = None,
    sort: bool = False,
    logits: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score the keys of every request's pages and select the ``k`` best: the chain of decode.

    The answer is that of :func:`dsv4_plugin.topk` on :func:`paged_logits`, with the promises of
    both: without ``sort`` the columns ascend. No column past ``block_table`` is selected. The op
    checks all arguments before it computes anything.

    Args:
        q: the queries, as :func:`paged_logits` takes them.
        cache: the indexer cache, as :func:`paged_logits` takes it.
        weights: the heads' weights, as :func:`paged_logits` takes them.
        lengths: the keys that each row sees, as :func:`paged_logits` takes them.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride.
        k: 1 … 2048.
        block_size: keys per page of ``cache``.
        dtype: the dtype of the scores that the op selects on: bfloat16, float16 or float32; ignored
            when ``logits`` is given.
        page_table: as in :func:`dsv4_plugin.topk`; may be ``block_table``.
        page_size: columns per page of ``page_table``.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_raw: ``[rows, k]`` int32, to fill with the indices when ``page_table`` is given.
        sort: sort by value. A row no longer than ``k`` keeps the order of its columns.
        logits: scratch for the scores, as ``out`` of :func:`paged_logits`. The op selects on its
            dtype, and rows are clipped to its columns. Its content afterwards is unspecified.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.
    """
    # No length may reach past the table, which has no key there that could be selected.
    scores, score, scored = _prepare_paged(
        q, cache, weights, lengths, block_table, block_size, dtype, logits, backend,
        table_only=True,
    )  # fmt: skip
    args = TopkArgs(
        scores, lengths, indices(scores, k) if out is None else out, out_raw, None, page_table, k,
        q.shape[1] if q.dim() == 4 else 1, page_size, sort, None,
    )  # fmt: skip
    pick = prepare(args, out, backend)
    # The checks that neither part makes, because each concerns arguments of both.
    checks.separate((("logits", logits),), (("page_table", page_table),))
    checks.separate(
        (("out", out), ("out_raw", out_raw)),
        (("q", q), ("cache", cache), ("weights", weights), ("block_table", block_table)),
    )
    score(*scored)
    pick(args)
    return args.out


def _nothing(*_: object) -> None:
    """Run in place of an implementation if there is no row or no column."""


def paged_arguments(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of all ops on paged keys; return ``q``, pages, lengths for the kernels.

    ``q`` is uint8 or bfloat16 ``[batch, next_n, heads, head_dim]``, pages are ``[pages, bytes]``.
    """
    q = checks.queries(q, (3, 4), (*checks.E4M3_DTYPES, torch.bfloat16))
    batch, next_n, heads, head_dim = q.shape
    rows, device = batch * next_n, q.device
    fp4 = reads_fp4(q)
    checks.geometry(block_size, head_dim, 32 if fp4 else 4)
    pages = checks.as_pages(cache, block_size, sum(reference_logits.key_bytes(q)))
    checks.on_device("cache", cache, device, "q")
    checks.head_weights(weights, rows, heads, device, torch.bfloat16 if fp4 else torch.float32)
    checks.lengths_for(lengths, rows, next_n, device, "q")
    if lengths.dim() == 2 and lengths.shape[1] == 1:
        lengths = lengths.squeeze(1)
    checks.table("block_table", block_table, batch, 1, device, "q")
    return q, pages, lengths


def ragged_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments that all ops on gathered keys take; return ``q`` and ``k`` as uint8."""
    q = checks.queries(q, (3,)).squeeze(1)
    rows, heads, head_dim = q.shape
    checks.positive("head_dim", head_dim)
    k = checks.keys(k, k_scale, head_dim, q.device)
    checks.head_weights(weights, rows, heads, q.device)
    checks.bounds("row_starts", row_starts, rows, q.device)
    checks.bounds("row_ends", row_ends, rows, q.device)
    return q, k


def new_result(
    out: torch.Tensor | None,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    inputs: tuple[tuple[str, torch.Tensor], ...] = (),
) -> torch.Tensor:
    """Return ``out``, checked, or a new tensor."""
    if out is None:
        checks.dtype_in("dtype", dtype, checks.LOGITS_DTYPES)
        return new_logits(rows, columns, dtype, device)
    checks.tensor("out", out, checks.LOGITS_DTYPES, (2,))
    checks.out_matrix("out", out, (rows, out.shape[1]), checks.LOGITS_DTYPES, device, "q")
    checks.separate((("out", out),), inputs)
    return out
