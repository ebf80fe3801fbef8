"""Vectorised oracles of the candidate ops, on any device; they share no code with the ops.

All of them start from *dense* scores: the scores of all keys of a row, as ``paged_logits`` gives
them, in the dtype of the selection. There is one length per row, in keys. Selection is a stable
sort (:class:`.oracles.Ranking`). Everything is compared without a tolerance.
"""

from __future__ import annotations

import torch

from dsv4_plugin.cli.checks.oracles import Ranking

__all__ = ["blocks", "maxima", "scores", "selection", "visible"]


def _total_order(x: torch.Tensor) -> torch.Tensor:
    """Map scores to integers in the order of numbers, with -0.0 below 0.0 and every NaN highest."""
    bits = x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16).long()
    sign = 1 << (8 * x.element_size() - 1)
    return torch.where(bits >= 0, bits, -1 - (bits + sign)).masked_fill(x.isnan(), sign)


def maxima(dense: torch.Tensor, n: torch.Tensor, piece: int = 8) -> torch.Tensor:
    """Return the score of every block, and -inf past a row's blocks.

    ``dense`` is ``[rows, columns]``, of which a row sees ``n`` (clipped to the columns).
    """
    rows, columns = dense.shape
    n = n.reshape(-1, 1).long().clamp(0, columns)
    count = -(-columns // piece)
    whole = dense.new_full((rows, count * piece), -torch.inf)
    whole[:, :columns] = dense
    whole[torch.arange(count * piece, device=dense.device) >= n] = -torch.inf
    parts = whole.view(rows, count, piece)
    best = _total_order(parts).argmax(2, keepdim=True)
    found = parts.gather(2, best)[:, :, 0]
    found[found.isnan()] = torch.inf
    block = torch.arange(count, device=dense.device).expand(rows, -1)
    first, last = block * piece, block * piece + piece
    found[(first < n) & (last >= n)] = torch.inf
    return found


def blocks(found: torch.Tensor, n: torch.Tensor, k: int, piece: int = 8) -> torch.Tensor:
    """Return the ``k`` best blocks by the blocks' scores, ascending, then -1."""
    ranking = Ranking(found, -(-n.reshape(-1).long() // piece), k)
    return ascending(ranking.want(k))


def ascending(index: torch.Tensor) -> torch.Tensor:
    """Sort the indices of each row, -1 last."""
    most = torch.iinfo(torch.int32).max
    ordered = index.masked_fill(index < 0, most).sort(1).values
    return ordered.masked_fill(ordered == most, -1)


def _keys(candidates: torch.Tensor, piece: int) -> torch.Tensor:
    """Return the key of every column; below zero if there is no candidate."""
    column = torch.arange(candidates.shape[1] * piece, device=candidates.device)
    block = candidates.long()[:, column // piece]
    return torch.where(block < 0, -1, block * piece + column % piece)


def scores(
    dense: torch.Tensor, candidates: torch.Tensor, n: torch.Tensor, piece: int = 8
) -> torch.Tensor:
    """Return the scores of the candidates' keys; -inf for a key that the row does not see."""
    n = n.reshape(-1, 1).long().clamp(0, dense.shape[1])
    key = _keys(candidates, piece)
    there = (key >= 0) & (key < n)
    padded = torch.nn.functional.pad(dense, (0, 1), value=-torch.inf)
    return padded.gather(1, torch.where(there, key, dense.shape[1]))


def visible(candidates: torch.Tensor, n: torch.Tensor, piece: int = 8) -> torch.Tensor:
    """Count the columns that a row sees, for ascending candidates; int64 ``[rows]``."""
    key = _keys(candidates, piece)
    return ((key >= 0) & (key < n.reshape(-1, 1))).sum(1)


def selection(
    logits: torch.Tensor, candidates: torch.Tensor, n: torch.Tensor, k: int, piece: int = 8
) -> torch.Tensor:
    """Return positions, ascending, then -1, for ascending candidates."""
    column = ascending(Ranking(logits, visible(candidates, n, piece), k).want(k)).long()
    key = _keys(candidates, piece)
    position = key.gather(1, column.clamp(min=0))
    return torch.where(column < 0, -1, position).int()
