"""The bound of the errors of index logits, and the check of a tensor against it.

The unit of accumulation errors is a score's *magnitude*
``|scale| · Σ_h |w_h| · Σ_d |q_d · k_d|`` (docs/numerics.md).
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.cli.checks.oracles import table

__all__ = ["TOLERANCE", "codes", "outside"]

# Error of the sums, in units of the magnitude. The reference's dot products are exact; the errors
# of 64 products and sums in float32 remain. Hopper's FP8 tensor cores align the products of a step
# to the largest product and keep some 14 bits. The error is largest if few products are much larger
# than the rest: "bytes" are spread evenly over the exponents, "normal" is what an engine writes.
TOLERANCE = {
    ("torch", "normal"): 2.0**-17,
    ("torch", "bytes"): 2.0**-17,
    ("cuda", "normal"): 2.0**-12,
    ("cuda", "bytes"): 2.0**-9,
    # The magnitude of a score of FP4 keys is its whole error: half of the interval that it lies in.
    **{(backend, kind): 1.0 for backend in ("torch", "cuda") for kind in ("fp4", "fp4 wide")},
}


def codes(shape: tuple[int, ...], kind: str, g: torch.Generator) -> torch.Tensor:
    """Draw e4m3: ``normal``, as quantisation by the largest value gives them, or all ``bytes``.

    The kinds ``fp4`` and ``fp4 wide`` draw bfloat16 queries for FP4 keys: as SGLang makes them, or
    any.
    """
    some: Any = {"generator": g, "device": g.device}
    if kind == "fp4 wide":
        size = torch.exp2(torch.randint(-20, 20, shape, **some))
        return (torch.randn(shape, **some) * size).bfloat16()
    if kind == "fp4":
        value = table("e2m1", g.device)[torch.randint(0, 16, shape, **some)].unflatten(-1, (-1, 32))
        scale = torch.exp2(torch.randint(-2, 2, (*value.shape[:-1], 1), **some))
        return (value * scale).flatten(-2).bfloat16()
    if kind == "normal":
        drawn = torch.randn(shape, generator=g, device=g.device) * 100
        return drawn.clamp(-448, 448).to(torch.float8_e4m3fn)
    drawn = torch.randint(0, 254, shape, generator=g, device=g.device)
    return (drawn + (drawn >= 0x7F)).to(torch.uint8).view(torch.float8_e4m3fn)


def outside(
    got: torch.Tensor, score: torch.Tensor, size: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return which elements of ``got`` are wrong, and the interval that each must lie in.

    A score is right if some sum within the tolerance rounds to it. Rounding keeps the order of
    numbers. So the two ends of the interval, rounded to the dtype of ``got``, enclose the score.
    """
    error = size * tolerance
    low, high = (score - error).to(got.dtype), (score + error).to(got.dtype)
    right = ((got >= low) & (got <= high)) | (got.isnan() & score.isnan())
    return ~right, low, high
