"""The candidate ops in plain torch: the oracle of the tests and the last resort at run time.

Like :mod:`.reference`, it neither synchronises with the host nor has control flow that depends on
data. Scores are those of :mod:`.reference_logits`, bit for bit, since each score depends on its own
key alone. :mod:`dsv4_plugin.ops.candidates` has already checked the arguments.
"""

from __future__ import annotations

import torch

from dsv4_plugin.kernels import reference, reference_logits
from dsv4_plugin.kernels.arguments import MAX_INT32, TopkArgs
from dsv4_plugin.kernels.reference import planes, row_lengths
from dsv4_plugin.kernels.reference_logits import key_bytes, key_scales

__all__ = [
    "block_maxima", "candidate_logits", "candidate_logits_ragged", "candidate_select",
    "select_blocks", "select_candidates",
]  # fmt: skip

# Elements made at a time: scores, or float64 keys and dot products (64 MiB).
_CHUNK = 1 << 23


def block_maxima(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    logits: torch.Tensor | None,
    block_size: int,
    piece: int,
) -> None:
    """Score every block of keys; see :func:`dsv4_plugin.block_maxima`."""
    (batch, next_n), rows = q.shape[:2], out.shape[0]
    columns = out.shape[1] * piece
    if logits is not None:
        columns = min(columns, logits.shape[1])
    blocks = -(-columns // piece)
    n = row_lengths(lengths, rows, next_n).clamp(0, columns)
    step = max(1, _CHUNK // max(1, next_n * columns))
    for lo in range(0, batch, step):
        part = slice(lo, min(lo + step, batch))
        of = slice(part.start * next_n, part.stop * next_n)
        if logits is None:
            scores = out.new_empty(of.stop - of.start, columns)
        else:
            scores = logits[of, :columns]
        reference_logits.paged_logits(
            q[part], pages, weights[of], n[of], block_table[part], scores, block_size
        )
        held = out[of, :blocks]
        held.copy_(_maxima(scores, n[of], held, piece))


def _maxima(scores: torch.Tensor, n: torch.Tensor, held: torch.Tensor, piece: int) -> torch.Tensor:
    """Return the blocks' scores; columns past a row's blocks keep the values of ``held``."""
    blocks = held.shape[1]
    column = torch.arange(scores.shape[1], device=scores.device)
    seen = scores.masked_fill(column >= n[:, None], -torch.inf)
    seen = torch.nn.functional.pad(seen, (0, blocks * piece - scores.shape[1]), value=-torch.inf)
    seen = seen.unflatten(1, (blocks, piece))
    best = seen.amax(2)
    # Of zeros of both signs the maximum is 0.0, whatever the order of comparison.
    zero = ((seen == 0) & ~seen.signbit()).any(2)
    best = best.masked_fill((best == 0) & zero, 0.0)
    block = torch.arange(blocks, device=scores.device)
    newest = block == torch.div(n - 1, piece, rounding_mode="floor")[:, None]
    best = best.masked_fill(best.isnan() | newest, torch.inf)
    return torch.where(block < _blocks(n, piece)[:, None], best, held)


def _blocks(n: torch.Tensor, piece: int) -> torch.Tensor:
    """Return how many blocks hold ``n`` keys."""
    return torch.div(n + piece - 1, piece, rounding_mode="floor")


def select_blocks(
    maxima: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    out_counts: torch.Tensor | None,
    k: int,
    next_n: int,
    piece: int,
) -> None:
    """Select the ``k`` best blocks of every row; see :func:`dsv4_plugin.select_blocks`."""
    n = row_lengths(lengths, maxima.shape[0], next_n).clamp(0, MAX_INT32)
    args = TopkArgs(maxima, _blocks(n, piece), out, None, None, None, k, 1, 64, False, out_counts)
    reference.topk(args)


def _visible(candidates: torch.Tensor, n: torch.Tensor, piece: int) -> torch.Tensor:
    """Return how many candidate columns a row of ``n`` keys sees, int64 ``[rows]``."""
    seen = (candidates >= 0) & (candidates < _blocks(n, piece)[:, None])
    count = seen.sum(1)
    last = candidates.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0].to(torch.int64)
    in_last = (n - last * piece).clamp(0, piece)
    return ((count - 1) * piece + in_last).masked_fill(count == 0, 0)


def _positions(candidates: torch.Tensor, piece: int) -> torch.Tensor:
    """Return the key of every column, int64; below zero where there is no candidate."""
    first = candidates.to(torch.int64) * piece
    column = torch.arange(piece, device=candidates.device)
    keys = torch.where(first[:, :, None] < 0, -1, first[:, :, None] + column)
    return keys.flatten(1)


def _parts(rows: int, held: int, piece: int, each: int) -> list[tuple[slice, slice]]:
    """Cut rows and their candidates into parts; ``each``: elements that one key takes."""
    step = max(1, min(held, _CHUNK // (piece * each)))
    some = max(1, _CHUNK // (piece * each * step))
    return [
        (slice(lo, min(lo + some, rows)), slice(at, min(at + step, held)))
        for lo in range(0, rows, some)
        for at in range(0, held, step)
    ]


def candidate_logits(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    out_lengths: torch.Tensor | None,
    block_size: int,
    piece: int,
) -> None:
    """Score the keys of every row's candidates; see :func:`dsv4_plugin.candidate_logits`.

    All columns are written here, also those past ``out_lengths``.
    """
    rows, held = candidates.shape
    _, next_n, heads, head_dim = q.shape
    width = block_table.shape[1]
    n = row_lengths(lengths, rows, next_n).clamp(0, width * block_size)
    if out_lengths is not None:
        out_lengths.copy_(_visible(candidates, n, piece))
    if width == 0 or pages.shape[0] == 0:  # there is no page to read
        out.fill_(-torch.inf)
        return
    q = q.flatten(0, 1)
    values, scales = planes(pages, block_size, *key_bytes(q))
    for some, part in _parts(rows, held, piece, max(heads, head_dim)):
        position = _positions(candidates[some, part], piece)
        gone = (position < 0) | (position >= n[some, None])
        position = position.masked_fill(gone, 0)
        row = torch.arange(some.start, some.stop, device=q.device)
        request = torch.div(row, next_n, rounding_mode="floor")[:, None]
        page = block_table[request, torch.div(position, block_size, rounding_mode="floor")]
        page = page.to(torch.int64)
        gone |= (page < 0) | (page >= pages.shape[0])
        page, position = page.clamp(0, pages.shape[0] - 1), position % block_size
        keys, scale = values[page, position], key_scales(q, scales[page, position])
        _write(q[some], keys, scale, weights[some], gone, out, (some, part), piece)


def candidate_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    out: torch.Tensor,
    out_lengths: torch.Tensor | None,
    piece: int,
) -> None:
    """Score candidates among gathered keys; see :func:`dsv4_plugin.candidate_logits_ragged`.

    All columns are written here, also those past ``out_lengths``.
    """
    rows, held = candidates.shape
    heads, head_dim = q.shape[1:]
    keys = k.shape[0]
    start = row_starts.to(torch.int64)
    n = (row_ends.to(torch.int64).clamp(max=keys) - start).masked_fill(start < 0, 0).clamp(min=0)
    if out_lengths is not None:
        out_lengths.copy_(_visible(candidates, n, piece))
    if keys == 0:
        out.fill_(-torch.inf)
        return
    for some, part in _parts(rows, held, piece, max(heads, head_dim)):
        position = _positions(candidates[some, part], piece)
        gone = (position < 0) | (position >= n[some, None])
        at = (position + start[some, None]).masked_fill(gone, 0)
        _write(q[some], k[at], k_scale[at], weights[some], gone, out, (some, part), piece)


def _write(
    q: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor,
    weights: torch.Tensor,
    gone: torch.Tensor,
    out: torch.Tensor,
    where: tuple[slice, slice],
    piece: int,
) -> None:
    """Score each row's own ``keys`` into their columns of ``out``."""
    found = reference_logits.scores(q[:, None], keys, scale, weights[:, None])[:, 0]
    rows, part = where
    out[rows, part.start * piece : part.stop * piece].copy_(found.masked_fill_(gone, -torch.inf))


def select_candidates(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k: int,
    next_n: int,
    page_size: int,
    piece: int,
) -> None:
    """Select the ``k`` best keys of every row's candidates.

    See :func:`dsv4_plugin.select_candidates`.
    """
    rows = logits.shape[0]
    n = row_lengths(lengths, rows, next_n).clamp(0, MAX_INT32)
    visible = _visible(candidates, n, piece)
    column = torch.empty(rows, k, dtype=torch.int32, device=logits.device)
    reference.topk(TopkArgs(logits, visible, column, None, None, None, k, 1, 64, False, out_counts))
    at = column.clamp(min=0).to(torch.int64)
    held = candidates.gather(1, torch.div(at, piece, rounding_mode="floor")).to(torch.int64)
    position = held * piece + at % piece
    position = position.masked_fill((column < 0) | (held < 0) | (position >= n[:, None]), -1)
    out.copy_(position)
    if out_slots is not None and block_table is not None:
        if block_table.shape[0] != rows:
            block_table = block_table.repeat_interleave(next_n, 0)
        out_slots.copy_(reference.to_slots(position, block_table, page_size))


def candidate_select(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    k: int,
    block_size: int,
    page_size: int,
    piece: int,
) -> None:
    """Score the keys of the candidates into ``logits`` and select the ``k`` best.

    See :func:`dsv4_plugin.candidate_select`.
    """
    candidate_logits(
        q, pages, weights, candidates, lengths, block_table, logits, None, block_size, piece
    )
    select_candidates(
        logits, candidates, lengths, out, out_slots, out_counts, page_table, k, q.shape[1],
        page_size, piece,
    )  # fmt: skip
