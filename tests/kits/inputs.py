"""Inputs of tests beside :mod:`dsv4_plugin.cli.checks.inputs`: FP4 caches, slots, poison."""

from __future__ import annotations

import torch

__all__ = ["FP4_SCALES", "mxfp4_cache", "poison_tail", "slot_list"]

# The first and last scale byte by the kind of queries (exact.codes). The products of "fp4" can be
# added in float32 without rounding.
FP4_SCALES = {"fp4": (123, 127), "fp4 wide": (64, 191)}


def mxfp4_cache(
    pages: int,
    *,
    block_size: int = 64,
    head_dim: int = 128,
    pad: int = 0,
    scales: tuple[int, int] = (64, 191),
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Make a page-planar MXFP4 cache of random codes, with scales between two given bytes."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    split, size = block_size * head_dim // 2, block_size * (head_dim // 2 + head_dim // 32)
    arena = torch.full((pages, size + pad), 0xFF, dtype=torch.uint8)
    arena[:, :split] = torch.randint(0, 256, (pages, split), generator=g).to(torch.uint8)
    drawn = torch.randint(scales[0], scales[1] + 1, (pages, size - split), generator=g)
    arena[:, split:size] = drawn.to(torch.uint8)
    return arena.to(device)[:, :size]


def slot_list(tokens: int, total: int, *, padding: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Draw int64 slots in ``[0, total)`` and replace a share of them by -1."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    slots = torch.randint(0, max(total, 1), (tokens,), generator=g)
    return slots.masked_fill(torch.rand(tokens, generator=g) < padding, -1)


def poison_tail(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Overwrite, in place, the columns past each row's length with NaN, inf and 1e30 in turn."""
    column = torch.arange(logits.shape[1], device=logits.device)
    bad = torch.tensor([float("nan"), float("inf"), 1e30], device=logits.device).to(logits.dtype)
    past = column[None, :] >= lengths.reshape(-1, 1).to(logits.device)
    return logits.copy_(torch.where(past, bad[column % 3], logits))
