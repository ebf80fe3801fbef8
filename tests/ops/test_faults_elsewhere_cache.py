"""The faults of docs/faults_elsewhere.md that concern reads of an indexer cache."""

from __future__ import annotations

import torch
from kits.inputs import mxfp4_cache, slot_list
from kits.oracles import read_mxfp4_one_by_one, read_one_by_one

from dsv4_plugin import gather_indexer_cache, read_indexer_cache, read_indexer_cache_mxfp4
from dsv4_plugin.cli.checks.inputs import fp8_cache

BACKENDS = ("torch", "triton", "cuda")


def test_values_and_scales_lie_in_planes(backend, device):
    """All values of a page, then all its scales: a key is not 132 bytes that lie together."""
    page = torch.zeros(1, 64 * 132, dtype=torch.uint8)
    page[0, : 64 * 128] = torch.arange(64).repeat_interleave(128).to(torch.uint8)
    scale = torch.arange(64, dtype=torch.float32) + 1
    page[0, 64 * 128 :] = scale.view(torch.uint8)
    slots = torch.arange(64)
    got = read_indexer_cache(page.to(device), slots.to(device), backend=backend).cpu()
    want = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * scale
    assert torch.equal(got, want[:, None].expand(64, 128))


def test_odd_strides_of_pages_and_rows_corrupt_nothing(backend, device):
    """A page of 8,448 bytes and some more: vectors of 16 bytes must not cross into others."""
    pads = (0, 16, 48) if backend == "cuda" else (0, 4, 12, 16)  # the CUDA form needs 16
    for pad in pads:
        cache = fp8_cache(5, pad=pad)
        arena = torch.full((5, cache.stride(0)), 0xFF, dtype=torch.uint8, device=device)
        view = arena[:, : cache.shape[1]]
        view.copy_(cache)
        slots = slot_list(100, 320)
        got = read_indexer_cache(view, slots.to(device), backend=backend)
        assert torch.equal(got.cpu(), read_one_by_one(cache, slots))
        table = torch.tensor([[4, 0, -1], [2, 2, 1]], dtype=torch.int32, device=device)
        cu = torch.tensor([0, 130, 200], dtype=torch.int32, device=device)
        keys = gather_indexer_cache(view, table, cu, dtype=torch.float32, backend=backend)
        at = [*range(130), *range(70)]
        rows = [0] * 130 + [1] * 70
        page = [int(table[r, a // 64]) for r, a in zip(rows, at, strict=True)]
        flat = [p * 64 + a % 64 if p >= 0 else -1 for p, a in zip(page, at, strict=True)]
        assert torch.equal(keys.cpu(), read_one_by_one(cache, torch.tensor(flat)))


def test_cache_offsets_past_two_gib(backend, device):
    """Pages 1.5 GiB apart, in memory that is never touched in between."""
    stride = 3 << 29
    if backend == "triton" and device == "cpu":
        stride = 1 << 20  # its interpreter copies the arena
    arena = torch.empty(2 * stride + 64 * 132, dtype=torch.uint8, device=device)
    cache = arena.as_strided((3, 64 * 132), (stride, 1))
    cache.copy_(fp8_cache(3))
    slots = torch.tensor([191, 130, 5, 70, -1])
    got = read_indexer_cache(cache, slots.to(device), backend=backend)
    assert torch.equal(got.cpu(), read_one_by_one(fp8_cache(3), slots))


def test_padding_slots_read_nothing(backend, device):
    """-1 and pages below zero are zeros, also where the cache holds NaN or nothing at all."""
    cache = torch.full((2, 64 * 132), 0xFF, dtype=torch.uint8, device=device)
    slots = torch.full((5,), -1, device=device)
    for some in (cache, cache[:0]):
        assert bool((read_indexer_cache(some, slots, backend=backend) == 0).all())
    table = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    cu = torch.tensor([0, 70], dtype=torch.int32, device=device)
    keys = gather_indexer_cache(cache, table, cu, dtype=torch.float32, backend=backend)
    assert bool((keys == 0).all())


def test_the_mxfp4_layout_is_the_formats(backend, device):
    """Low nibble first, a scale of 32 values each behind all values of the page."""
    if backend == "cuda":
        backend = "triton"  # MXFP4 has no CUDA form; on a GPU this is the kernel that runs
    cache, slots = mxfp4_cache(3, pad=16), slot_list(40, 192)
    got = read_indexer_cache_mxfp4(cache.to(device), slots.to(device), backend=backend)
    assert torch.equal(got.cpu(), read_mxfp4_one_by_one(cache, slots))
