"""The paged gather: the quantised form bit for bit, the dequantised form equal to the read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.oracles import read_one_by_one
from kits.refusal import serve

from dsv4_plugin import gather_indexer_cache
from dsv4_plugin.cli.checks.inputs import fp8_cache

BACKENDS = ("torch", "triton", "cuda")


def problem(lens, pages=40, pad=0, seed=0):
    """A cache, a block table with unused entries at -1, cu_seq_lens, and the slots they mean."""
    g = torch.Generator().manual_seed(seed)
    cache = fp8_cache(pages, pad=pad, seed=seed)
    width = max([-(-n // 64) for n in lens], default=0) + 1
    table = torch.full((len(lens), width), -1, dtype=torch.int32)
    slots = []
    for b, n in enumerate(lens):
        used = torch.randperm(pages, generator=g)[: -(-n // 64)]
        table[b, : len(used)] = used.int()
        slots += [int(used[t // 64]) * 64 + t % 64 for t in range(n)]
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    return cache, table, cu, torch.tensor(slots, dtype=torch.int64)


def codes_and_scales(cache, slots):
    page, at = slots // 64, slots % 64
    values = cache[:, : 64 * 128].unflatten(1, (64, 128))[page, at]
    scales = cache[:, 64 * 128 : 64 * 132].unflatten(1, (64, 4))[page, at]
    return values, scales


def check(lens, backend, device, pad=0, seed=0, cu_dtype=torch.int32):
    cache, table, cu, slots = problem(lens, pad=pad, seed=seed)
    on = [t.to(device) for t in (cache, table, cu.to(cu_dtype))]
    values, scales = gather_indexer_cache(*on, backend=backend)
    want_values, want_scales = codes_and_scales(cache, slots)
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert torch.equal(values.cpu().view(torch.uint8), want_values)
    assert torch.equal(scales.cpu().view(torch.uint8).reshape(-1, 4), want_scales)
    keys = read_one_by_one(cache, slots)
    for dtype in (torch.float32, torch.bfloat16):
        got = gather_indexer_cache(*on, dtype=dtype, backend=backend)
        assert got.dtype == dtype and torch.equal(got.cpu(), keys.to(dtype))


@pytest.mark.parametrize(
    "lens",
    [
        (1,),
        (64,),
        (65,),
        (0, 3, 0, 0, 200, 1, 0),
        (63, 64, 65, 128, 0),
        tuple([5] * 33),
        tuple([1] * 100),
    ],
)
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_gather(lens, cu_dtype, backend, device):
    check(lens, backend, device, cu_dtype=cu_dtype)


@pytest.mark.parametrize("pad", [4, 64, 448])
def test_strided_pages(pad, backend, device):
    cache, table, cu, slots = problem((100, 30), pad=pad)
    arena = torch.full((cache.shape[0], cache.stride(0)), 0xFF, dtype=torch.uint8, device=device)
    view = arena[:, : cache.shape[1]]
    view.copy_(cache)
    on = view, table.to(device), cu.to(device)
    unaligned = "multiples of 4 bytes" if pad % 16 else None
    values, scales = serve(lambda b: gather_indexer_cache(*on, backend=b), backend, unaligned)
    want_values, want_scales = codes_and_scales(cache, slots)
    assert torch.equal(values.cpu().view(torch.uint8), want_values)
    assert torch.equal(scales.cpu().view(torch.uint8).reshape(-1, 4), want_scales)


def test_engine_workspace(backend, device):
    """As an engine calls it: uint8 scales [T, 4], buffers longer than what is gathered."""
    cache, table, cu, slots = problem((70, 0, 9))
    values = torch.full((100, 128), 0xAB, dtype=torch.uint8, device=device)
    scales = torch.full((100, 4), 0xCD, dtype=torch.uint8, device=device)
    gather_indexer_cache(cache.view(-1, 64, 132).to(device), table.to(device), cu.to(device),
                         out=(values, scales), backend=backend)  # fmt: skip
    want_values, want_scales = codes_and_scales(cache, slots)
    assert torch.equal(values[:79].cpu(), want_values)
    assert torch.equal(scales[:79].cpu(), want_scales)
    assert bool((values[79:] == 0xAB).all()) and bool((scales[79:] == 0xCD).all())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strided_sequence_ends(dtype, backend, device):
    cache, table, cu, slots = problem((70, 0, 9))
    apart = torch.full((2 * len(cu),), 55, dtype=dtype, device=device)
    apart[::2] = cu.to(device)
    got = gather_indexer_cache(
        cache.to(device), table.to(device), apart[::2], dtype=torch.float32, backend=backend
    )
    assert torch.equal(got.cpu(), read_one_by_one(cache, slots))


def test_results_below_the_normal_range(backend, device):
    cache, table, cu, _ = problem((64, 100))
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 0x01400000, (len(cache), 64), generator=g).int()
    cache[:, 64 * 128 :] = words.view(torch.uint8).view(len(cache), 256)
    want = gather_indexer_cache(cache, table, cu, dtype=torch.float32, backend="torch").bfloat16()
    tiny = (want.abs() < torch.finfo(torch.bfloat16).tiny) & (want != 0)
    assert int(tiny.sum()) > 1000, "nothing of what is to be tested"
    got = gather_indexer_cache(cache.to(device), table.to(device), cu.to(device),
                               dtype=torch.bfloat16, backend=backend).cpu()  # fmt: skip
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(7.0), want.nan_to_num(7.0)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_padding_pages_and_pages_past_the_end(backend, device):
    cache, _, _, _ = problem((1,))
    table = torch.tensor([[0, -1, 40, 3]], dtype=torch.int32)
    cu = torch.tensor([0, 64 * 5])  # one page more than the table is wide
    got = gather_indexer_cache(cache.to(device), table.to(device), cu.to(device),
                               dtype=torch.float32, backend=backend).cpu()  # fmt: skip
    assert torch.equal(got[:64], read_one_by_one(cache, torch.arange(64)))
    assert bool((got[64:128] == 0).all())
    assert bool(got[128:192].isnan().all())
    assert torch.equal(got[192:256], read_one_by_one(cache, torch.arange(192, 256)))
    assert bool(got[256:].isnan().all())
    values, scales = gather_indexer_cache(
        cache.to(device), table.to(device), cu.to(device), backend=backend
    )
    codes = values.cpu().view(torch.uint8)
    assert bool((codes[64:128] == 0).all()) and bool((scales[64:128] == 0).all())
    for past in (slice(128, 192), slice(256, None)):
        assert bool((codes[past] == 0x7F).all()) and bool(scales[past].isnan().all())


@settings(max_examples=25, deadline=None)
@given(lens=st.lists(st.integers(0, 150), min_size=1, max_size=6), seed=st.integers(0, 3))
def test_property(lens, seed):
    check(lens, "torch", "cpu", seed=seed)


TABLE = torch.zeros(2, 3, dtype=torch.int32)
CU = torch.tensor([0, 3, 5])


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"block_table": TABLE.long()}, TypeError, "block_table.*int32.*int64"),
        ({"cu_seq_lens": CU[:2]}, ValueError, r"cu_seq_lens.*2 \+ 1.*2"),
        ({"cu_seq_lens": CU.float()}, TypeError, "cu_seq_lens.*float32"),
        ({"dtype": torch.float16}, ValueError, "dtype.*float16"),
        ({"out": torch.zeros(5, 128)}, ValueError, "out.*values, scales"),
        ({"out": (torch.zeros(5, 128).byte(), torch.zeros(4))}, ValueError, r"out\[1\].*\[5\]"),
        ({"out": (torch.zeros(5, 64).byte(), torch.zeros(5))}, ValueError, r"out\[0\].*128"),
    ],
)
def test_bad_input(change, error, words):
    cache = fp8_cache(4)
    arguments = {"block_table": TABLE, "cu_seq_lens": CU} | change
    with pytest.raises(error, match=words):
        gather_indexer_cache(
            cache, arguments.pop("block_table"), arguments.pop("cu_seq_lens"), **arguments
        )
