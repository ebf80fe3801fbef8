"""What the tests of the logits share: draws, a float64 oracle, and the bound that is asserted.

The oracle shares no code with the package. It gives, beside the score, its *magnitude*
``|scale| · Σ_h |w_h| · Σ_d |q_d · k_d|``, in which errors of accumulation are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dsv4_plugin.testing.inputs import fp8_cache

D = 128

# Error of the sums, in units of the magnitude. The reference's dot products are exact; 64 products
# and sums in float32 are left. Hopper's FP8 tensor cores align the products of a step to the
# largest and keep some 14 bits, which is most where few products are much larger than the rest:
# "bytes" are spread evenly over the exponents, "normal" is what an engine writes.
TOLERANCE = {
    ("torch", "normal"): 2.0**-17,
    ("torch", "bytes"): 2.0**-17,
    ("cuda", "normal"): 2.0**-12,
    ("cuda", "bytes"): 2.0**-9,
}


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


E4M3 = torch.tensor([_e4m3(byte) for byte in range(256)], dtype=torch.float64)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Turn e4m3 bytes into float64."""
    return E4M3.to(x.device)[x.contiguous().view(torch.uint8).long()]


def codes(shape: tuple[int, ...], kind: str, g: torch.Generator) -> torch.Tensor:
    """Draw e4m3: `normal`, as quantisation by the largest value makes them, or all `bytes`."""
    if kind == "normal":
        return (torch.randn(shape, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    drawn = torch.randint(0, 254, shape, generator=g)
    return (drawn + (drawn >= 0x7F)).to(torch.uint8).view(torch.float8_e4m3fn)


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
    """Draw a call; `lengths` are one a row. Requests share pages only where `pages` are few."""
    g = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    batch = rows // next_n
    width = -(-(columns or max(*lengths, 1, 1)) // block_size)
    held = pages or batch * width
    cache = fp8_cache(held, block_size=block_size, pad=pad, seed=seed)
    if kind == "normal":
        keys = codes((held, block_size * D), kind, g)
        cache[:, : block_size * D] = keys.view(torch.uint8)
    order = torch.randperm(held, generator=g)
    pick = torch.arange(batch * width) % held
    return Paged(
        codes((batch, next_n, heads, D), kind, g),
        cache,
        torch.randn(rows, heads, generator=g) * 0.1,
        torch.tensor(lengths, dtype=torch.int32),
        order[pick].view(batch, width).int(),
        kind,
    )


def _score(q, keys, scale, weights):
    """float64 score and magnitude of `keys` [n, D] for one row of queries [heads, D]."""
    dots = wide(q) @ wide(keys).T
    size = wide(q).abs() @ wide(keys).abs().T
    relu = torch.where(dots.isnan(), dots, dots.clamp(min=0))
    scale, weights = scale.double(), weights.double()
    return scale * (weights @ relu), scale.abs() * (weights.abs() @ size)


def oracle(case: Paged, block_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and magnitude [rows, columns of the table], whatever the lengths."""
    batch, next_n, _, _ = case.q.shape
    pages, split = len(case.cache), block_size * D
    flat = case.cache[:, : split + 4 * block_size]
    scores, sizes = [], []
    for b in range(batch):
        page = case.table[b].long()
        safe = page.clamp(0, max(pages - 1, 0))
        gone = ((page < 0) | (page >= pages)).repeat_interleave(block_size)
        held = flat[safe] if pages else flat.new_zeros(len(page), flat.shape[1])
        keys = held[:, :split].reshape(-1, D)
        scale = held[:, split:].contiguous().view(torch.float32).reshape(-1)
        for j in range(next_n):
            score, size = _score(case.q[b, j], keys, scale, case.weights[b * next_n + j])
            scores.append(score.masked_fill(gone, -torch.inf))
            sizes.append(size.masked_fill(gone, 0.0))
    return torch.stack(scores), torch.stack(sizes)


def ragged_oracle(q, k, k_scale, weights, starts, ends):
    """Score, magnitude [rows, keys] by the compressed form, and the number of columns of a row."""
    keys = len(k)
    score, size = (torch.zeros(len(q), keys, dtype=torch.float64, device=q.device) for _ in "12")
    count = []
    for r, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        n = max(0, min(end, keys) - start) if start >= 0 else 0
        count.append(n)
        if n:
            part = slice(start, start + n)
            score[r, :n], size[r, :n] = _score(q[r], k[part], k_scale[part], weights[r])
    return score, size, torch.tensor(count, device=q.device)


def check(got, score, size, n, tolerance, context=""):
    """Assert that the first `n` columns of each row are the score.

    A score is right if it is what some sum within the tolerance rounds to: rounding keeps order, so
    the two ends of the interval, rounded to the dtype of `got`, hold it between them.
    """
    columns = min(got.shape[1], score.shape[1])
    got, score, size = got[:, :columns], score[:, :columns], size[:, :columns]
    valid = torch.arange(columns, device=got.device) < n.reshape(-1, 1)
    error = size * tolerance
    low, high = (score - error).to(got.dtype), (score + error).to(got.dtype)
    right = ((got >= low) & (got <= high)) | (got.isnan() & score.isnan())
    wrong = valid & ~right
    if bool(wrong.any()):
        r, c = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(wrong.sum())} of {int(valid.sum())} scores are wrong ({context}); first: row "
            f"{r}, column {c}: {float(got[r, c])}, not {float(low[r, c])} to {float(high[r, c])}"
        )


INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(x):
    """The bits of a tensor, for comparisons that NaN does not spoil."""
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def untouched(out, n, before, context=""):
    """Assert that columns at and past `n` hold the bits that `before` has."""
    past = torch.arange(out.shape[1], device=out.device) >= n.reshape(-1, 1)
    changed = past & (bits(out) != bits(before))
    assert not bool(changed.any()), f"{int(changed.sum())} scores past a row's length ({context})"
