"""The CUDA reads of the indexer cache against the reference, on a GPU; reads inside CUDA graphs."""

import pytest
import torch
from kits.canary import Canaries
from kits.inputs import slot_list
from kits.replay import capture

import dsv4_plugin
from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.errors import UnmetError

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


def read_indexer_cache(cache, slots, **more):
    """The op; without `out` every tensor of the call lies between canaries."""
    if "out" in more:
        return dsv4_plugin.read_indexer_cache(cache, slots, **more)
    canaries = Canaries()
    shape = len(slots), more.get("head_dim", 128)
    out = canaries.output("out", *shape, more.pop("dtype", torch.float32), cache.device)
    cache, slots = canaries.around("cache", cache), canaries.around("slots", slots)
    dsv4_plugin.read_indexer_cache(cache, slots, out=out, **more)
    canaries.check("of a read")
    return out.clone()


def gather_indexer_cache(cache, table, cu, **more):
    """The op; without `out` every tensor of the call lies between canaries."""
    if "out" in more:
        return dsv4_plugin.gather_indexer_cache(cache, table, cu, **more)
    canaries, total, dtype = Canaries(), int(cu[-1]), more.get("dtype")
    values = canaries.output("values", total, 128, dtype or torch.uint8, cache.device)
    scales = canaries.output("scales", total, 4, torch.uint8, cache.device)
    out = values if dtype else (values, scales)
    given = [canaries.around(*p) for p in (("cache", cache), ("table", table), ("cu", cu))]
    dsv4_plugin.gather_indexer_cache(*given, out=out, **more)
    canaries.check("of a gather")
    return values.clone() if dtype else (values.clone(), scales.clone())


def same(a, b):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    size = a.element_size()
    clean = [t.contiguous() if size == 1 else t.nan_to_num(7.0).contiguous() for t in (a, b)]
    if size > 1 and not torch.equal(a.isnan(), b.isnan()):
        return False
    return torch.equal(clean[0].view(integers[size]), clean[1].view(integers[size]))


def on_gpu(cache):
    """Move a cache to the GPU, keeping its page stride."""
    arena = torch.full((cache.shape[0], cache.stride(0)), 0xFF, dtype=torch.uint8, device="cuda")
    view = arena[:, : cache.shape[1]]
    view.copy_(cache)
    return view


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 7, 8, 9, 63, 64, 65, 1000, 14_338])
@pytest.mark.parametrize("pad", [0, 16, 448])
def test_read(dtype, tokens, pad):
    cache = on_gpu(fp8_cache(50, pad=pad))
    cache[0, :256] = torch.arange(256, device="cuda").to(torch.uint8)  # every byte, NaN too
    for slots_dtype in (torch.int64, torch.int32, torch.int16):
        slots = slot_list(tokens, 3200).to(slots_dtype)
        slots[0], slots[-1] = 1, 0
        slots = slots.cuda()
        got = read_indexer_cache(cache, slots, dtype=dtype, backend="cuda")
        assert same(got, read_indexer_cache(cache, slots, dtype=dtype, backend="torch"))


@pytest.mark.parametrize("block_size", [1, 3, 32, 64, 100, 256])
def test_block_sizes(block_size):
    need = block_size * 132
    cache = on_gpu(fp8_cache(9, block_size=block_size, pad=-need % 16))
    slots = slot_list(200, 9 * block_size).cuda()
    got = read_indexer_cache(cache, slots, block_size=block_size, backend="cuda")
    assert same(got, read_indexer_cache(cache, slots, block_size=block_size, backend="torch"))


def test_padding_and_past_the_end():
    cache = fp8_cache(4).cuda()
    slots = torch.tensor([-1, -(1 << 40), 255, 256, 1 << 40], device="cuda")
    got = read_indexer_cache(cache, slots, backend="cuda")
    assert bool((got[:2] == 0).all()) and not bool(got[2].isnan().any())
    assert bool(got[3:].isnan().all())
    assert bool((read_indexer_cache(cache[:0], slots, backend="cuda") == 0).all())


def test_out_rows_of_a_wider_buffer():
    cache = fp8_cache(4).cuda()
    slots = slot_list(37, 256).cuda()
    buffer = torch.full((39, 256), 7.0, device="cuda")
    out = buffer[1:38, 64:192]
    assert read_indexer_cache(cache, slots, out=out, backend="cuda") is out
    assert same(out, read_indexer_cache(cache, slots, backend="torch"))
    out.fill_(7.0)
    assert bool((buffer == 7.0).all())


