"""Tensors shaped, typed and strided as SGLang and TokenSpeed make them, on any device."""

from __future__ import annotations

import torch

from dsv4_plugin.testing.host_parts import KEY_BYTES

__all__ = ["HEADS", "PAGE", "deep_gemm_buffer", "in_row", "page_table", "plane"]

PAGE = 64
HEADS = 64
E4M3_MAX = 448.0
POOL = 1 << 20  # pages that a scheduler hands out


def deep_gemm_buffer(
    rows: int, width: int, dtype: torch.dtype, device: str | torch.device
) -> torch.Tensor:
    """Make logits as DeepGEMM allocates them: rows at multiples of 1,024 bytes, full of NaN."""
    align = 1024 // dtype.itemsize
    whole = torch.full((rows, -(-width // align) * align), float("nan"), device=device)
    return whole.to(dtype)[:, :width]


def page_table(rows: int, width: int, device: str | torch.device, pool: int = POOL) -> torch.Tensor:
    """Make int32 ``[rows, pages]``, each page once in a row; a slice of a wider table."""
    pages = -(-width // PAGE)
    g = torch.Generator().manual_seed(1)
    unique = [torch.randperm(pool, generator=g)[: pages + 5] for _ in range(rows)]
    return torch.stack(unique).int().to(device)[:, :pages]


def in_row(slots: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Undo a page table whose rows have no page twice: the columns that pool slots came from.

    A slot whose page is not in its row becomes a column past the row's end.
    """
    ranked, order = table.long().sort(dim=1)
    page = slots.clamp_min(0).long() // PAGE
    at = torch.searchsorted(ranked, page).clamp_max(table.shape[1] - 1)
    known = ranked.gather(1, at) == page
    index = order.gather(1, at) * PAGE + slots.clamp_min(0) % PAGE
    index = torch.where(known, index, table.shape[1] * PAGE)
    return torch.where(slots < 0, -1, index).to(torch.int32)


def plane(pages: int, pad: int, device: str | torch.device, seed: int = 0) -> torch.Tensor:
    """Make page-planar FP8 keys, N(0,1) with a scale a key: a view of an arena ``pad`` wider."""
    g = torch.Generator(device=device).manual_seed(seed)
    content = PAGE * KEY_BYTES
    arena = torch.full((pages, content + pad), 0xFF, dtype=torch.uint8, device=device)
    split = PAGE * (KEY_BYTES - 4)
    step = 4096
    for lo in range(0, pages, step):
        n = min(step, pages - lo)
        keys = torch.randn(n, PAGE, KEY_BYTES - 4, generator=g, device=device)
        scale = keys.abs().amax(dim=2) / E4M3_MAX
        values = (keys / scale[:, :, None]).to(torch.float8_e4m3fn)
        arena[lo : lo + n, :split] = values.view(torch.uint8).flatten(1)
        arena[lo : lo + n, split:content] = scale.view(torch.uint8)
    return arena[:, :content]
