"""The index logits in float64, and how large the terms of each are.

Shares no code with the package. Beside a score there is its *magnitude*
``|scale| · Σ_h |w_h| · Σ_d |q_d · k_d|``, in which errors of accumulation are counted
(docs/numerics.md); :mod:`dsv4_plugin.cli.checks.exact` has the bound. All of it runs where the
tensors lie.
"""

from __future__ import annotations

import torch

from dsv4_plugin.cli.checks.oracles import table

__all__ = ["paged", "ragged", "scores", "wide"]

# Errors of the dot products of FP4 keys and of the sums over the heads, in units of the sums of
# their terms' magnitudes.
_FP4_DOT, _FP4_SUM = 2.0**-20, 2.0**-19
_CHUNK = 1 << 22  # dot products computed at a time: 32 MiB of float64


def wide(x: torch.Tensor) -> torch.Tensor:
    """Turn e4m3 bytes into float64."""
    return table("e4m3", x.device)[x.contiguous().view(torch.uint8).int()]


def _fp4_scores(
    q: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middle of the interval that a score lies in, and half of its width.

    Rounding keeps the order of numbers, so both ends of a dot product's interval go through all the
    steps.
    """
    heads = q.shape[1:3]
    nibbles = torch.stack((packed % 16, packed // 16), -1).flatten(-2).long()
    size = table("ue8m0", q.device)[scale.long()]
    keys = table("e2m1", q.device)[nibbles].unflatten(-1, (-1, 32)) * size[..., None]
    a, b = q.double().flatten(1, 2), keys.flatten(-2).transpose(1, 2)
    dot, error = torch.bmm(a, b), torch.bmm(a.abs(), b.abs()) * _FP4_DOT
    w = weights.double()[..., None]
    ends = [
        (_rounded(d).clamp_(min=0).unflatten(1, heads) * w).float().bfloat16().double()
        for d in (dot - error, dot + error)
    ]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    room = torch.maximum(low.abs(), high.abs()).sum(2) * _FP4_SUM
    low, high = _rounded(low.sum(2) - room), _rounded(high.sum(2) + room)
    return (low + high) / 2, (high - low) / 2


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.float().bfloat16().double()


def scores(
    q: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float64 scores and magnitudes ``[n, rows, columns]``.

    ``q`` ``[n, rows, heads, head_dim]`` and ``keys`` ``[n, columns, head_dim]`` are e4m3 or its
    bytes, ``scale`` is ``[n, columns]``, ``weights`` ``[n, rows, heads]``.

    If ``q`` is bfloat16, keys are bytes of FP4 codes and ``scale`` is the bytes ``[n, columns,
    head_dim / 32]``. Then half of the interval that the score lies in replaces the magnitude.
    """
    if q.dtype == torch.bfloat16:
        return _fp4_scores(q, keys.int(), scale, weights)
    heads = q.shape[1:3]
    a, b = wide(q).flatten(1, 2), wide(keys).transpose(1, 2)
    scale, weights = scale.double()[:, None], weights.double()[:, :, None]
    relu = torch.bmm(a, b).clamp_(min=0).unflatten(1, heads)  # a NaN stays NaN
    score = scale * torch.matmul(weights, relu)[:, :, 0]
    size = torch.bmm(a.abs_(), b.abs_()).unflatten(1, heads)
    return score, scale.abs() * torch.matmul(weights.abs(), size)[:, :, 0]


def paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    table: torch.Tensor,
    block_size: int = 64,
    columns: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return score and magnitude in at least one column per key of the table.

    The columns do not depend on the lengths. ``cache`` is ``[pages, bytes]``. A key whose page is
    missing, or not in the table, scores -inf.
    """
    batch, next_n, heads, head_dim = q.shape
    fp4 = q.dtype == torch.bfloat16
    values, factors = (head_dim // 2, head_dim // 32) if fp4 else (head_dim, 4)
    pages, split = len(cache), block_size * values
    columns = max(columns, table.shape[1] * block_size)
    score = torch.full((batch, next_n, columns), -torch.inf, dtype=torch.float64, device=q.device)
    size = torch.zeros_like(score)
    weights = weights.unflatten(0, (batch, next_n))
    each = block_size * max(head_dim, next_n * heads)
    step = max(1, min(table.shape[1], _CHUNK // each))
    some = max(1, _CHUNK // (each * step))
    for lo in range(0, batch if pages else 0, some):
        for first in range(0, table.shape[1], step):
            page = table[lo : lo + some, first : first + step].long()
            gone = ((page < 0) | (page >= pages)).repeat_interleave(block_size, 1)[:, None]
            held = cache[page.clamp(0, pages - 1)]
            keys = held[:, :, :split].unflatten(2, (block_size, values)).flatten(1, 2)
            word = held[:, :, split : split + factors * block_size].contiguous()
            scale = word.unflatten(2, (block_size, factors)).flatten(1, 2)
            scale = scale if fp4 else scale.view(torch.float32)[:, :, 0]
            part = scores(q[lo : lo + some], keys, scale, weights[lo : lo + some])
            at = slice(first * block_size, first * block_size + keys.shape[1])
            score[lo : lo + some, :, at] = part[0].masked_fill_(gone, -torch.inf)
            size[lo : lo + some, :, at] = part[1].masked_fill_(gone, 0.0)
    return score.flatten(0, 1), size.flatten(0, 1)


def ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    columns: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return score, magnitude ``[rows, columns]`` by the compressed form, and columns of each row.

    ``columns`` -1: one column per key. A key that does not exist scores -inf.
    """
    rows, keys = len(q), len(k)
    columns = keys if columns < 0 else columns
    key = starts.long()[:, None] + torch.arange(columns, device=q.device)
    n = (ends.long() - starts.long()).clamp(0, columns)
    gone = (key < 0) | (key >= keys)
    past = torch.arange(columns, device=q.device) >= n[:, None]
    score = torch.full(key.shape, -torch.inf, dtype=torch.float64, device=q.device)
    size = torch.zeros_like(score)
    step = max(1, _CHUNK // max(1, keys * q.shape[1]))
    for lo in range(0, rows if keys else 0, step):
        part = slice(lo, lo + step)
        at = key[part].clamp(0, keys - 1)
        found = scores(q[None, part], k[None], k_scale[None], weights[None, part])
        for whole, some, none in zip((score, size), found, (-torch.inf, 0.0), strict=True):
            whole[part] = some[0].gather(1, at).masked_fill_(gone[part], none)
    return score.masked_fill_(past, 0.0), size.masked_fill_(past, 0.0), n
