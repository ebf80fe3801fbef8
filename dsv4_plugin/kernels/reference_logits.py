"""The index logits in plain torch: the oracle of the tests and the last resort at run time.

Like :mod:`.reference`, it neither synchronises with the host nor has control flow that depends on
data.

The dot products are made in float64 and then rounded to float32. In float64, products and sums of
e4m3 values are exact: they are multiples of 2^-18 below 2^25. So a score depends neither on how a
matrix product is blocked nor on torch's TF32 switch. The heads are added in float32, element by
element, in the same order for every key.

Queries of bfloat16 are scored against FP4 keys. Their products are exact in float64 too, and so are
sums of products whose magnitudes are less than 2^36 apart.
"""

from __future__ import annotations

import torch

from dsv4_plugin.kernels.arguments import reads_fp4
from dsv4_plugin.kernels.reference import (
    MX_BLOCK,
    SCALE_BYTES,
    mxfp4_values,
    planes,
    row_lengths,
    ue8m0,
    widen_e4m3,
)

__all__ = ["key_bytes", "key_scales", "paged_logits", "ragged_logits", "scores"]

# Elements of the float64 dot products that are made at a time: 2**23 are 64 MiB.
_CHUNK = 1 << 23


def key_bytes(q: torch.Tensor) -> tuple[int, int]:
    """Return how many bytes of values, and of scales, a key scored by ``q`` has."""
    head_dim = q.shape[-1]
    return (head_dim // 2, head_dim // MX_BLOCK) if reads_fp4(q) else (head_dim, SCALE_BYTES)


def key_scales(q: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Return the keys' scales in the form that :func:`scores` takes, from ``[..., bytes]``."""
    return ue8m0(held) if reads_fp4(q) else held.view(torch.float32)[..., 0]


def scores(
    q: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Score ``keys`` ``[n, columns, head_dim]`` for ``q`` ``[n, rows, heads, head_dim]``.

    Both are e4m3 bytes. ``scale`` ``[n, columns]``, ``weights`` ``[n, rows, heads]`` and the result
    ``[n, rows, columns]`` are float32.

    If ``q`` is bfloat16, ``keys`` are bytes of two FP4 codes, ``scale`` is ``[n, columns, head_dim
    / 32]``, and weights and result are bfloat16.
    """
    if reads_fp4(q):
        return _fp4_scores(q, keys, scale, weights)
    n, rows, heads, head_dim = q.shape
    wide = widen_e4m3(q).to(torch.float64).reshape(n, rows * heads, head_dim)
    dots = torch.bmm(wide, widen_e4m3(keys).to(torch.float64).transpose(1, 2))
    dots = dots.to(torch.float32).relu_().unflatten(1, (rows, heads))
    total = weights[:, :, 0, None] * dots[:, :, 0]
    for h in range(1, heads):
        total += weights[:, :, h, None] * dots[:, :, h]
    return total.mul_(scale[:, None])


def _fp4_scores(
    q: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    n, rows, heads, head_dim = q.shape
    keys = mxfp4_values(packed) * scale.repeat_interleave(MX_BLOCK, dim=-1)
    wide = q.to(torch.float64).reshape(n, rows * heads, head_dim)
    dots = torch.bmm(wide, keys.to(torch.float64).transpose(1, 2)).to(torch.float32)
    dots = dots.to(torch.bfloat16).unflatten(1, (rows, heads)).relu_()
    products = dots.mul_(weights[..., None]).to(torch.float32)
    # Heads 8 i + 2 t + c: add over i one after the other, then over c, then over t in pairs.
    if heads % 8:
        products = torch.nn.functional.pad(products, (0, 0, 0, -heads % 8))
    parts = products.unflatten(2, (-1, 4, 2))
    total = parts[:, :, 0]
    for i in range(1, parts.shape[2]):
        total = total + parts[:, :, i]
    four = total[:, :, :, 0] + total[:, :, :, 1]
    two = four[:, :, ::2] + four[:, :, 1::2]
    return (two[:, :, 0] + two[:, :, 1]).to(torch.bfloat16)


def paged_logits(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
) -> None:
    """Score the keys of every request's pages; see :func:`dsv4_plugin.paged_logits`.

    All pages of the table are scored here; scores past a row's length are then left out.
    """
    batch, next_n, heads, head_dim = q.shape
    rows, columns = out.shape
    held_bytes = key_bytes(q)
    blocks = min(block_table.shape[1], -(-columns // block_size))
    width = min(columns, blocks * block_size)
    per_row = row_lengths(lengths, rows, next_n)
    past = torch.arange(width, columns, device=q.device) < per_row[:, None]
    out[:, width:].masked_fill_(past, -torch.inf)
    n = per_row.view(batch, next_n, 1)
    weights = weights.unflatten(0, (batch, next_n))
    each = block_size * max(head_dim, next_n * heads)  # elements that a page of a request takes
    step = max(1, min(blocks, _CHUNK // each))
    some = max(1, _CHUNK // (each * step))
    for lo in range(0, batch, some):
        part = slice(lo, min(lo + some, batch))
        target = out[part.start * next_n : part.stop * next_n].unflatten(0, (-1, next_n))
        for first in range(0, blocks, step):
            begin = first * block_size
            end = min(width, begin + step * block_size)
            column = torch.arange(begin, end, device=q.device)
            page = block_table[part, first : first + step].to(torch.int64)
            gone = (page < 0) | (page >= pages.shape[0])
            gone = gone.repeat_interleave(block_size, dim=1)[:, None, : end - begin]
            if pages.shape[0]:
                values, scales = planes(pages, block_size, *held_bytes)
                page = page.clamp(0, pages.shape[0] - 1)
                keys = values[page].flatten(1, 2)[:, : end - begin]
                scale = key_scales(q, scales[page].flatten(1, 2))[:, : end - begin]
                score = scores(q[part], keys, scale, weights[part]).masked_fill(gone, -torch.inf)
            else:
                score = torch.full(gone.shape, -torch.inf, dtype=torch.float32, device=q.device)
            held = target[:, :, begin:end]
            held.copy_(torch.where(column < n[part], score.to(out.dtype), held))


def ragged_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    out: torch.Tensor,
    one_request: bool,
) -> None:
    """Score a window of gathered keys for every row; see :func:`dsv4_plugin.ragged_logits`.

    All keys are scored here for every row; each row's window is then taken out. ``one_request``
    changes nothing here.
    """
    rows, heads, _ = q.shape
    keys, width = k.shape[0], out.shape[1]
    start, end = row_starts.to(torch.int64), row_ends.to(torch.int64)
    n = (end - start).clamp(max=width)
    # the difference may wrap around
    n = n.masked_fill(n < 0, width).masked_fill(end <= start, 0)[:, None]
    start = start.clamp(-width, keys)[:, None]
    column = torch.arange(width, device=q.device)
    if not keys:
        out.masked_fill_(column < n, -torch.inf)
        return
    step = max(1, min(keys, _CHUNK // heads))
    some = max(1, _CHUNK // (heads * step))
    for lo in range(0, rows, some):
        part = slice(lo, min(lo + some, rows))
        score = torch.cat(
            [
                scores(q[None, part], k[None, at : at + step], k_scale[None, at : at + step],
                        weights[None, part])[0]
                for at in range(0, keys, step)
            ],
            dim=1,
        )  # fmt: skip
        key = start[part] + column
        gone = (key < 0) | (key >= keys)
        shifted = score.gather(1, key.clamp_(0, keys - 1)).masked_fill_(gone, -torch.inf)
        out[part].copy_(torch.where(column < n[part], shifted.to(out.dtype), out[part]))
