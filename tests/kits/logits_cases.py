"""Shared by the tests of the logits: random calls, and assertions on their results.

The float64 oracle is :mod:`.exact_scores`, the bound :mod:`dsv4_plugin.cli.checks.exact`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kits import exact_scores
from kits.exact_scores import ragged as ragged_oracle
from kits.exact_scores import wide
from kits.inputs import FP4_SCALES, mxfp4_cache

from dsv4_plugin.cli.checks import exact
from dsv4_plugin.cli.checks.exact import TOLERANCE, codes
from dsv4_plugin.cli.checks.inputs import fp8_cache

__all__ = [
    "FP4_SCALES", "TOLERANCE", "D", "Paged", "bits", "check", "codes", "oracle", "paged",
    "ragged_oracle", "untouched", "wide",
]  # fmt: skip

D = 128


@dataclass
class Paged:
    """The arguments of `paged_logits`; there is one length a row."""

    q: torch.Tensor
    cache: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    kind: str

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.cache, self.weights, self.lengths, self.table

    def to(self, device: str) -> Paged:
        cache = self.cache
        if device != "cpu":  # keep the page stride
            arena = torch.full(
                (len(cache), cache.stride(0)), 0xFF, dtype=torch.uint8, device=device
            )
            cache = arena[:, : cache.shape[1]]
            cache.copy_(self.cache)
        rest = (x.to(device) for x in (self.weights, self.lengths, self.table))
        return Paged(self.q.to(device), cache, *rest, self.kind)


def paged(
    lengths: list[int],
    next_n: int = 1,
    heads: int = 64,
    *,
    kind: str = "normal",
    pages: int = 0,
    pad: int = 0,
    columns: int = 0,
    block_size: int = 64,
    seed: int = 0,
) -> Paged:
    """Draw a call; `lengths` are one a row. Requests share pages only where `pages` are few.

    `kind` is one of `codes`; the cache has FP4 keys where these are bfloat16.
    """
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    batch = rows // next_n
    width = -(-(columns or max(*lengths, 1, 1)) // block_size)
    held = pages or batch * width
    fp4 = kind in FP4_SCALES
    some = {"block_size": block_size, "pad": pad, "seed": seed}
    cache = mxfp4_cache(held, scales=FP4_SCALES[kind], **some) if fp4 else fp8_cache(held, **some)
    if kind == "normal":
        keys = codes((held, block_size * D), kind, g)
        cache[:, : block_size * D] = keys.view(torch.uint8)
    order = torch.randperm(held, generator=g)
    pick = torch.arange(batch * width) % held
    return Paged(
        codes((batch, next_n, heads, D), kind, g),
        cache,
        (torch.randn(rows, heads, generator=g) * 0.1).to(torch.bfloat16 if fp4 else torch.float32),
        torch.tensor(lengths, dtype=torch.int32),
        order[pick].view(batch, width).int(),
        kind,
    )


def _score(q, keys, scale, weights):
    """float64 score and magnitude of `keys` [n, D] for one row of queries [heads, D]."""
    score, size = exact_scores.scores(q[None, None], keys[None], scale[None], weights[None, None])
    return score[0, 0], size[0, 0]


def oracle(
    case: Paged, block_size: int = 64, columns: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and magnitude, a column for each of the table or more, whatever the lengths."""
    return exact_scores.paged(case.q, case.cache, case.weights, case.table, block_size, columns)


def check(got, score, size, n, tolerance, context=""):
    """Assert that the first `n` columns of each row are the score (`exact.outside`)."""
    columns = min(got.shape[1], score.shape[1])
    got, score, size = got[:, :columns], score[:, :columns], size[:, :columns]
    valid = torch.arange(columns, device=got.device) < n.reshape(-1, 1)
    wrong, low, high = exact.outside(got, score, size, tolerance)
    wrong &= valid
    if bool(wrong.any()):
        r, c = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {int(valid.sum())} scores are wrong ({context}); first: row "
            f"{r}, column {c}: {float(got[r, c])}, not {float(low[r, c])} to {float(high[r, c])}"
        )


INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(x):
    """The bits of a tensor, for comparisons in which NaN equals itself."""
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def untouched(out, n, before, context=""):
    """Assert that columns at and past `n` hold the bits that `before` has."""
    past = torch.arange(out.shape[1], device=out.device) >= n.reshape(-1, 1)
    changed = past & (bits(out) != bits(before))
    assert not bool(changed.any()), f"{int(changed.sum())} scores past a row's length ({context})"
