"""Reads of the indexer cache: every implementation against loops, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.inputs import mxfp4_cache, slot_list
from kits.oracles import read_mxfp4_one_by_one, read_one_by_one
from kits.refusal import serve

import dsv4_plugin
from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.errors import UnmetError

READS = {
    "fp8": (dsv4_plugin.read_indexer_cache, fp8_cache, read_one_by_one),
    "mxfp4": (dsv4_plugin.read_indexer_cache_mxfp4, mxfp4_cache, read_mxfp4_one_by_one),
}
both = pytest.mark.parametrize("form", READS)
BACKENDS = ("torch", "triton", "cuda")
NO_CUDA = {"fp8": None, "mxfp4": "read_mxfp4 has no cuda implementation"}


def bits(t):
    """Compare NaN as equal and -0.0 as different from 0.0."""
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", [0, 16, 192])
def test_equals_the_loop(form, dtype, pad, backend, device):
    read, make, loop = READS[form]
    cache = make(7, pad=pad)
    slots = slot_list(90, 7 * 64)
    there = cache.to(device) if not pad else padded(cache, device)
    got = serve(lambda b: read(there, slots.to(device), dtype=dtype, backend=b),
                backend, NO_CUDA[form])  # fmt: skip
    assert same(got.cpu(), loop(cache, slots).to(dtype))


def padded(cache, device):
    """Move a strided view to a device and keep its stride."""
    arena = torch.full((cache.shape[0], cache.stride(0)), 0xFF, dtype=torch.uint8, device=device)
    view = arena[:, : cache.shape[1]]
    view.copy_(cache)
    return view


@both
@pytest.mark.parametrize("block_size,head_dim", [(32, 128), (24, 128), (64, 64), (1, 32), (16, 96)])
def test_other_geometries(form, block_size, head_dim, backend, device):
    read, make, loop = READS[form]
    cache = make(5, block_size=block_size, head_dim=head_dim)
    cache = make(5, block_size=block_size, head_dim=head_dim, pad=-cache.shape[1] % 4)
    slots = slot_list(40, 5 * block_size)
    there, slots_there = padded(cache, device), slots.to(device)
    narrow = f"head_dim is {head_dim}" if head_dim != 128 else None
    got = serve(lambda b: read(there, slots_there, block_size=block_size, head_dim=head_dim,
                               backend=b),
                backend, NO_CUDA[form] or narrow)  # fmt: skip
    assert same(got.cpu(), loop(cache, slots, block_size, head_dim))


@pytest.mark.parametrize("pad", [60, 64])
@pytest.mark.parametrize("shape", [(64, 132), (64, 1, 132)])
def test_engine_views(shape, pad, backend, device):
    cache = fp8_cache(3, pad=pad)
    view = padded(cache, device)
    strides = (view.stride(0), 132, 1) if len(shape) == 2 else (view.stride(0), 132, 132, 1)
    engine = view.as_strided((3, *shape), strides)
    slots = torch.arange(3 * 64, device=device)
    got = serve(lambda b: dsv4_plugin.read_indexer_cache(engine, slots, backend=b),
                backend, "multiples of 4 bytes" if pad == 60 else None)  # fmt: skip
    assert same(got.cpu(), read_one_by_one(cache, slots.cpu()))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_slots_on_any_device(form, dtype, backend, device):
    read, make, loop = READS[form]
    cache = make(2)
    slots = torch.tensor([0, 5, 127, 64, 63], dtype=dtype)  # on the CPU, wherever the cache is
    got = serve(lambda b: read(cache.to(device), slots, backend=b), backend, NO_CUDA[form])
    assert got.device.type == torch.device(device).type
    assert same(got.cpu(), loop(cache, slots))


@both
def test_every_byte(form, backend, device):
    """All 256 codes, NaN among them, under a scale that is no power of two."""
    read, make, loop = READS[form]
    cache = make(2)
    cache[0, :256] = torch.arange(256).to(torch.uint8)
    slots = torch.arange(4, device=device)
    got = serve(lambda b: read(cache.to(device), slots, backend=b), backend, NO_CUDA[form]).cpu()
    want = loop(cache, torch.arange(4))
    assert torch.equal(got.isnan(), want.isnan())
    assert same(got.nan_to_num(7.0), want.nan_to_num(7.0))


@both
def test_padding_empty_cache_and_no_slots(form, backend, device):
    read, make, _ = READS[form]
    cache = make(3).to(device)
    minus = torch.full((9,), -1, device=device)

    def got(cache, slots):
        return serve(lambda b: read(cache, slots, backend=b), backend, NO_CUDA[form]).cpu()

    assert read(cache, minus[:0], backend=backend).shape == (0, 128)
    assert same(got(cache, minus), torch.zeros(9, 128))
    assert same(got(cache, minus - 7), torch.zeros(9, 128))
    for slots in (minus, minus + 1):
        assert same(got(cache[:0], slots), torch.zeros(9, 128))


@both
def test_slot_past_the_end(form, backend, device):
    read, make, _ = READS[form]
    cache = make(3).to(device)
    with pytest.raises(IndexError, match="slot 192.*192 slots"):
        read(cache, torch.tensor([0, 192]), backend=backend)
    if torch.device(device).type == "cuda":
        slots = torch.tensor([0, 192, 1 << 40], device=device)
        got = serve(lambda b: read(cache, slots, backend=b), backend, NO_CUDA[form])
        assert not got[0].isnan().any() and got[1:].isnan().all()


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64]  # fmt: skip


@both
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_dtype_of_slots(form, dtype, backend, device):
    """Contiguous and strided; below zero is padding where the dtype goes below zero."""
    read, make, loop = READS[form]
    cache = make(2)
    plain = torch.tensor([0, 5, 100, 7, 127])
    there, want = cache.to(device), loop(cache, plain)
    for slots in (plain.to(dtype), plain.to(dtype).repeat_interleave(2)[::2]):
        for on in (slots, slots.to(device)):
            got = serve(lambda b, on=on: read(there, on, backend=b), backend, NO_CUDA[form])
            assert same(got.cpu(), want)
    with pytest.raises(IndexError, match="slot_mapping holds slot 127"):
        read(there[:1], plain.to(dtype), backend=backend)
    if dtype.is_signed:
        padding = torch.tensor([-1, -128], dtype=dtype, device=device)
        got = serve(lambda b: read(there, padding, backend=b), backend, NO_CUDA[form])
        assert same(got.cpu(), torch.zeros(2, 128))


@both
def test_the_largest_unsigned_slots_are_past_the_end(form, backend, device):
    """Not padding, which they would be as int64."""
    read, make, _ = READS[form]
    cache = make(2).to(device)
    slots = torch.tensor([0, 1 << 63, (1 << 64) - 1], dtype=torch.uint64)
    with pytest.raises(IndexError, match="past the end"):
        read(cache, slots, backend=backend)
    if torch.device(device).type == "cuda":
        there = slots.to(device)
        got = serve(lambda b: read(cache, there, backend=b), backend, NO_CUDA[form])
        assert not got[0].isnan().any() and got[1:].isnan().all()


@both
def test_results_below_the_normal_range(form, backend, device):
    """Subnormal products, their ties and NaN, rounded to bfloat16 as torch rounds them."""
    read, make, _ = READS[form]
    cache = make(4)
    if form == "fp8":
        g = torch.Generator().manual_seed(0)
        words = torch.randint(0, 0x01400000, (4, 64), generator=g).int()
        words[0, :4] = torch.tensor([0x0060466D, 1, 0x00008000, 0x00018000]).int()
        cache[:, 64 * 128 :] = words.view(torch.uint8).view(4, 256)
    else:
        cache[:, 64 * 64 :] = torch.arange(256).remainder(9).to(torch.uint8)
    slots = torch.arange(256)
    want = read(cache, slots, dtype=torch.float32, backend="torch").bfloat16()
    tiny = (want.abs() < torch.finfo(torch.bfloat16).tiny) & (want != 0)
    assert int(tiny.sum()) > 1000, "nothing of what is to be tested"
    there = cache.to(device)
    got = serve(lambda b: read(there, slots.to(device), dtype=torch.bfloat16, backend=b),
                backend, NO_CUDA[form]).cpu()  # fmt: skip
    assert torch.equal(got.isnan(), want.isnan())
    assert same(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert same(read(cache, slots, dtype=torch.bfloat16, backend="torch").nan_to_num(7.0),
                want.nan_to_num(7.0))  # fmt: skip


@both
def test_out_is_filled_and_returned(form, backend, device):
    read, make, loop = READS[form]
    cache = make(3)
    slots = slot_list(21, 192)
    buffer = torch.full((23, 200), 7.0, device=device)
    out = buffer[1:22, 8:136]
    there = cache.to(device)
    got = serve(lambda b: read(there, slots.to(device), out=out, backend=b),
                backend, NO_CUDA[form])  # fmt: skip
    assert got is out
    assert same(out.cpu(), loop(cache, slots))
    rest = buffer.clone()
    rest[1:22, 8:136] = 7.0
    assert bool((rest == 7.0).all()), "wrote outside of out"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_waits_for_the_kernel_before_it(backend):
    """In a graph each read takes slots that the kernel just before it wrote, into one buffer.

    A kernel launched programmatically may start early; it must not look at the slots early, nor
    overwrite what the one before it still writes.
    """
    cache = fp8_cache(256).cuda()
    lists = [slot_list(4096, 256 * 64, seed=i).cuda() for i in range(12)]
    wanted = [dsv4_plugin.read_indexer_cache(cache, s, backend="torch") for s in lists]
    slots, out = torch.zeros_like(lists[0]), torch.empty_like(wanted[0])
    kept = [torch.empty_like(out) for _ in lists]

    def chain():
        for source, keep in zip(lists, kept, strict=True):
            torch.add(source, 0, out=slots)
            dsv4_plugin.read_indexer_cache(cache, slots, out=out, backend=backend)
            dsv4_plugin.read_indexer_cache(cache, slots.flip(0), out=out, backend=backend)
            dsv4_plugin.read_indexer_cache(cache, slots, out=out, backend=backend)
            torch.mul(out, 1.0, out=keep)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(5):
        for keep in kept:
            keep.fill_(-1.0)
        graph.replay()
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(kept, wanted, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(1, 6),
    slots=st.lists(st.integers(-3, 6 * 16 - 1), max_size=40),
    pad=st.sampled_from([0, 4, 12, 16]),
    form=st.sampled_from(list(READS)),
    seed=st.integers(0, 5),
)
def test_property_torch_equals_the_loop(pages, slots, pad, form, seed):
    read, make, loop = READS[form]
    cache = make(pages, block_size=16, head_dim=32, pad=pad, seed=seed)
    slots = torch.tensor(slots, dtype=torch.int64).clamp(max=pages * 16 - 1)
    got = read(cache, slots, block_size=16, head_dim=32, backend="torch")
    assert same(got, loop(cache, slots, 16, 32))


CACHE = torch.zeros(2, 64 * 132, dtype=torch.uint8)
SLOTS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"cache": CACHE.float()}, TypeError, "cache.*uint8.*float32"),
        ({"cache": CACHE[0]}, ValueError, "cache.*dimensions"),
        ({"cache": CACHE[:, :-1]}, ValueError, "cache.*8448.*8447"),
        ({"cache": CACHE.t().contiguous().t()}, ValueError, "cache.*unit inner stride"),
        ({"cache": torch.zeros(2, 8450, dtype=torch.uint8)}, ValueError, "stride.*multiple of 4"),
        ({"slot_mapping": SLOTS.float()}, TypeError, "slot_mapping.*float32"),
        ({"slot_mapping": SLOTS[None]}, ValueError, "slot_mapping.*1 dimensions"),
        ({"slot_mapping": [1, 2]}, TypeError, "slot_mapping.*list"),
        ({"dtype": torch.float16}, ValueError, "dtype.*float32, bfloat16.*float16"),
        ({"block_size": 0}, ValueError, "block_size.*0"),
        ({"head_dim": 126}, ValueError, "head_dim.*4.*126"),
        ({"out": torch.zeros(2, 128)}, ValueError, r"out.*\(3, 128\)"),
        ({"out": torch.zeros(128, 3).t()}, ValueError, "out.*unit stride"),
        ({"out": torch.zeros(3, 128, dtype=torch.int32)}, TypeError, "out.*int32"),
        ({"out": torch.zeros(1, 128).expand(3, 128)}, ValueError, "out.*overlap"),
        ({"backend": "cuda"}, UnmetError, "on cpu, not on a CUDA device"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"cache": CACHE, "slot_mapping": SLOTS} | change
    with pytest.raises(error, match=words):
        dsv4_plugin.read_indexer_cache(
            arguments.pop("cache"), arguments.pop("slot_mapping"), **arguments
        )
