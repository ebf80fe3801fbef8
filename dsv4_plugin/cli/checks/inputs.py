"""Inputs: a cache as the engines write it, and scores of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["DISTRIBUTIONS", "fp8_cache", "scores"]


def fp8_cache(
    pages: int,
    *,
    block_size: int = 64,
    head_dim: int = 128,
    pad: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Make a page-planar FP8 cache ``[pages, block_size · (head_dim + 4)]`` of random keys.

    The keys have every e4m3 byte but NaN. The scales are powers of two, as the engines write them,
    and other numbers. With ``pad`` the result is a view into pages that are ``pad`` bytes longer,
    filled with 0xFF.
    """
    g = torch.Generator(device="cpu").manual_seed(seed)
    split, size = block_size * head_dim, block_size * (head_dim + 4)
    arena = torch.full((pages, size + pad), 0xFF, dtype=torch.uint8)
    codes = torch.randint(0, 254, (pages, split), generator=g, dtype=torch.int32)
    arena[:, :split] = (codes + (codes >= 0x7F)).to(torch.uint8)  # skip 0x7F; 0xFF is never drawn
    exponent = torch.randint(-12, 4, (pages, block_size), generator=g).float()
    odd = torch.rand(pages, block_size, generator=g) < 0.5
    scale = torch.exp2(exponent) * torch.where(odd, torch.rand(pages, block_size, generator=g), 1.0)
    arena[:, split:size] = scale.view(torch.uint8).reshape(pages, 4 * block_size)
    return arena.to(device)[:, :size]


def _relu_sum(rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    """Scores with a plateau of exact zeros, like the indexer's sum over ReLUs."""
    x = torch.zeros(rows, columns, device=g.device)
    for _ in range(4):
        x += torch.relu(torch.randn(rows, columns, generator=g, device=g.device) - 1.0)
    return x


def _special(rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    """A few distinct numbers, with NaN of both signs, infinities, and zeros of both signs."""
    pool = torch.tensor(
        [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0],
        device=g.device,
    )
    return pool[torch.randint(0, 8, (rows, columns), generator=g, device=g.device)]


def _signed_sum(rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    """Rows that lie more or less below zero, like sums over heads with weights of both signs.

    The thresholds of some rows are negative, of others close to zero.
    """
    below = 4 * (torch.arange(rows, device=g.device) + 0.5) / max(rows, 1)
    return torch.randn(rows, columns, generator=g, device=g.device) - below[:, None]


def _one_huge_bin(rows: int, columns: int, g: torch.Generator) -> torch.Tensor:
    """Numbers that share their sign, exponent and leading mantissa bits."""
    return 1.0 + torch.rand(rows, columns, generator=g, device=g.device) / 64


DISTRIBUTIONS: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "normal": lambda r, c, g: torch.randn(r, c, generator=g, device=g.device),
    "crowded": lambda r, c, g: 10 + torch.randn(r, c, generator=g, device=g.device),
    "relu_sum": _relu_sum,
    "signed_sum": _signed_sum,
    "all_equal": lambda r, c, g: torch.full((r, c), 0.25, device=g.device),
    "two_values": lambda r, c, g: (torch.rand(r, c, generator=g, device=g.device) < 0.01).float(),
    "ascending": lambda r, c, g: torch.randn(r, c, generator=g, device=g.device).sort(dim=1).values,
    "descending": lambda r, c, g: (
        torch.randn(r, c, generator=g, device=g.device).sort(dim=1, descending=True).values
    ),
    "one_huge_bin": _one_huge_bin,
    "special": _special,
}


def scores(
    kind: str,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Draw ``[rows, columns]`` scores of one of :data:`DISTRIBUTIONS`."""
    g = torch.Generator(device=device).manual_seed(seed)
    return DISTRIBUTIONS[kind](rows, columns, g).to(dtype)
