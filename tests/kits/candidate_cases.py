"""Shared by the tests of the candidate ops."""

from __future__ import annotations

import torch
from kits.canary import Guarded
from kits.logits_cases import Paged, paged

from dsv4_plugin import paged_logits
from dsv4_plugin.cli.checks import candidate_oracles as oracle
from dsv4_plugin.cli.checks.oracles import same_bits

__all__ = [
    "DTYPES", "EDGES", "PAD", "dense", "draw", "equal_bits", "guarded", "oracle",
    "valid", "written",
]  # fmt: skip

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PAD = {64: 192, 32: 384}  # pages of 8,640 and 4,608 bytes
# Every case of the newest block, about 512 and about 2,048 blocks; divisible by 1, 2, 4 and 6.
EDGES = [0, 1, 7, 8, 9, 16, 511, 512, 513, *range(16_376, 16_389), 16_390, 16_392]


def draw(lengths, next_n=1, heads=32, block_size=64, **more) -> Paged:
    """A call on pages as the engines have them, with gaps between the pages."""
    return paged(lengths, next_n, heads, block_size=block_size, pad=PAD.get(block_size, 0), **more)


def dense(case: Paged, dtype, block_size=64, backend="torch", lengths=None):
    """The scores of all keys of every row, -inf past the keys that it sees."""
    q, cache, weights, n, table = case.arguments
    n = n if lengths is None else lengths
    out = torch.full(
        (len(weights), table.shape[1] * block_size), -torch.inf, dtype=dtype, device=q.device
    )
    return paged_logits(
        q, cache, weights, n, table, block_size=block_size, out=out, backend=backend
    )


def equal_bits(got, want, where=None, context=""):
    """Assert that two tensors have the same bits, in `where` if given; all NaN count as equal."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), context
    wrong = ~same_bits(got, want)
    if where is not None:
        wrong &= where
    if bool(wrong.any()):
        r, c = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} scores differ ({context}); first: row {r}, column {c}: "
            f"{float(got[r, c])}, not {float(want[r, c])}"
        )


def valid(n, columns):
    """Bool [rows, columns]: the first `n` of each row."""
    return torch.arange(columns, device=n.device) < n.reshape(-1, 1)


def written(got, n, canary):
    """Assert that only the first `n` of each row were written: the rest equals `canary`."""
    changed = ~valid(n, got.shape[1]) & ~same_bits(got, canary)
    assert not bool(changed.any()), f"{int(changed.sum())} elements past a row's end were written"


def guarded(rows, columns, dtype, device, gap=0):
    """An output with guards around and between its rows, full of known bytes; and a copy of it."""
    held = Guarded(rows, columns, dtype, stride=columns + gap, device=device)
    return held, held.inside, held.inside.clone()
