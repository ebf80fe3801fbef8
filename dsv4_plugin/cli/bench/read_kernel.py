"""The one-pass floor as a Triton kernel: it reads every score once and keeps a maximum."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["read_rows"]


@triton.jit
def read_rows(x, starts, lengths, out, stride, columns, chunk, RAGGED: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Program (part, row) reads ``chunk`` columns of its row and writes their maximum.

    Windows are cut down to multiples of 16 columns, so that each load is 16 bytes wide.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, n = 0, columns
    if RAGGED:
        start = tl.multiple_of(tl.load(starts + row) // 16 * 16, 16)
        n = tl.multiple_of(tl.load(lengths + row) // 16 * 16, 16)
    base = x + row * stride + start
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for at in range(part * chunk, tl.minimum(part * chunk + chunk, n), BLOCK):
        column = at + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(base + column, column < n, float("-inf")).to(tl.float32))
    tl.store(out + row * tl.num_programs(0) + part, tl.max(best, 0))
