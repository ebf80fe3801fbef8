"""The public ops of two-level selection: blocks of keys first, then keys of the chosen blocks.

DeepSeek-V4.1 chooses a row's *candidate blocks* once, in one layer. Its other layers score and
select only among the keys of those blocks. A block is ``piece`` keys: block ``b`` of a row is its
keys ``piece · b … piece · b + piece - 1``. A row sees its first ``length`` keys. So its newest
block is block ``(length - 1) // piece``, and only that block may be partly visible.

    block_maxima ─► select_blocks ─► candidates ─► candidate_logits ─► select_candidates ─► indices
                                                   └────────── candidate_select ──────────┘

**Candidates** are int32 ``[rows, K]``: first a row's blocks in ascending order, each one visible to
the row, then -1. :func:`select_blocks` writes them in this form, and the promises below hold for
it. For any other content, uninitialised memory included, the ops promise only two things. They
touch no memory outside the arguments, and every position in a result is -1 or a key that the row
sees.

The layout of the cache is described in :mod:`dsv4_plugin.ops.cache`. Scores and the forms of
``lengths`` are described in :mod:`dsv4_plugin.ops.logits`.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.kernels.arguments import reads_fp4
from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.ops import checks
from dsv4_plugin.ops.dispatch import Call, resolve
from dsv4_plugin.ops.logits import (
    new_logits,
    new_result,
    paged_arguments,
    ragged_arguments,
    rows_of,
)
from dsv4_plugin.ops.topk import indices
from dsv4_plugin.ops.torch_library import op

__all__ = [
    "block_maxima", "candidate_logits", "candidate_logits_ragged", "candidate_select",
    "select_blocks", "select_candidates",
]  # fmt: skip


def _new_maxima(
    q: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    piece: int,
    dtype: torch.dtype,
    logits: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    checks.size("block_size", block_size)
    checks.size("piece", piece)
    blocks = (block_table.shape[1] * block_size + piece - 1) // piece
    return new_logits(rows_of(q), blocks, dtype if logits is None else logits.dtype, q.device)


def _new_scores(candidates: torch.Tensor, piece: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    checks.size("piece", piece)
    rows, held = candidates.shape
    return new_logits(rows, held * piece, dtype, candidates.device)


def _new_blocks(maxima: torch.Tensor, k: int, **_: Any) -> torch.Tensor:
    return indices(maxima, k)


def _new_chosen(candidates: torch.Tensor, k: int, **_: Any) -> torch.Tensor:
    return indices(candidates, k)


@op(_new_maxima, outputs=("out", "logits"))
def block_maxima(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int = 64,
    piece: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score every block of keys by its best key; on request return every key's score, in one pass.

    * **the score of a block**: the largest score among its keys that the row sees. Each key's score
      is that of :func:`dsv4_plugin.paged_logits`, rounded to the dtype before the comparison. Two
      kinds of block score ``inf``, so that they are always selected: a block with a NaN among these
      scores, and the row's newest block. Of zeros of both signs the largest is ``0.0``. ``-inf`` is
      a number like any other; a key without a page scores ``-inf``.
    * **what is written**: the first ``ceil(length / piece)`` columns of a row in ``out``, and the
      first ``length`` columns in ``logits``. Columns past these are not written.
    * **what is read**, **independence**: the promises of :func:`dsv4_plugin.paged_logits`.

    Args:
        q: the queries, as :func:`dsv4_plugin.paged_logits` takes them.
        cache: the indexer cache, as :func:`dsv4_plugin.paged_logits` takes it.
        weights: the heads' weights, as :func:`dsv4_plugin.paged_logits` takes them.
        lengths: the keys that each row sees, as :func:`dsv4_plugin.paged_logits` takes them.
            Clipped to what the columns of ``out`` and of ``logits`` have room for. A key that
            ``block_table`` has no page for scores ``-inf``.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride.
        block_size: keys per page.
        piece: keys per block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` or ``logits`` is given.
        out: ``[rows, blocks]`` to fill, of such a dtype, unit inner stride, any row stride.
        logits: ``[rows, columns]`` of the same dtype, to fill with the keys' scores, bit for bit
            those of :func:`dsv4_plugin.paged_logits`; unit inner stride, any row stride.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, ceil(pages · block_size / piece)]`` tensor whose rows start at
        multiples of 16 bytes, uninitialised past a row's blocks.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's ``select_candidate_blocks`` (0.31 and later), apart from the order of ties.
    """
    checks.size("piece", piece)
    q, pages, lengths = paged_arguments(q, cache, weights, lengths, block_table, block_size)
    batch, next_n, heads, head_dim = q.shape
    rows, columns = batch * next_n, block_table.shape[1] * block_size
    if logits is not None:
        shape = (rows, logits.shape[-1]) if isinstance(logits, torch.Tensor) else (rows, 0)
        checks.out_matrix("logits", logits, shape, checks.LOGITS_DTYPES, q.device, "q")
        dtype = logits.dtype
    inputs = (("q", q), ("cache", cache), ("weights", weights), ("lengths", lengths),
              ("block_table", block_table))  # fmt: skip
    given = out
    out = new_result(out, rows, -(-columns // piece), dtype, q.device)
    checks.scores_dtype("out", out.dtype, q)
    checks.separate((("out", given), ("logits", logits)), inputs)
    if logits is not None and out.dtype != logits.dtype:
        raise ValueError(f"logits must be of the dtype of out ({out.dtype}), got {logits.dtype}")
    if rows and out.shape[1] and (logits is None or logits.shape[1]):
        call = Call(
            "block_maxima", q.device, out.dtype, head_dim=head_dim, heads=heads,
            block_size=block_size, piece=piece, fp4=reads_fp4(q), alignment=alignment(pages, q),
        )  # fmt: skip
        run = resolve(call, backend, has_keys=pages.shape[0] > 0)
        run(q, pages, weights, lengths, block_table, out, logits, block_size, piece)
    return out


@op(_new_blocks, outputs=("out", "out_counts"))
def select_blocks(
    maxima: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    piece: int = 8,
    next_n: int = 1,
    out: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Select the ``k`` best blocks of every row: its candidates.

    The result is that of :func:`dsv4_plugin.topk` on ``maxima`` with ``ceil(length / piece)`` as
    lengths, with the same promises for set, NaN, infinities, short rows and independence. In
    addition:

    * **ties**: the lowest block wins.
    * **order**: ascending, -1 after the last.

    Args:
        maxima: ``[rows, blocks]`` float32, bfloat16 or float16, as :func:`block_maxima` writes
            them; unit inner stride, any row stride.
        lengths: int32 or int64 **keys** (not blocks) that each row sees: ``[rows]`` or ``[batch,
            next_n]``, or one per request, ``[batch]`` or ``[batch, 1]``, by the rule of
            :func:`dsv4_plugin.topk`. The number of blocks is clipped to the columns of ``maxima``.
        k: 1 … 2048.
        piece: keys per block.
        next_n: rows per request.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_counts: ``[rows]`` int32, contiguous, to fill with the number of blocks of each row.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's ``select_candidate_blocks`` (0.31 and later), which leaves ties and order open.
    """
    rows = checks.scores("maxima", maxima).shape[0]
    checks.size("k", k)
    checks.size("piece", piece)
    checks.size("next_n", next_n)
    checks.lengths_for(lengths, rows, next_n, maxima.device, "maxima")
    given = out
    if out is None:
        out = indices(maxima, k)
    else:
        checks.out_matrix("out", out, (rows, k), (torch.int32,), maxima.device, "maxima")
    if out_counts is not None:
        checks.out_vector("out_counts", out_counts, rows, maxima.device, "maxima")
    checks.separate(
        (("out", given), ("out_counts", out_counts)), (("maxima", maxima), ("lengths", lengths))
    )
    if rows:
        run = resolve(Call("select_blocks", maxima.device, maxima.dtype, k, piece=piece), backend)
        run(maxima, lengths, out, out_counts, k, next_n, piece)
    return out


@op(_new_scores, outputs=("out", "out_lengths"))
def candidate_logits(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_size: int = 64,
    piece: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    out_lengths: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score the keys of every row's candidates: the logits of decode among candidates.

    Column ``c`` of row ``r`` is the row's key ``candidates[r, c // piece] · piece + c % piece``.

    * **what is written**: every column. A column gets ``-inf`` if it has no candidate (below zero),
      if the row does not see the key, or if the key's page is missing (below zero, or past the end
      of the cache or of ``block_table``). With ``out_lengths`` the columns at and past a row's
      count may be left unwritten.
    * **scores**: bit for bit those of :func:`dsv4_plugin.paged_logits`, NaN included.
    * **candidates in any order**: served, with duplicates and holes too, as long as ``out_lengths``
      is not given.
    * **independence**: as :func:`dsv4_plugin.paged_logits` promises it.

    Args:
        q: the queries, as :func:`dsv4_plugin.paged_logits` takes them.
        cache: the indexer cache, as :func:`dsv4_plugin.paged_logits` takes it.
        weights: the heads' weights, as :func:`dsv4_plugin.paged_logits` takes them.
        candidates: ``[rows, K]`` int32, K at least 1, unit inner stride, any row stride; see the
            module's documentation.
        lengths: the keys that each row sees, as :func:`dsv4_plugin.paged_logits` takes them;
            clipped to ``block_table``.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride.
        block_size: keys per page.
        piece: keys per block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` is given.
        out: ``[rows, K · piece]`` to fill, of such a dtype, unit inner stride, any row stride.
        out_lengths: ``[rows]`` int32, contiguous, to fill with the number of candidate columns that
            each row sees; these are the row's first columns. With ``count`` candidates it is
            ``piece · (count - 1)`` plus the keys that the row sees of the last one; without
            candidates it is 0. For candidates in another order it is some number from 0 to ``K ·
            piece``.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, K · piece]`` tensor whose rows start at multiples of 16 bytes.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's dense logits with ``apply_candidate_mask``, without the masked columns.
    """
    checks.size("piece", piece)
    q, pages, lengths = paged_arguments(q, cache, weights, lengths, block_table, block_size)
    batch, next_n, heads, head_dim = q.shape
    rows = batch * next_n
    checks.candidates(candidates, rows, q.device, "q")
    inputs = (("q", q), ("cache", cache), ("weights", weights), ("candidates", candidates),
              ("lengths", lengths), ("block_table", block_table))  # fmt: skip
    out = _scores_out(out, out_lengths, candidates, piece, dtype, inputs)
    checks.scores_dtype("out", out.dtype, q)
    if rows:
        call = Call(
            "candidate_logits", q.device, out.dtype, head_dim=head_dim, heads=heads,
            block_size=block_size, piece=piece, candidates=candidates.shape[1], fp4=reads_fp4(q),
            alignment=alignment(pages, q),
        )  # fmt: skip
        has_keys = pages.shape[0] > 0 and block_table.shape[1] > 0
        resolve(call, backend, has_keys=has_keys)(
            q, pages, weights, candidates, lengths, block_table, out, out_lengths, block_size, piece
        )
    return out


@op(_new_scores, outputs=("out", "out_lengths"))
def candidate_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    piece: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    out_lengths: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score candidates among gathered keys: :func:`candidate_logits` for prefill.

    Key ``i`` of row ``r`` is ``k[row_starts[r] + i]``, and the row sees ``row_ends[r] -
    row_starts[r]`` keys. Blocks count from the row's first key. Scores are bit for bit those of
    :func:`dsv4_plugin.ragged_logits`. The other promises are those of :func:`candidate_logits`.

    Args:
        q: the queries, as :func:`dsv4_plugin.ragged_logits` takes them.
        k: the gathered keys, as :func:`dsv4_plugin.ragged_logits` takes them.
        k_scale: the keys' scales, as :func:`dsv4_plugin.ragged_logits` takes them.
        weights: the heads' weights, as :func:`dsv4_plugin.ragged_logits` takes them.
        candidates: ``[rows, K]`` int32, as :func:`candidate_logits` takes them.
        row_starts: ``[rows]`` int32 or int64, the row's first key. Below zero: an empty row.
        row_ends: ``[rows]`` int32 or int64, one past the row's last key. Clipped to ``keys``; at or
            below the start: an empty row.
        piece: keys per block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` is given.
        out: the result, as :func:`candidate_logits` takes it.
        out_lengths: the columns that each row sees, as :func:`candidate_logits` writes them.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, K · piece]`` tensor whose rows start at multiples of 16 bytes.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's dense logits of prefill with ``apply_candidate_mask``.
    """
    checks.size("piece", piece)
    q, k = ragged_arguments(q, k, k_scale, weights, row_starts, row_ends)
    rows, heads, head_dim = q.shape
    checks.candidates(candidates, rows, q.device, "q")
    inputs = (("q", q), ("k", k), ("k_scale", k_scale), ("weights", weights),
              ("candidates", candidates), ("row_starts", row_starts),
              ("row_ends", row_ends))  # fmt: skip
    out = _scores_out(out, out_lengths, candidates, piece, dtype, inputs)
    if rows:
        call = Call(
            "candidate_logits_ragged", q.device, out.dtype, head_dim=head_dim, heads=heads,
            piece=piece, candidates=candidates.shape[1], alignment=alignment(k, q),
        )  # fmt: skip
        run = resolve(call, backend, has_keys=k.shape[0] > 0)
        run(q, k, k_scale, weights, candidates, row_starts, row_ends, out, out_lengths, piece)
    return out


@op(indices, outputs=("out", "out_slots", "out_counts"))
def select_candidates(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    piece: int = 8,
    next_n: int = 1,
    out: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    page_size: int = 64,
    out_slots: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Select the ``k`` best keys of every row's candidates, as positions within the request.

    The op selects what :func:`dsv4_plugin.topk` selects on the columns of ``logits`` that the row
    sees (the ``out_lengths`` of :func:`candidate_logits`). It then writes column ``c`` as its key's
    position, ``candidates[r, c // piece] · piece + c % piece``. The promises of
    :func:`dsv4_plugin.topk` for set, NaN, infinities and independence hold. In addition:

    * **ties**: the lowest column wins, which is the lowest position.
    * **order**: ascending, -1 after the last. A row that sees at most ``k`` columns gets all of
      them, whatever their scores.
    * **the best of all keys**: if ``candidates`` are at least the ``k + 1`` best blocks of
      :func:`select_blocks` on scores of the same dtype, the result is that of
      :func:`dsv4_plugin.topk` on all keys of the row, ties included, as long as no score is NaN.

    Args:
        logits: ``[rows, K · piece]`` float32, bfloat16 or float16, as :func:`candidate_logits`
            writes them; unit inner stride, any row stride.
        candidates: ``[rows, K]`` int32, the same that :func:`candidate_logits` took.
        lengths: int32 or int64 **keys** that each row sees, in the forms of :func:`select_blocks`.
        k: 1 … 2048.
        piece: keys per block.
        next_n: rows per request.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        block_table: ``[rows, pages]`` or ``[batch, pages]`` int32 page numbers, unit inner stride;
            read for ``out_slots``.
        page_size: keys per page of ``block_table``.
        out_slots: ``[rows, k]`` int32, to fill with pool slots in the order of ``out``: position
            ``i`` gives ``block_table[r, i // page_size] · page_size + i % page_size``. It is -1 if
            there is no index, if the page is below zero or not in the table, or if the slot does
            not fit in int32.
        out_counts: ``[rows]`` int32, contiguous, to fill with the number of indices of each row:
            the columns that it sees, at most ``k``.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: the top-k that vLLM runs on rows masked by ``apply_candidate_mask``.
    """
    rows, columns = checks.scores("logits", logits).shape
    device = logits.device
    checks.size("k", k)
    checks.size("piece", piece)
    checks.size("next_n", next_n)
    checks.size("page_size", page_size)
    checks.candidates(candidates, rows, device, "logits")
    if columns != candidates.shape[1] * piece:
        raise ValueError(
            f"logits must have {candidates.shape[1]} · {piece} columns, piece for each of "
            f"candidates, got {columns}"
        )
    checks.lengths_for(lengths, rows, next_n, device)
    inputs = ("logits", logits), ("candidates", candidates), ("lengths", lengths)
    out = _chosen(
        "logits", logits, k, out, out_slots, out_counts, "block_table", block_table, next_n, inputs
    )
    if rows:
        held = candidates.shape[1]
        call = Call("select_candidates", device, logits.dtype, k, piece=piece, candidates=held)
        resolve(call, backend)(
            logits, candidates, lengths, out, out_slots, out_counts, block_table, k, next_n,
            page_size, piece,
        )  # fmt: skip
    return out


@op(_new_chosen, outputs=("out", "out_slots", "out_counts"))
def candidate_select(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    k: int,
    *,
    block_size: int = 64,
    piece: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    out_slots: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Score the keys of every row's candidates and select the ``k`` best: a layer's work in decode.

    The result is that of :func:`select_candidates` on :func:`candidate_logits`, with the promises
    of both, and it is ready sooner: with few rows the selection reads lengths and candidates while
    the scores are still being computed. The op checks all arguments before it computes anything.

    Args:
        q: the queries, as :func:`dsv4_plugin.paged_logits` takes them.
        cache: the indexer cache, as :func:`dsv4_plugin.paged_logits` takes it.
        weights: the heads' weights, as :func:`dsv4_plugin.paged_logits` takes them.
        candidates: ``[rows, K]`` int32, as :func:`candidate_logits` takes them.
        lengths: the keys that each row sees, as :func:`candidate_logits` takes them.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride.
        k: 1 … 2048.
        block_size: keys per page of ``cache``.
        piece: keys per block.
        dtype: the dtype of the scores that the op selects on: bfloat16, float16 or float32.
        page_table: ``[rows, pages]`` or ``[batch, pages]`` int32 page numbers for ``out_slots``, as
            the ``block_table`` of :func:`select_candidates`; it may be the same tensor as
            ``block_table``.
        page_size: keys per page of ``page_table``.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_slots: ``[rows, k]`` int32, to fill as :func:`select_candidates` does.
        out_counts: ``[rows]`` int32, to fill as :func:`select_candidates` does.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's dense logits, ``apply_candidate_mask`` and top-k of a layer with candidates.
    """
    checks.size("k", k)
    checks.size("piece", piece)
    checks.size("page_size", page_size)
    checks.dtype_in("dtype", dtype, checks.LOGITS_DTYPES)
    q, pages, lengths = paged_arguments(q, cache, weights, lengths, block_table, block_size)
    checks.scores_dtype("dtype", dtype, q)
    batch, next_n, heads, head_dim = q.shape
    checks.candidates(candidates, batch * next_n, q.device, "q")
    inputs = (("q", q), ("cache", cache), ("weights", weights), ("candidates", candidates),
              ("lengths", lengths), ("block_table", block_table))  # fmt: skip
    out = _chosen(
        "q", candidates, k, out, out_slots, out_counts, "page_table", page_table, next_n, inputs
    )
    if batch * next_n:
        call = Call(
            "candidate_select", q.device, dtype, k, head_dim=head_dim, heads=heads,
            block_size=block_size, piece=piece, candidates=candidates.shape[1], fp4=reads_fp4(q),
            alignment=alignment(pages, q),
        )  # fmt: skip
        has_keys = pages.shape[0] > 0 and block_table.shape[1] > 0
        run = resolve(call, backend, has_keys=has_keys)
        run(
            q, pages, weights, candidates, lengths, block_table,
            _new_scores(candidates, piece, dtype), out, out_slots, out_counts, page_table, k,
            block_size, page_size, piece,
        )  # fmt: skip
    return out


def _chosen(
    owner: str,
    rows_of_it: torch.Tensor,
    k: int,
    out: torch.Tensor | None,
    out_slots: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    table_name: str,
    table: torch.Tensor | None,
    next_n: int,
    inputs: tuple[tuple[str, torch.Tensor], ...],
) -> torch.Tensor:
    """Check the outputs of a selection and the table of their slots; return ``out`` or a new one.

    ``rows_of_it`` has one row for each row of the result. It is on the device of ``owner``.
    """
    rows, device = rows_of_it.shape[0], rows_of_it.device
    if table is not None:
        checks.table(table_name, table, rows, next_n, device)
    elif out_slots is not None:
        raise ValueError(f"out_slots needs {table_name}, which has the pages of the slots")
    for name, given in (("out", out), ("out_slots", out_slots)):
        if given is not None:
            checks.out_matrix(name, given, (rows, k), (torch.int32,), device, owner)
    if out_counts is not None:
        checks.out_vector("out_counts", out_counts, rows, device, owner)
    checks.separate(
        (("out", out), ("out_slots", out_slots), ("out_counts", out_counts)),
        (*inputs, (table_name, table)),
    )
    return indices(rows_of_it, k) if out is None else out


def _scores_out(
    out: torch.Tensor | None,
    out_lengths: torch.Tensor | None,
    candidates: torch.Tensor,
    piece: int,
    dtype: torch.dtype,
    inputs: tuple[tuple[str, torch.Tensor], ...],
) -> torch.Tensor:
    """Return ``out``, checked, or a new tensor; check ``out_lengths``."""
    rows, columns = candidates.shape[0], candidates.shape[1] * piece
    device = candidates.device
    if out is not None:
        checks.out_matrix("out", out, (rows, columns), checks.LOGITS_DTYPES, device, "q")
    if out_lengths is not None:
        checks.out_vector("out_lengths", out_lengths, rows, device, "q")
    checks.separate((("out", out), ("out_lengths", out_lengths)), inputs)
    return new_result(out, rows, columns, dtype, device)
