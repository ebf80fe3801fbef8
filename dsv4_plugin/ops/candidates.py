"""The public ops of two-level selection: blocks of keys first, then keys of the chosen blocks.

DeepSeek-V4.1 chooses a row's *candidate blocks* once, in one layer; its other layers score and
select among the keys of those blocks only. A block is ``piece`` keys: block ``b`` of a row is its
keys ``piece · b … piece · b + piece - 1``. A row sees its first ``length`` keys, so its newest
block is block ``(length - 1) // piece``, the only one that it may see in part.

    block_maxima ─► select_blocks ─► candidates ─► candidate_logits ─► select_candidates ─► indices

**Candidates** are int32 ``[rows, K]``: a row's blocks in ascending order, each one that the row
sees, then -1. :func:`select_blocks` writes them so, and the promises below are for such candidates.
Of any other content, uninitialised memory included, one thing is promised: no memory outside of
the arguments is touched, and every position that comes out is -1 or a key that the row sees.

The layout of the cache is as in :mod:`dsv4_plugin.ops.cache`, scores and the forms of ``lengths``
as in :mod:`dsv4_plugin.ops.logits`.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.kernels import reference_candidates
from dsv4_plugin.kernels.arguments import reads_fp4
from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.ops import checks, torch_library
from dsv4_plugin.ops.dispatch import Call, resolve
from dsv4_plugin.ops.logits import new_logits, new_result, paged_arguments, ragged_arguments
from dsv4_plugin.ops.topk import indices

__all__ = [
    "block_maxima",
    "candidate_logits",
    "candidate_logits_ragged",
    "select_blocks",
    "select_candidates",
]


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
    """Score every block of keys by its best key, and on request every key, in one pass.

    * **the score of a block**: the largest score of its keys that the row sees, as
      :func:`dsv4_plugin.paged_logits` gives them: rounded to the dtype first. A block with a NaN
      among them and the row's newest block score ``inf``, so that they are always selected. Of
      zeros of both signs the largest is ``0.0``. ``-inf`` is a number like any other; keys whose
      page is missing score it.
    * **what is written**: a row's ``ceil(length / piece)`` first columns of ``out``, and its
      ``length`` first columns of ``logits``. Nothing past that.
    * **what is read**, **independence**: as in :func:`dsv4_plugin.paged_logits`.

    Args:
        q: as in :func:`dsv4_plugin.paged_logits`.
        cache: as there.
        weights: as there.
        lengths: as there: the keys that each row sees. Clipped to what the columns of ``out`` and
            of ``logits`` have room for; keys that ``block_table`` has no page for score ``-inf``.
        block_table: as there.
        block_size: keys a page.
        piece: keys a block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` or ``logits`` is given.
        out: ``[rows, blocks]`` to fill, of such a dtype, unit inner stride, any row stride.
        logits: ``[rows, columns]`` of the same dtype that gets the keys' scores, bit for bit those
            of :func:`dsv4_plugin.paged_logits`; unit inner stride, any row stride.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, ceil(pages · block_size / piece)]`` tensor whose rows start at
        multiples of 16 bytes, uninitialised past a row's blocks.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's ``select_candidate_blocks`` (0.31 and later), up to its order of ties.
    """
    if torch_library.through_dispatcher(q, cache, weights, lengths, block_table, out, logits):
        dtype = dtype if logits is None else logits.dtype
        if out is None and logits is None:
            return torch_library.functional("block_maxima")(
                q, cache, weights, lengths, block_table, block_size, piece, dtype, backend
            )
        if out is None:
            out = _new_maxima(q, block_table, block_size, piece, dtype)
        torch_library.mutating("block_maxima")(
            q, cache, weights, lengths, block_table, out, logits, block_size, piece, backend
        )
        return out
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
        run = resolve(call, backend)
        if pages.shape[0] == 0:  # no page that a kernel could be pointed at
            run = reference_candidates.block_maxima
        run(q, pages, weights, lengths, block_table, out, logits, next_n, block_size, piece)
    return out


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

    What :func:`dsv4_plugin.topk` selects on ``maxima`` with ``ceil(length / piece)`` as lengths,
    with its promises for set, NaN, infinities, short rows and independence; and

    * **ties**: the lowest block wins.
    * **order**: ascending, -1 after the last.

    Args:
        maxima: ``[rows, blocks]`` float32, bfloat16 or float16, as :func:`block_maxima` writes
            them; unit inner stride, any row stride.
        lengths: int32 or int64 **keys** that each row sees: ``[rows]`` or ``[batch, next_n]``, or
            one a request, ``[batch]`` or ``[batch, 1]``, by the rule of :func:`dsv4_plugin.topk`.
            Their blocks are clipped to the columns of ``maxima``.
        k: 1 … 2048.
        piece: keys a block.
        next_n: rows a request has.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_counts: ``[rows]`` int32, contiguous, that gets how many blocks each row has.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's ``select_candidate_blocks`` (0.31 and later), which leaves ties and order open.
    """
    if torch_library.through_dispatcher(maxima, lengths, out, out_counts):
        if out is None and out_counts is None:
            return torch_library.functional("select_blocks")(
                maxima, lengths, k, piece, next_n, backend
            )
        if out is None:
            out = indices(maxima, k)
        torch_library.mutating("select_blocks")(
            maxima, lengths, out, out_counts, k, piece, next_n, backend
        )
        return out
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
    """Score the keys of every row's candidates: the logits of decode where others chose blocks.

    Column ``c`` of row ``r`` is the row's key ``candidates[r, c // piece] · piece + c % piece``.

    * **what is written**: every column. ``-inf`` where there is no candidate (below zero), where
      the row does not see the key, and where the key's page is missing: below zero, or past the
      end of the cache or of ``block_table``. With ``out_lengths`` the columns at and past a row's
      count may be left unwritten.
    * **scores**: bit for bit those of :func:`dsv4_plugin.paged_logits`, NaN included.
    * **candidates in any order** are served, duplicates and holes too, as long as ``out_lengths``
      is not given.
    * **independence**: as in :func:`dsv4_plugin.paged_logits`.

    Args:
        q: as in :func:`dsv4_plugin.paged_logits`.
        cache: as there.
        weights: as there.
        candidates: ``[rows, K]`` int32, K at least 1, unit inner stride, any row stride; see the
            module's documentation.
        lengths: as in :func:`dsv4_plugin.paged_logits`; clipped to ``block_table``.
        block_table: as there.
        block_size: keys a page.
        piece: keys a block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` is given.
        out: ``[rows, K · piece]`` to fill, of such a dtype, unit inner stride, any row stride.
        out_lengths: ``[rows]`` int32, contiguous, that gets how many columns of its candidates
            each row sees: with ``count`` candidates ``piece · (count - 1)`` and the keys that the
            row sees of the last one; 0 without candidates. They are the row's first columns. For
            candidates in another order: some number from 0 to ``K · piece``.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, K · piece]`` tensor whose rows start at multiples of 16 bytes.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's dense logits with ``apply_candidate_mask``, without the columns that it masks.
    """
    tensors = (q, cache, weights, candidates, lengths, block_table, out, out_lengths)
    if torch_library.through_dispatcher(*tensors):
        if out is None and out_lengths is None:
            return torch_library.functional("candidate_logits")(
                q, cache, weights, candidates, lengths, block_table, block_size, piece, dtype,
                backend,
            )  # fmt: skip
        if out is None:
            out = _new_scores(candidates, piece, dtype)
        torch_library.mutating("candidate_logits")(
            q, cache, weights, candidates, lengths, block_table, out, out_lengths, block_size,
            piece, backend,
        )  # fmt: skip
        return out
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
        run = resolve(call, backend)
        if pages.shape[0] == 0 or block_table.shape[1] == 0:
            run = reference_candidates.candidate_logits  # no page that a kernel could be pointed at
        run(
            q, pages, weights, candidates, lengths, block_table, out, out_lengths, next_n,
            block_size, piece,
        )  # fmt: skip
    return out


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
    :func:`dsv4_plugin.ragged_logits`; all else is as in :func:`candidate_logits`.

    Args:
        q: as in :func:`dsv4_plugin.ragged_logits`.
        k: as there.
        k_scale: as there.
        weights: as there.
        candidates: as in :func:`candidate_logits`.
        row_starts: ``[rows]`` int32 or int64, the row's first key. Below zero: an empty row.
        row_ends: ``[rows]`` int32 or int64, one past the row's last key. Clipped to ``keys``; at or
            below the start: an empty row.
        piece: keys a block.
        dtype: bfloat16, float16 or float32; ignored when ``out`` is given.
        out: as in :func:`candidate_logits`.
        out_lengths: as there.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, K · piece]`` tensor whose rows start at multiples of 16 bytes.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM's dense logits of prefill with ``apply_candidate_mask``.
    """
    tensors = (q, k, k_scale, weights, candidates, row_starts, row_ends, out, out_lengths)
    if torch_library.through_dispatcher(*tensors):
        if out is None and out_lengths is None:
            return torch_library.functional("candidate_logits_ragged")(
                q, k, k_scale, weights, candidates, row_starts, row_ends, piece, dtype, backend
            )
        if out is None:
            out = _new_scores(candidates, piece, dtype)
        torch_library.mutating("candidate_logits_ragged")(
            q, k, k_scale, weights, candidates, row_starts, row_ends, out, out_lengths, piece,
            backend,
        )  # fmt: skip
        return out
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
        run = resolve(call, backend)
        if k.shape[0] == 0:  # no key that a kernel could be pointed at
            run = reference_candidates.candidate_logits_ragged
        run(q, k, k_scale, weights, candidates, row_starts, row_ends, out, out_lengths, piece)
    return out


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

    What :func:`dsv4_plugin.topk` selects on the columns of ``logits`` that the row sees, the
    ``out_lengths`` of :func:`candidate_logits`; column ``c`` is then written as its key's position,
    ``candidates[r, c // piece] · piece + c % piece``. With its promises for set, NaN, infinities
    and independence; and

    * **ties**: the lowest column wins, which is the lowest position.
    * **order**: ascending, -1 after the last. A row that sees no more than ``k`` columns has all
      of them, without the scores mattering.
    * **of all keys**: where ``candidates`` are the best ``k + 1`` blocks or more of
      :func:`select_blocks` on scores of the same dtype, the answer is that of
      :func:`dsv4_plugin.topk` on all keys of the row, ties included, as long as no score is NaN.

    Args:
        logits: ``[rows, K · piece]`` float32, bfloat16 or float16, as :func:`candidate_logits`
            writes them; unit inner stride, any row stride.
        candidates: ``[rows, K]`` int32, as :func:`candidate_logits` had them.
        lengths: int32 or int64 **keys** that each row sees, in the forms of :func:`select_blocks`.
        k: 1 … 2048.
        piece: keys a block.
        next_n: rows a request has.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        block_table: ``[rows, pages]`` or ``[batch, pages]`` int32 page numbers, unit inner stride;
            read for ``out_slots``.
        page_size: keys a page of ``block_table``.
        out_slots: ``[rows, k]`` int32 that gets pool slots, in the order of ``out``:
            ``block_table[r, i // page_size] · page_size + i % page_size`` of position ``i``; -1
            where there is no index, the page is below zero or not in the table, or the slot is
            more than int32 holds.
        out_counts: ``[rows]`` int32, contiguous, that gets how many indices each row has: the
            columns that it sees, at most ``k``.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: the top-k that vLLM runs over rows masked by ``apply_candidate_mask``.
    """
    tensors = (logits, candidates, lengths, out, block_table, out_slots, out_counts)
    if torch_library.through_dispatcher(*tensors):
        if out is None and out_slots is None and out_counts is None:
            return torch_library.functional("select_candidates")(
                logits, candidates, lengths, k, piece, next_n, block_table, page_size, backend
            )
        if out is None:
            out = indices(logits, k)
        torch_library.mutating("select_candidates")(
            logits, candidates, lengths, out, out_slots, out_counts, block_table, k, piece, next_n,
            page_size, backend,
        )  # fmt: skip
        return out
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
    if block_table is not None:
        checks.table("block_table", block_table, rows, next_n, device)
    elif out_slots is not None:
        raise ValueError("out_slots needs block_table, which has the pages of the slots")
    shape, given = (rows, k), out
    if out is None:
        out = indices(logits, k)
    else:
        checks.out_matrix("out", out, shape, (torch.int32,), device, "logits")
    if out_slots is not None:
        checks.out_matrix("out_slots", out_slots, shape, (torch.int32,), device, "logits")
    if out_counts is not None:
        checks.out_vector("out_counts", out_counts, rows, device, "logits")
    checks.separate(
        (("out", given), ("out_slots", out_slots), ("out_counts", out_counts)),
        (("logits", logits), ("candidates", candidates), ("lengths", lengths),
         ("block_table", block_table)),
    )  # fmt: skip
    if rows:
        held = candidates.shape[1]
        call = Call("select_candidates", device, logits.dtype, k, piece=piece, candidates=held)
        resolve(call, backend)(
            logits, candidates, lengths, out, out_slots, out_counts, block_table, k, next_n, piece,
            page_size,
        )  # fmt: skip
    return out


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


# ---- torch.ops.dsv4 ------------------------------------------------------------------------------


def _new_maxima(
    q: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int = 64,
    piece: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    **_: Any,
) -> torch.Tensor:
    checks.size("block_size", block_size)
    checks.size("piece", piece)
    rows = q.shape[0] * (q.shape[1] if q.dim() == 4 else 1)
    blocks = (block_table.shape[1] * block_size + piece - 1) // piece
    return new_logits(rows, blocks, dtype, q.device)


def _new_scores(
    candidates: torch.Tensor, piece: int = 8, dtype: torch.dtype = torch.bfloat16, **_: Any
) -> torch.Tensor:
    checks.size("piece", piece)
    rows, held = candidates.shape
    return new_logits(rows, held * piece, dtype, candidates.device)


_PAGED = "Tensor q, Tensor cache, Tensor weights, Tensor lengths, Tensor block_table"
_CANDIDATES = (
    "Tensor q, Tensor cache, Tensor weights, Tensor candidates, Tensor lengths, Tensor block_table"
)
_RAGGED = (
    "Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor candidates, Tensor row_starts, "
    "Tensor row_ends"
)
_NEW = "ScalarType? dtype=None, str? backend=None) -> Tensor"
_FILLED = "str? backend=None) -> ()"
_SELECTION = "int piece=8, int next_n=1, "

torch_library.register(
    f"block_maxima({_PAGED}, int block_size=64, int piece=8, {_NEW}", block_maxima, _new_maxima
)
torch_library.register(
    f"block_maxima_out({_PAGED}, Tensor(a!) out, Tensor(b!)? logits, int block_size=64, "
    f"int piece=8, {_FILLED}",
    block_maxima,
)
torch_library.register(
    f"select_blocks(Tensor maxima, Tensor lengths, int k, {_SELECTION}str? backend=None) -> Tensor",
    select_blocks,
    lambda maxima, k, **_: indices(maxima, k),
)
torch_library.register(
    "select_blocks_out(Tensor maxima, Tensor lengths, Tensor(a!) out, Tensor(b!)? out_counts, "
    f"int k, {_SELECTION}{_FILLED}",
    select_blocks,
)
torch_library.register(
    f"candidate_logits({_CANDIDATES}, int block_size=64, int piece=8, {_NEW}",
    candidate_logits,
    _new_scores,
)
torch_library.register(
    f"candidate_logits_out({_CANDIDATES}, Tensor(a!) out, Tensor(b!)? out_lengths, "
    f"int block_size=64, int piece=8, {_FILLED}",
    candidate_logits,
)
torch_library.register(
    f"candidate_logits_ragged({_RAGGED}, int piece=8, {_NEW}", candidate_logits_ragged, _new_scores
)
torch_library.register(
    f"candidate_logits_ragged_out({_RAGGED}, Tensor(a!) out, Tensor(b!)? out_lengths, "
    f"int piece=8, {_FILLED}",
    candidate_logits_ragged,
)
torch_library.register(
    "select_candidates(Tensor logits, Tensor candidates, Tensor lengths, int k, "
    f"{_SELECTION}Tensor? block_table=None, int page_size=64, str? backend=None) -> Tensor",
    select_candidates,
    lambda logits, k, **_: indices(logits, k),
)
torch_library.register(
    "select_candidates_out(Tensor logits, Tensor candidates, Tensor lengths, Tensor(a!) out, "
    "Tensor(b!)? out_slots, Tensor(c!)? out_counts, Tensor? block_table, int k, "
    f"{_SELECTION}int page_size=64, {_FILLED}",
    select_candidates,
)