@pytest.mark.parametrize(
    "lens", [(1,), (64, 0, 65), (0, 0, 5), tuple(range(70)), (1000, 1, 0, 3000), tuple([3] * 300)]
)
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_gather(lens, cu_dtype):
    cache = on_gpu(fp8_cache(60, pad=64))
    g = torch.Generator().manual_seed(0)
    width = max(-(-n // 64) for n in lens) + 1
    # -1 is padding, 60 and 61 are past the end.
    table = torch.randint(-1, 62, (len(lens), width), generator=g).int().cuda()
    cu = torch.tensor([0, *lens]).cumsum(0).to(cu_dtype).cuda()
    for dtype in (None, *DTYPES):
        got = gather_indexer_cache(cache, table, cu, dtype=dtype, backend="cuda")
        want = gather_indexer_cache(cache, table, cu, dtype=dtype, backend="torch")
        for a, b in zip(*((t,) if dtype else t for t in (got, want)), strict=True):
            assert same(a, b)
    values = torch.full((sum(lens) + 40, 128), 0xAB, dtype=torch.uint8, device="cuda")
    scales = torch.full((sum(lens) + 40, 4), 0xCD, dtype=torch.uint8, device="cuda")
    gather_indexer_cache(cache, table, cu, out=(values, scales), backend="cuda")
    assert bool((values[sum(lens) :] == 0xAB).all()) and bool((scales[sum(lens) :] == 0xCD).all())


def test_a_position_past_the_table():
    cache = fp8_cache(4).cuda()
    table = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, 200], device="cuda")
    got = gather_indexer_cache(cache, table, cu, dtype=torch.float32, backend="cuda")
    assert not bool(got[:128].isnan().any()) and bool(got[128:].isnan().all())


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_page_stride_past_two_gib(backend):
    """Pages 1.5 GiB apart: offsets need 64 bits."""
    stride = 3 << 29
    arena = torch.empty(2 * stride + 64 * 132, dtype=torch.uint8, device="cuda")
    cache = arena.as_strided((3, 64 * 132), (stride, 1))
    cache.copy_(fp8_cache(3))
    slots = torch.tensor([191, 130, 5, 70, -1], device="cuda")
    got = read_indexer_cache(cache, slots, backend=backend)
    assert same(got.cpu(), read_indexer_cache(fp8_cache(3), slots.cpu(), backend="torch"))


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_in_a_cuda_graph(backend):
    cache = fp8_cache(40).cuda()
    slots = slot_list(500, 2560).cuda()
    table = torch.arange(40, dtype=torch.int32, device="cuda").reshape(4, 10)
    cu = torch.tensor([0, 100, 300, 400, 500], dtype=torch.int32, device="cuda")
    out = torch.empty(500, 128, device="cuda")
    keys = torch.empty(500, 128, dtype=torch.bfloat16, device="cuda")

    def both():
        read_indexer_cache(cache, slots, out=out, backend=backend)
        gather_indexer_cache(cache, table, cu, dtype=keys.dtype, out=keys, backend=backend)

    graph = capture(both)
    for seed in range(5):
        cache.copy_(fp8_cache(40, seed=seed))
        slots.copy_(slot_list(500, 2560, seed=seed))
        out.fill_(7)
        graph.replay()
        assert same(out, read_indexer_cache(cache, slots, backend="torch"))
        want = gather_indexer_cache(cache, table, cu, dtype=keys.dtype, backend="torch")
        assert same(keys, want)


def test_what_the_cuda_form_refuses_goes_to_triton():
    cache = on_gpu(fp8_cache(5, pad=4))
    slots = slot_list(20, 320).cuda()
    with pytest.raises(UnmetError, match="multiples of 4 bytes, the kernels need 16"):
        read_indexer_cache(cache, slots, backend="cuda")
    want = read_indexer_cache(cache, slots, backend="torch")
    assert same(read_indexer_cache(cache, slots), want)
    small = fp8_cache(5, head_dim=64).cuda()
    with pytest.raises(UnmetError, match="head_dim is 64, the kernels need 128"):
        read_indexer_cache(small, slots, head_dim=64, backend="cuda")
    got = read_indexer_cache(small, slots, head_dim=64)
    assert same(got, read_indexer_cache(small, slots, head_dim=64, backend="torch"))
