"""Index logits: scores against float64, lengths, pages, strides, forms, in each implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.logits_cases import (
    TOLERANCE,
    D,
    Paged,
    bits,
    check,
    codes,
    oracle,
    paged,
    ragged_oracle,
    untouched,
)

from dsv4_plugin import paged_logits, ragged_logits, select, topk
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.kernels import reference_logits

BACKENDS = ("torch", "cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [200, 0, 1, 63, 64, 65, -1, 128, 129, 199, 5, 192]  # divisible by 1, 2, 4 and 6


def filled(rows, columns, dtype, device="cpu"):
    """A result in which every element is known."""
    return torch.full((rows, columns), -77.0, dtype=dtype, device=device)


def verify(case, out, before, backend, n=None, block_size=64):
    n = case.lengths if n is None else n
    score, size = oracle(case, block_size, out.shape[1])
    check(out, score, size, n, TOLERANCE[backend, case.kind], f"{backend}, {case.kind}")
    untouched(out, n, before)


@pytest.mark.parametrize("kind", ["normal", "bytes"])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(dtype, next_n, heads, kind, backend, device):
    case = paged(LENGTHS, next_n, heads, kind=kind).to(device)
    out = filled(len(LENGTHS), 256, dtype, device)
    before = out.clone()
    assert paged_logits(*case.arguments, out=out, backend=backend) is out
    verify(case, out, before, backend)
    new = paged_logits(*case.arguments, dtype=dtype, backend=backend)
    assert (new.shape, new.dtype, new.stride(0) * new.itemsize % 16) == (out.shape, dtype, 0)
    valid = torch.arange(256, device=device) < case.lengths[:, None]
    assert torch.equal(bits(new)[valid], bits(out)[valid])


@pytest.mark.parametrize("form", ["rows", "batch", "batch1", "two_d", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forms_of_lengths(form, dtype, backend, device):
    next_n = 3
    a_request = torch.tensor([190, 65, 2, 0], dtype=dtype)
    per_row = (a_request[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0).to(dtype)
    case = paged(per_row.reshape(-1).tolist(), next_n, kind="bytes").to(device)
    n = per_row.reshape(-1).to(device)
    lengths = {
        "rows": n,
        "batch": a_request.to(device),
        "batch1": a_request[:, None].to(device),
        "two_d": per_row.to(device),
        "strided": torch.stack([n.view(4, 3), n.view(4, 3) + 9], -1).flatten(1)[:, ::2],
    }[form]
    out = filled(12, 192, torch.float32, device)
    before = out.clone()
    paged_logits(case.q, case.cache, case.weights, lengths, case.table, out=out, backend=backend)
    verify(case, out, before, backend, n)


@pytest.mark.parametrize("columns", [1, 63, 64, 100, 192, 300])
def test_columns_of_out(columns, backend, device):
    """`out` narrower or wider than the table; slices of a buffer.

    `out` bounds what is written. Past the table there are no pages, so the scores are -inf.
    """
    case = paged([10_000, 192, 150, 1, 0, 64], 2, columns=192, kind="bytes").to(device)
    for offset in (0, 1, 3, 8):
        buffer = filled(8, columns + 16, torch.bfloat16, device)
        out = buffer[1:7, offset : offset + columns]
        before = out.clone()
        assert paged_logits(*case.arguments, out=out, backend=backend) is out
        verify(case, out, before, backend, case.lengths.clamp(max=columns))
        out.fill_(-77.0)
        assert bool((buffer == -77.0).all()), "wrote outside of out"


def test_pages_that_are_none(backend, device):
    """-inf within the length for a page below zero or past the end; past the length anything."""
    case = paged([256, 200, 64, 129], columns=256)
    case.table[0] = torch.tensor([-1, 2, len(case.cache), 3])
    case.table[1] = torch.tensor([5, -(1 << 31), (1 << 31) - 1, 0])
    case.table[2, 1:] = 1 << 30  # padding, and not read
    case.table[3, 3:] = -9
    case = case.to(device)
    out = filled(4, 256, torch.bfloat16, device)
    before = out.clone()
    paged_logits(*case.arguments, out=out, backend=backend)
    verify(case, out, before, backend)
    assert bool((out[0, :64] == -torch.inf).all()) and bool((out[1, 64:192] == -torch.inf).all())
    none = paged_logits(case.q, case.cache[:0], *case.arguments[2:], out=before, backend=backend)
    valid = torch.arange(256, device=device) < case.lengths[:, None]
    assert bool((none[valid] == -torch.inf).all()) and bool((none[~valid] == -77.0).all())


@pytest.mark.parametrize("pad", [0, 16, 448, 4])
def test_strides_and_forms_of_the_cache(pad, backend, device):
    if pad % 16 and backend == "cuda":
        case = paged([64], pad=pad).to(device)
        with pytest.raises(UnmetError, match="multiples of 4 bytes, the kernels need 16"):
            paged_logits(*case.arguments, backend="cuda")
        return
    case = paged([300, 17, 256], pad=pad).to(device)
    want = paged_logits(*case.arguments, dtype=torch.float32, backend=backend)
    score, size = oracle(case)
    check(want, score, size, case.lengths, TOLERANCE[backend, "normal"])
    valid = torch.arange(want.shape[1], device=device) < case.lengths[:, None]
    stride = case.cache.stride(0)
    for shape, strides in (((64, 132), (132, 1)), ((64, 1, 132), (132, 132, 1))):
        view = case.cache.as_strided((len(case.cache), *shape), (stride, *strides))
        got = paged_logits(case.q, view, *case.arguments[2:], dtype=want.dtype, backend=backend)
        assert torch.equal(got[valid], want[valid])


def test_forms_and_strides_of_the_queries(backend, device):
    case = paged([100, 65, 130, 64], 2).to(device)
    want = paged_logits(*case.arguments, dtype=torch.float32, backend=backend)
    valid = torch.arange(want.shape[1], device=device) < case.lengths[:, None]
    arena = torch.full((2, 5, 64, D), 0x7F, dtype=torch.uint8, device=device)
    arena[:, 1:3] = case.q.view(torch.uint8)
    weights = torch.full((4, 99), float("nan"), device=device)
    weights[:, :64] = case.weights
    table = torch.full((2, 9), -1, dtype=torch.int32, device=device)
    table[:, : case.table.shape[1]] = case.table
    for q in (arena[:, 1:3], arena.view(torch.float8_e4m3fn)[:, 1:3]):
        got = paged_logits(
            q, case.cache, weights[:, :64], case.lengths, table[:, : case.table.shape[1]],
            dtype=want.dtype, backend=backend,
        )  # fmt: skip
        assert torch.equal(got[valid], want[valid])
    flat = paged_logits(  # three dimensions: one row a request
        case.q.flatten(0, 1), case.cache, case.weights, case.lengths,
        case.table.repeat_interleave(2, 0), dtype=want.dtype, backend=backend,
    )  # fmt: skip
    assert torch.equal(flat[valid], want[valid])


@pytest.mark.parametrize("columns", [100, 128, 300])
@pytest.mark.parametrize("next_n", [1, 2])
def test_lengths_past_the_table(columns, next_n, backend, device):
    """Into a buffer wider than the table, then a selection with the lengths as they were."""
    case = paged([250, 128, 130, 5], next_n, columns=128).to(device)
    out = torch.full((4, columns), 1e30, device=device)
    before = out.clone()
    paged_logits(*case.arguments, out=out, backend=backend)
    verify(case, out, before, backend)
    chosen = topk(out, case.lengths, 32, next_n=next_n, backend=backend)
    assert not bool((chosen >= 128).any())
    assert bool((select(*case.arguments, 32, logits=out, backend=backend) < 128).all())
    for batch in (1, 4 // next_n):  # a lone request is dealt out in another way
        none = before[: batch * next_n].clone()
        rows = slice(0, batch * next_n)
        paged_logits(case.q[:batch], case.cache, case.weights[rows], case.lengths[rows],
                     case.table[:batch, :0], out=none, backend=backend)  # fmt: skip
        inside = torch.arange(columns, device=device) < case.lengths[rows, None]
        assert bool((none[inside] == -torch.inf).all()) and bool((none[~inside] == 1e30).all())


@pytest.mark.parametrize("next_n", [2, 3])
def test_random_lengths_a_row_and_tables_with_a_stride(next_n, backend, device):
    """`[batch, next_n]` lengths, 0 among them, on `block_table[::next_n]` of one row a token."""
    g = torch.Generator().manual_seed(next_n)
    n = torch.randint(0, 200, (5, next_n), generator=g)
    n[1], n[2, 0] = 0, 0
    case = paged(n.reshape(-1).tolist(), next_n, columns=200).to(device)
    case.table = case.table.repeat_interleave(next_n, 0)[::next_n]
    assert case.table.stride(0) == next_n * case.table.shape[1]
    lengths = n.int().to(device)
    out = filled(5 * next_n, 256, torch.bfloat16, device)
    before = out.clone()
    paged_logits(*case.arguments[:3], lengths, case.table, out=out, backend=backend)
    verify(case, out, before, backend)


@pytest.mark.parametrize("heads", [8, 16])
def test_heads_padded_with_zeros_change_nothing(heads, backend, device):
    """To 32, which the CUDA kernels have: zero weights on zero queries add nothing."""
    case = paged([200, 64, 0, 131], heads=32, kind="normal")
    case.q[:, :, heads:] = torch.zeros(1, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case.weights[:, heads:] = 0.0
    few = Paged(case.q[:, :, :heads].contiguous(), case.cache, case.weights[:, :heads].contiguous(),
                case.lengths, case.table, case.kind)  # fmt: skip
    case = case.to(device)
    out = filled(4, 256, torch.float32, device)
    before = out.clone()
    paged_logits(*case.arguments, out=out, backend=backend)
    verify(case, out, before, backend)
    score, size = oracle(few)
    check(out.cpu(), score, size, few.lengths, TOLERANCE[backend, "normal"])
    if backend == "torch":
        alone = paged_logits(*few.arguments, dtype=torch.float32, backend="torch")
        valid = torch.arange(256) < few.lengths[:, None]
        assert torch.equal(alone[valid], out.cpu()[valid])


def test_identical_keys_through_the_chain(backend, device):
    """All scores are ties: the first k columns, ascending, whatever the page order."""
    case = paged([640, 513, 300, 64]).to(device)
    case.cache[:] = case.cache[:1, :].clone()
    values = case.cache[:, : 64 * D].unflatten(1, (64, D))
    values[:] = values[:1, :1].clone()
    scales = case.cache[:, 64 * D : 64 * D + 256].unflatten(1, (64, 4))
    scales[:] = torch.ones(1, device=device).view(torch.uint8)
    logits = paged_logits(*case.arguments, dtype=torch.float32, backend=backend)
    for r, n in enumerate(case.lengths.tolist()):
        assert len(logits[r, :n].unique()) == 1
    for k in (64, 512):
        got = select(*case.arguments, k, backend=backend).cpu().long()
        rank = torch.arange(k)
        assert torch.equal(got, torch.where(rank < case.lengths.cpu()[:, None], rank, -1))


def test_small_pages_and_a_guarded_slice():
    """Pages of 8 keys, bfloat16, into the middle of a buffer; only the torch form has them."""
    case = paged([37, 8, 0, 64], 2, block_size=8, pad=-8 * 132 % 4, columns=64)
    buffer = filled(6, 90, torch.bfloat16)
    out = buffer[1:5, 13:77]
    before = out.clone()
    paged_logits(*case.arguments, block_size=8, out=out)
    verify(case, out, before, "torch", block_size=8)
    out.fill_(-77.0)
    assert bool((buffer == -77.0).all()), "wrote outside of out"


def test_a_table_and_scores_of_no_width(backend, device):
    """Logits of width 0 and a table of width 0: no index, and nothing is written."""
    case = paged([64, 5]).to(device)
    table = case.table[:, :0]
    scratch = torch.empty(2, 0, dtype=torch.bfloat16, device=device)
    for logits in (None, scratch):
        raw = torch.full((2, 32), 9, dtype=torch.int32, device=device)
        got = select(*case.arguments[:4], table, 32, page_table=table, out_raw=raw, logits=logits,
                     backend=backend)  # fmt: skip
        assert bool((got == -1).all()) and bool((raw == -1).all())
    assert bool((topk(scratch, case.lengths, 32, backend=backend) == -1).all())
    assert paged_logits(*case.arguments, out=scratch, backend=backend) is scratch


def test_nan(backend, device):
    """A NaN of a query, a key, a scale or a weight makes its scores NaN, and no others."""
    case = paged([128] * 4)
    case.q[0, 0, 5].view(torch.uint8)[7] = 0x7F
    case.weights[1, 3] = torch.nan
    page = int(case.table[2, 0])
    case.cache[page, 4 * D + 9] = 0xFF
    case.cache[page, 64 * D + 4 * 6 : 64 * D + 4 * 7].view(torch.float32)[0] = torch.nan
    case = case.to(device)
    got = paged_logits(*case.arguments, backend=backend).isnan().cpu()
    assert bool(got[:2].all()) and not bool(got[3].any())
    assert got[2].nonzero().reshape(-1).tolist() == [4, 6]


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 100])
def test_block_sizes(block_size):
    case = paged([150, 1, 0, 99], block_size=block_size, pad=-block_size * 132 % 4)
    out = filled(4, -(-150 // block_size) * block_size, torch.float32)
    before = out.clone()
    paged_logits(*case.arguments, block_size=block_size, out=out, backend="torch")
    verify(case, out, before, "torch", block_size=block_size)


def test_nothing_to_score(backend, device):
    case = paged([64, 64]).to(device)
    empty = paged_logits(
        case.q[:0], case.cache, case.weights[:0], case.lengths[:0], case.table[:0], backend=backend
    )
    assert empty.shape == (0, 64)
    assert paged_logits(*case.arguments[:4], case.table[:, :0], backend=backend).shape == (2, 0)
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    k, scale = case.q[0, 0, :0].reshape(0, D), torch.zeros(0, device=device)
    none = ragged_logits(case.q[:, 0], k, scale, case.weights, starts, starts, backend=backend)
    assert none.shape == (2, 0)


# --- contiguous keys ---------------------------------------------------------------------------


def ragged(rows, keys, heads=64, kind="normal", seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randint(-12, 4, (keys,), generator=g).float())
    drawn = (
        codes((rows, heads, D), kind, g), codes((keys, D), kind, g),
        scale * torch.rand(keys, generator=g), torch.randn(rows, heads, generator=g) * 0.1,
    )  # fmt: skip
    return tuple(x.to(device) for x in drawn)


@pytest.mark.parametrize("kind", ["normal", "bytes"])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_scores(dtype, heads, kind, backend, device):
    windows = [(0, 300), (0, 0), (0, 1), (7, 70), (64, 128), (299, 300), (300, 300), (301, 400),
               (-1, 50), (20, 10), (100, 5000), (1, 300), (0, -4)]  # fmt: skip
    rows, keys = len(windows), 300
    inputs = ragged(rows, keys, heads, kind, device=device)
    for index in (torch.int32, torch.int64):
        starts, ends = torch.tensor(windows, dtype=index, device=device).T.contiguous()
        for columns in (64, 333, keys):
            score, size, n = ragged_oracle(*inputs, starts, ends, columns)
            buffer = filled(rows, columns + 5, dtype, device)
            out = buffer[:, 3 : columns + 3]
            before = out.clone()
            assert ragged_logits(*inputs, starts, ends, out=out, backend=backend) is out
            check(out, score, size, n, TOLERANCE[backend, kind], f"{columns} columns")
            untouched(out, n, before)
            out.fill_(-77.0)
            assert bool((buffer == -77.0).all()), "wrote outside of out"
    new = ragged_logits(*inputs, starts, ends, dtype=dtype, backend=backend)
    assert (new.shape, new.dtype, new.stride(0) * new.itemsize % 16) == ((rows, keys), dtype, 0)
    check(new, score, size, n, TOLERANCE[backend, kind])


def test_ragged_selection(backend, device):
    """The chain of prefill: indices count from the start of the window."""
    inputs = ragged(5, 700, device=device)
    starts = torch.tensor([0, 0, 100, 350, 690], dtype=torch.int32, device=device)
    ends = torch.tensor([700, 0, 640, 700, 700], dtype=torch.int32, device=device)
    logits = ragged_logits(*inputs, starts, ends, dtype=torch.float32, backend=backend)
    got = topk(logits, ends - starts, 32, sort=True, backend=backend).cpu()
    score, _, n = ragged_oracle(*inputs, starts, ends)
    for r in range(5):
        best = score[r, : n[r]].sort(descending=True, stable=True).indices[:32].cpu()
        want = torch.full((32,), -1)
        want[: len(best)] = best.sort().values if n[r] <= 32 else best
        assert set(got[r].tolist()) == set(want.tolist())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("columns", [100, 64, 333])
def test_windows_past_the_keys_are_written_whole(columns, index, backend, device):
    """A key below zero or past the end scores -inf, so a selection by the windows finds no rest."""
    windows = [(50, 130), (0, 100), (-5, 60), (-50, -10), (100, 120), (500, 900), (99, 101), (7, 3),
               (-(1 << 31), (1 << 31) - 1)]  # fmt: skip
    far = (1 << 63) - 1
    if index == torch.int64:
        windows += [(-far, far), (-far, 5), (0, far), (far - 9, far), (far, -far)]
    rows = len(windows)
    q, keys, scale, weights = ragged(rows, 100, device=device)
    starts, ends = torch.tensor(windows, dtype=index, device=device).T.contiguous()
    zero = torch.zeros_like(starts)
    whole = ragged_logits(q, keys, scale, weights, zero, zero + 100, dtype=torch.float32,
                          backend=backend).cpu()  # fmt: skip
    out = torch.full((rows, columns), 1e30, device=device)
    ragged_logits(q, keys, scale, weights, starts, ends, out=out, backend=backend)
    want = torch.full((rows, columns), 1e30)
    for r, (start, end) in enumerate(windows):
        for c in range(max(0, min(columns, end - start))):
            key = start + c
            want[r, c] = whole[r, key] if 0 <= key < 100 else -torch.inf
    assert torch.equal(out.cpu(), want)
    sane = slice(0, 8)  # differences that the index dtype holds
    chosen = topk(out[sane], (ends - starts)[sane], 32, backend=backend).cpu()
    for r, (start, end) in enumerate(windows[sane]):
        there = {c for c in range(min(columns, end - start)) if 0 <= start + c < 100}
        written = set(range(max(0, min(columns, end - start))))
        assert set(chosen[r].tolist()) - {-1} <= (there if len(there) >= 32 else written)


def test_windows_on_no_keys_at_all(backend, device):
    q, keys, scale, weights = ragged(4, 0, device=device)
    starts = torch.tensor([0, 50, -3, 7], dtype=torch.int32, device=device)
    ends = torch.tensor([60, 130, 9, 7], dtype=torch.int32, device=device)
    out = filled(4, 90, torch.bfloat16, device)
    ragged_logits(q, keys, scale, weights, starts, ends, out=out, backend=backend)
    inside = torch.arange(90, device=device) < (ends - starts)[:, None]
    assert bool((out[inside] == -torch.inf).all()) and bool((out[~inside] == -77.0).all())


def test_paged_and_ragged_agree_bit_for_bit():
    case = paged([640, 640, 640])
    keys = case.cache[case.table[0].long()]
    k, scale = keys[:, : 64 * D].reshape(-1, D), keys[:, 64 * D :].contiguous().view(torch.float32)
    table = case.table[:1].expand(3, -1)
    a = paged_logits(*case.arguments[:4], table, dtype=torch.float32, backend="torch")
    ends = torch.full((3,), 640)
    b = ragged_logits(case.q[:, 0], k, scale.reshape(-1), case.weights, torch.zeros_like(ends),
                      ends, dtype=torch.float32, backend="torch")  # fmt: skip
    assert torch.equal(a, b)


# --- the chain ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("next_n", [1, 2])
def test_select_is_logits_then_topk(dtype, next_n, backend, device):
    case = paged([1000, 999, 0, 31, 32, 33, 5000, 640], next_n, columns=1024).to(device)
    logits = paged_logits(*case.arguments, dtype=dtype, backend=backend)
    pages = torch.arange(8 // next_n * 16, device=device).view(-1, 16).int().flip(0)
    for more in ({}, {"sort": True}, {"page_table": pages}):
        want_raw = torch.full((8, 32), 5, dtype=torch.int32, device=device)
        got_raw = want_raw.clone()
        raws = ({"out_raw": want_raw}, {"out_raw": got_raw}) if "page_table" in more else ({}, {})
        want = topk(logits, case.lengths, 32, next_n=next_n, backend=backend, **more, **raws[0])
        got = select(*case.arguments, 32, dtype=dtype, backend=backend, **more, **raws[1])
        assert torch.equal(got, want) and torch.equal(got_raw, want_raw)
    scratch = torch.full((8, 1500), torch.inf, dtype=dtype, device=device)
    out = torch.zeros(8, 32, dtype=torch.int32, device=device)
    assert select(*case.arguments, 32, out=out, logits=scratch, backend=backend) is out
    assert torch.equal(out, topk(logits, case.lengths, 32, next_n=next_n, backend=backend))
    assert bool((scratch[:, 1024:] == torch.inf).all()), "columns past the table were written"


def test_select_against_float64():
    case = paged([2000, 1500, 513, 512, 100, 0])
    score, _ = oracle(case)
    got = select(*case.arguments, 512, dtype=torch.float32, backend="torch")
    for r, n in enumerate(case.lengths.tolist()):
        best = score[r, :n].sort(descending=True, stable=True).indices[:512]
        want = torch.full((512,), -1, dtype=torch.int32)
        want[: len(best)] = best.sort().values
        assert torch.equal(got[r], want)


# --- a score depends on itself only --------------------------------------------------------------


def test_independence(backend, device):
    """The same bits alone and in a batch, in every place, whatever the length."""
    case = paged([640] * 12, 2, kind="bytes").to(device)
    whole = paged_logits(*case.arguments, dtype=torch.float32, backend=backend)
    for b in (0, 3, 5):
        rows = slice(2 * b, 2 * b + 2)
        alone = paged_logits(
            case.q[b : b + 1], case.cache, case.weights[rows], case.lengths[rows],
            case.table[b : b + 1], dtype=torch.float32, backend=backend,
        )  # fmt: skip
        assert torch.equal(alone, whole[rows])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).to(device)
    moved = paged_logits(*case.arguments[:4], case.table[:, order], dtype=torch.float32,
                         backend=backend)  # fmt: skip
    assert torch.equal(moved.view(12, 10, 64), whole.view(12, 10, 64)[:, order])
    for n in (1, 63, 65, 639):
        lengths = torch.full_like(case.lengths, n)
        short = paged_logits(*case.arguments[:3], lengths, case.table, dtype=torch.float32,
                             backend=backend)  # fmt: skip
        assert torch.equal(short[:, :n], whole[:, :n])


@pytest.mark.parametrize("chunk", [1, 5000, 100_000, 1 << 30])
def test_chunks_change_nothing_and_bound_the_memory(chunk, monkeypatch):
    case = paged(LENGTHS, 2)
    inputs = ragged(20, 500)
    starts = torch.arange(20) * 3
    ends = starts + torch.arange(20) * 22
    out = filled(12, 256, torch.float32)
    rag = filled(20, 500, torch.float32)

    def both():
        a = paged_logits(*case.arguments, out=out.clone(), backend="torch")
        return a, ragged_logits(*inputs, starts, ends, out=rag.clone(), backend="torch")

    want = both()
    seen = []
    scores = reference_logits.scores

    def watched(q, keys, scale, weights):
        n, rows, heads, dim = q.shape
        seen.append(n * keys.shape[1] * max(rows * heads, dim if n > 1 else 0))
        return scores(q, keys, scale, weights)

    monkeypatch.setattr(reference_logits, "scores", watched)
    monkeypatch.setattr(reference_logits, "_CHUNK", chunk)
    got = both()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert max(seen) <= max(chunk, 64 * 2 * 64), "more than a page of a request, and over the limit"


@settings(max_examples=40, deadline=None)
@given(
    next_n=st.integers(1, 3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_property(next_n, batch, heads, columns, dtype, data):
    rows = batch * next_n
    lengths = data.draw(st.lists(st.integers(-2, 220), min_size=rows, max_size=rows))
    case = paged(lengths, next_n, heads, kind="bytes", columns=columns, seed=columns)
    out = filled(rows, columns, dtype)
    before = out.clone()
    paged_logits(*case.arguments, out=out, backend="torch")
    verify(case, out, before, "torch", case.lengths.clamp(max=columns))


# --- arguments ---------------------------------------------------------------------------------

CASE = paged([64] * 4, 2)
I32 = torch.int32


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": CASE.q.float()}, TypeError, "q must be one of float8_e4m3fn, uint8, bfloat16, got"),
        ({"q": CASE.q[0, 0]}, ValueError, "q must have 3 or 4 dimensions"),
        ({"q": CASE.q.transpose(2, 3)}, ValueError, "q must be contiguous in its last two"),
        ({"q": CASE.q[:, :, :0]}, ValueError, "q must have at least one head"),
        ({"q": CASE.q[:, :, :, :126].contiguous()}, ValueError, "head_dim.*multiple of 4, got 126"),
        ({"cache": CASE.cache.int()}, TypeError, "cache must be one of uint8"),
        ({"cache": CASE.cache[:, :100]}, ValueError, r"cache must be uint8 \[pages, >= 8448\]"),
        ({"weights": CASE.weights.half()}, TypeError, "weights must be one of float32, got"),
        ({"weights": CASE.weights[:3]}, ValueError, r"weights must be \[4, 64\].*\(3, 64\)"),
        ({"weights": CASE.weights.T.contiguous().T}, ValueError, "weights must have unit stride"),
        ({"lengths": CASE.lengths.float()}, TypeError, "lengths must be one of int32, int64"),
        ({"lengths": CASE.lengths[:3]}, ValueError, r"lengths must be \[4\] or \[2, 2\]"),
        ({"block_table": CASE.table.long()}, TypeError, "block_table must be one of int32"),
        ({"block_table": CASE.table[:1]}, ValueError, "block_table must have 2 rows"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"dtype": torch.float64}, ValueError, "dtype must be one of float32, bfloat16, float16"),
        ({"out": torch.zeros(3, 64)}, ValueError, r"out must have the shape \(4, 64\)"),
        ({"out": torch.zeros(4, 64, dtype=I32)}, TypeError, "out must be one of float32"),
        ({"out": torch.zeros(64, 4).T}, ValueError, "out must have unit stride along its rows"),
        ({"backend": "triton"}, UnmetError, "paged_logits has no triton implementation"),
        ({"backend": "cuda"}, UnmetError, "on cpu, not on a CUDA device"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    arguments = {
        "q": CASE.q, "cache": CASE.cache, "weights": CASE.weights, "lengths": CASE.lengths,
        "block_table": CASE.table,
    } | change  # fmt: skip
    with pytest.raises(error, match=words):
        paged_logits(**arguments)


def test_every_unmet_condition_of_the_kernel():
    case = paged([64], heads=3, block_size=16)
    with pytest.raises(UnmetError) as error:
        paged_logits(*case.arguments, block_size=16, backend="cuda")
    for words in ("tensors are on cpu", "3 heads, the kernels need 32 or 64",
                  "block_size is 16, the kernel needs 32 or 64"):  # fmt: skip
        assert words in str(error.value)


Q, K, SCALE, WEIGHTS = ragged(4, 30)
BOUND = torch.zeros(4, dtype=I32)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": Q[None]}, ValueError, "q must have 3 dimensions"),
        ({"k": K.float()}, TypeError, "k must be one of float8_e4m3fn, uint8"),
        ({"k": K[:, :64]}, ValueError, r"k must be contiguous \[keys, 128\]"),
        ({"k": K[::2]}, ValueError, r"k must be contiguous \[keys, 128\]"),
        ({"k_scale": SCALE[:9]}, ValueError, r"k_scale must be contiguous \[30\]"),
        ({"k_scale": SCALE[:, None]}, ValueError, "k_scale must have 1 dimensions"),
        ({"k_scale": SCALE.half()}, TypeError, "k_scale must be one of float32"),
        ({"weights": WEIGHTS[:, :3]}, ValueError, r"weights must be \[4, 64\]"),
        ({"row_starts": BOUND[:3]}, ValueError, r"row_starts must be contiguous \[4\]"),
        ({"row_ends": BOUND.float()}, TypeError, "row_ends must be one of int32, int64"),
        ({"out": torch.zeros(5, 30)}, ValueError, r"out must have the shape \(4, 30\)"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of float32"),
        ({"backend": "cuda"}, UnmetError, "on cpu, not on a CUDA device"),
    ],
)
def test_bad_ragged_input(change, error, words):
    arguments = {
        "q": Q, "k": K, "k_scale": SCALE, "weights": WEIGHTS, "row_starts": BOUND,
        "row_ends": BOUND + 9,
    } | change  # fmt: skip
    with pytest.raises(error, match=words):
        ragged_logits(**arguments)


def test_bad_input_of_the_chain():
    with pytest.raises(ValueError, match="k must be 1 to 2048, got 0"):
        select(*CASE.arguments, 0)
    with pytest.raises(TypeError, match="weights must be one of float32"):
        select(CASE.q, CASE.cache, CASE.weights.half(), CASE.lengths, CASE.table, 8)
    with pytest.raises(UnmetError, match="on cpu, not on a CUDA device"):
        select(*CASE.arguments, 8, backend="cuda")


def test_the_cases_are_what_they_say():
    """The oracle itself: a score by hand, and a draw that meets zeros of the ReLU."""
    case = paged([3], heads=2)
    assert isinstance(case, Paged)
    score, size = oracle(case)
    page = case.cache[int(case.table[0, 0])]
    key = page[2 * D : 3 * D].view(torch.float8_e4m3fn).double()
    at = 64 * D + 8
    scale = float(page[at : at + 4].clone().view(torch.float32))
    by_hand = 0.0
    for h in range(2):
        by_hand += float(case.weights[0, h]) * max(0.0, float(case.q[0, 0, h].double() @ key))
    assert abs(float(score[0, 2]) - scale * by_hand) <= 1e-12 * float(size[0, 2])
