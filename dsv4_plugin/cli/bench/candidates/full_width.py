"""What an engine without ops for candidates does to a whole buffer of scores.

Two Triton kernels, like those of engines: the scores of all blocks, and a mask that writes -inf
outside a row's candidates. On a CPU, for a dry run, torch does the same.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.cli.bench.candidates.problem import PIECE

__all__ = ["block_scores", "mask"]

BLOCKS = 512  # per program

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _block_scores_kernel(
    scores, lengths, out, stride, out_stride, BLOCKS: tl.constexpr, PIECE: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    n = tl.load(lengths + row)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    x = tl.load(scores + row * stride + column, mask=column < n, other=float("-inf"))
    best = tl.max(x, axis=1)
    best = tl.where(block == (n - 1) // PIECE, float("inf"), best)
    tl.store(out + row * out_stride + block, best)


@_jit
def _mask_kernel(scores, keep, stride, keep_stride, BLOCKS: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    kept = tl.load(keep + row * keep_stride + block) != 0
    column = block[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    gone = tl.broadcast_to((kept == 0)[:, None], (BLOCKS, PIECE))
    nothing = tl.full((BLOCKS, PIECE), float("-inf"), tl.float32)
    tl.store(scores + row * stride + column, nothing, mask=gone)


def block_scores(scores: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Write the largest score of every block to ``out``, and inf for a row's newest block.

    Args:
        scores: float32 ``[rows, columns]``, columns a multiple of 8 · 512 on a GPU.
        lengths: int32 ``[rows]``.
        out: float32 ``[rows, columns / 8]``.
    """
    if scores.is_cuda:
        _block_scores_kernel[(out.shape[1] // BLOCKS, len(out))](
            scores, lengths, out, scores.stride(0), out.stride(0), BLOCKS=BLOCKS, PIECE=PIECE
        )
        return
    column = torch.arange(scores.shape[1])
    seen = scores.masked_fill(column >= lengths[:, None], -torch.inf)
    out.copy_(seen.unflatten(1, (-1, PIECE)).amax(2))
    out.scatter_(1, ((lengths - 1) // PIECE).long()[:, None], torch.inf)


def mask(scores: torch.Tensor, candidates: torch.Tensor, keep: torch.Tensor) -> None:
    """Write -inf to the scores outside the candidates.

    Args:
        scores: float32 ``[rows, columns]``, as :func:`block_scores` takes them.
        candidates: int32 ``[rows, K]``.
        keep: uint8 ``[rows, columns / 8 + 1]`` for flags.
    """
    blocks = keep.shape[1] - 1
    keep.zero_()
    keep.scatter_(1, torch.where(candidates < 0, blocks, candidates).long(), 1)
    if scores.is_cuda:
        _mask_kernel[(blocks // BLOCKS, len(scores))](
            scores, keep, scores.stride(0), keep.stride(0), BLOCKS=BLOCKS, PIECE=PIECE
        )
        return
    gone = keep[:, :blocks, None] == 0
    scores.unflatten(1, (blocks, PIECE)).masked_fill_(gone, -torch.inf)
