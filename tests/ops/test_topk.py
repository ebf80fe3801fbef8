"""Top-k: set, ties, order, NaN, lengths, strides and forms, for every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.inputs import poison_tail
from kits.oracles import check_selection, topk_row

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, scores
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.kernels.reference import row_lengths

BACKENDS = ("torch", "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expect(logits, lengths, k, sort=False):
    rows = [
        topk_row(row, n, k, sort)
        for row, n in zip(logits.float().tolist(), lengths.reshape(-1).tolist(), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), k)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_selects_exactly(kind, dtype, backend, device):
    k = 64
    lengths = torch.tensor([0, 1, k - 1, k, k + 1, 2 * k, 777, -1, 1000, 1024, 5000])
    logits = scores(kind, len(lengths), 1024, dtype)
    want = expect(logits, lengths, k)
    poison_tail(logits, lengths)
    got = topk(logits.to(device), lengths.to(device), k, backend=backend).cpu()
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    check_selection(logits, lengths, k, got, ascending=True)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorts(kind, dtype, backend, device):
    lengths = torch.tensor([300, 33, 32, 31, 0])
    logits = scores(kind, 5, 300, dtype)
    got = topk(logits.to(device), lengths.to(device), 32, sort=True, backend=backend).cpu()
    assert torch.equal(got, expect(logits, lengths, 32, sort=True))


@pytest.mark.parametrize("k", [1, 2, 3, 31, 100, 511, 512, 1000, 1024, 2047, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_k(k, dtype, backend, device):
    lengths = torch.tensor([k + d for d in (-1, 0, 1, 2, 5, 700)])
    logits = scores("relu_sum", len(lengths), k + 700, dtype)
    want = expect(logits, lengths, k)
    poison_tail(logits, lengths)
    got = topk(logits.to(device), lengths.to(device), k, backend=backend).cpu()
    assert torch.equal(got.sort(1).values, want.sort(1).values)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_bases(offset, dtype, backend, device):
    """A view that begins anywhere in a wider buffer, rows that share memory, slices as out."""
    buffer = torch.full((9, 611), float("nan"), dtype=dtype, device=device)
    logits = buffer[1:8, offset : offset + 501]
    logits.copy_(scores("normal", 7, 501, dtype))
    lengths = torch.tensor([501, 500, 499, 17, 16, 0, 333], device=device)
    wide = torch.full((8, 40), 77, dtype=torch.int32, device=device)
    out = wide[:7, 3:19]
    assert topk(logits, lengths, 16, out=out, backend=backend) is out
    want = expect(logits.cpu(), lengths.cpu(), 16)
    assert torch.equal(out.cpu().sort(1).values, want.sort(1).values)
    wide[:7, 3:19] = 77
    assert bool((wide == 77).all()), "wrote outside of out"
    shared = buffer[1, offset : offset + 501].as_strided((5, 400), (1, 1))
    got = topk(shared, torch.full((5,), 400, device=device), 16, backend=backend).cpu()
    want = expect(shared.cpu(), torch.full((5,), 400), 16)
    assert torch.equal(got.sort(1).values, want.sort(1).values)


@pytest.mark.parametrize("form", ["rows", "batch", "batch1", "two_d", "strided"])
def test_next_n(form, backend, device):
    batch, next_n, k = 4, 3, 20
    n = torch.tensor([100, 21, 2, 0], dtype=torch.int32)
    per_row = (n[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0).int()
    lengths = {
        "rows": per_row.reshape(-1),
        "batch": n,
        "batch1": n[:, None],
        "two_d": per_row,
        "strided": torch.stack([per_row, per_row + 9], dim=-1).flatten(1)[:, ::2],
    }[form]
    if form == "strided":
        held = torch.zeros(batch, 2 * next_n, dtype=torch.int32, device=device)[:, ::2]
        held.copy_(lengths)
    else:
        held = lengths.to(device)
    logits = scores("normal", batch * next_n, 128, torch.float32)
    got = topk(logits.to(device), held, k, next_n=next_n, backend=backend).cpu()
    want = expect(logits, per_row.reshape(-1), k)
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    assert torch.equal(row_lengths(lengths, batch * next_n, next_n), per_row.reshape(-1).long())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_starts(dtype, backend, device):
    starts = torch.tensor([0, 7, 100, 250, 299, 300, -1], dtype=dtype)
    lengths = torch.tensor([300, 100, 200, 50, 1, 5, 9], dtype=dtype)
    logits = scores("normal", 7, 300, torch.bfloat16)
    got = topk(logits.to(device), lengths.to(device), 40, row_starts=starts.to(device),
               backend=backend).cpu()  # fmt: skip
    for r in range(7):
        s, n = int(starts[r]), int(lengths[r])
        row = logits[r].float().tolist()[s:] if s >= 0 else []
        assert sorted(got[r].tolist()) == sorted(topk_row(row, n, 40))


@pytest.mark.parametrize("page_size", [64, 1, 7, 256])
@pytest.mark.parametrize("per_request", [False, True])
def test_page_table(page_size, per_request, backend, device):
    rows, next_n, k, columns = 6, 2, 50, 400
    g = torch.Generator().manual_seed(1)
    held = rows // next_n if per_request else rows
    pages = -(-columns // page_size)
    wide = torch.randint(0, 10_000, (held, pages + 3), generator=g).int()
    wide[0, 0] = -1
    table = wide.to(device)[:, :pages]
    lengths = torch.tensor([400, 399, 20, 0, 50, 51])
    logits = scores("normal", rows, columns, torch.float32)
    raw = torch.full((rows, k), 9, dtype=torch.int32, device=device)
    got = topk(logits.to(device), lengths.to(device), k, next_n=next_n, page_table=table,
               page_size=page_size, out_raw=raw, backend=backend).cpu()  # fmt: skip
    want_raw = expect(logits, lengths, k)
    assert torch.equal(raw.cpu().sort(1).values, want_raw.sort(1).values)
    for r in range(rows):
        line = wide[r // next_n if per_request else r].tolist()
        for slot, i in zip(got[r].tolist(), raw.cpu()[r].tolist(), strict=True):
            page = line[i // page_size] if i >= 0 else -1
            assert slot == (page * page_size + i % page_size if page >= 0 else -1)


@pytest.mark.parametrize("length", [8, 128, 5000])
@pytest.mark.parametrize("page_size", [1, 3, 64, (1 << 31) - 1])
def test_a_slot_that_int32_does_not_hold_is_none(page_size, length, backend, device):
    """Page numbers of a table that was never written: -1, and never the slot of another page."""
    most = (1 << 31) - 1
    fits = most // page_size
    numbers = sorted({max(0, n) for n in (fits - 1, fits, min(fits + 1, most), most, most // 2, 0)})
    rows, k = len(numbers), 50
    logits = scores("normal", rows, length, torch.float32).to(device)
    table = torch.tensor(numbers).int()[:, None].expand(rows, -(-length // page_size)).contiguous()
    raw = torch.empty(rows, k, dtype=torch.int32, device=device)
    for sort in (False, True):
        got = topk(logits, torch.full((rows,), length, device=device), k, sort=sort,
                   page_table=table.to(device), page_size=page_size, out_raw=raw,
                   backend=backend).cpu()  # fmt: skip
        for r, number in enumerate(numbers):
            slots = [number * page_size + i % page_size for i in raw[r].tolist()]
            want = [
                s if i >= 0 and s <= most else -1 for s, i in zip(slots, raw[r].tolist(),
                                                                  strict=True)
            ]  # fmt: skip
            assert got[r].tolist() == want


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_columns_ascend_without_sort(kind, backend, device):
    """A promise: the order is that of the columns, with -1 after them, at every call."""
    lengths = torch.tensor([0, 1, 63, 64, 65, 500, 4096, 70_000])
    logits = scores(kind, len(lengths), 70_000, torch.bfloat16)
    got = topk(logits.to(device), lengths.to(device), 64, backend=backend).cpu()
    assert torch.equal(got, expect(logits, lengths, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sort_leaves_short_rows_in_column_order(dtype, backend, device):
    """Rows no longer than k, whatever their scores."""
    k = 100
    lengths = torch.tensor([0, 1, 2, 50, 99, 100])
    logits = torch.arange(300).to(dtype).expand(len(lengths), 300).contiguous()
    logits[4] = float("nan")
    got = topk(logits.to(device), lengths.to(device), k, sort=True, backend=backend).cpu()
    rank = torch.arange(k)
    assert torch.equal(got.long(), torch.where(rank < lengths[:, None], rank, -1))
    longer = topk(logits[:1].to(device), torch.tensor([101], device=device), k, sort=True,
                  backend=backend).cpu()  # fmt: skip
    assert torch.equal(longer[0].long(), torch.arange(100, 0, -1))


@pytest.mark.parametrize("nans", [1, 3, 4096])
@pytest.mark.parametrize("columns", [131_072, 131_075])
def test_some_nan_and_some_infinities(columns, nans, backend, device):
    """NaN anywhere and in the last column, beside eight +inf."""
    g = torch.Generator().manual_seed(nans)
    logits = torch.randn(1, columns, generator=g)
    at = torch.randperm(columns - 1, generator=g)
    logits[0, at[: nans - 1]] = logits[0, -1] = float("nan")
    logits[0, at[nans : nans + 8]] = float("inf")
    lengths = torch.tensor([columns])
    for dtype in DTYPES:
        row = logits.to(dtype)
        got = topk(row.to(device), lengths.to(device), 2048, backend=backend).cpu()
        assert torch.equal(got, expect(row, lengths, 2048))
        assert set(at[nans : nans + 8].tolist()) <= set(got[0].tolist())


@pytest.mark.parametrize("head", [0, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_distinct_values(dtype, head, backend, device):
    """Nearly all are ties: with and without a head of larger scores."""
    g = torch.Generator().manual_seed(head)
    logits = torch.randint(0, 8, (3, 30_000), generator=g).to(dtype)
    logits[:, torch.randperm(30_000, generator=g)[:head]] = 100.0
    lengths = torch.tensor([30_000, 29_999, 513])
    for k in (512, 2048):
        got = topk(logits.to(device), lengths.to(device), k, backend=backend).cpu()
        assert torch.equal(got, expect(logits, lengths, k))


@pytest.mark.parametrize("case", ["subnormal", "negative", "half -inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_sort_of_number(case, dtype, backend, device):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20_000, generator=g).to(dtype)
    if case == "subnormal":
        words, most = (torch.int32, 1 << 23) if dtype == torch.float32 else (torch.int16, 1 << 7)
        bits = torch.randint(1, most, logits.shape, generator=g).to(words)
        bits[:, ::3] |= torch.iinfo(words).min
        logits = bits.view(dtype)
    elif case == "negative":
        logits = -logits.abs() - 1
    else:
        logits[:, torch.randperm(20_000, generator=g)[:10_000]] = -float("inf")
    lengths = torch.tensor([20_000, 19_999, 600])
    for k in (512, 2048):
        got = topk(logits.to(device), lengths.to(device), k, backend=backend).cpu()
        assert torch.equal(got, expect(logits, lengths, k))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("next_n", [1, 2])
def test_counts(next_n, paged, backend, device):
    """How many indices a row has: its length, clipped to what it has, at most k."""
    columns, k = 300, 40
    lengths = torch.tensor([300, 41, 40, 39, 1, 0, -5, 9000], dtype=torch.int32)
    rows = len(lengths) * next_n
    starts = torch.full((rows,), 0)
    starts[0], starts[1], starts[-1] = 290, -1, 400
    table = torch.arange(rows * 5).reshape(rows, 5).int().to(device) if paged else None
    counts = torch.full((rows,), 77, dtype=torch.int32, device=device)
    for begin in (None, starts):
        more = {} if begin is None else {"row_starts": begin.to(device)}
        got = topk(scores("normal", rows, columns, torch.bfloat16).to(device), lengths.to(device),
                   k, next_n=next_n, page_table=table, out_counts=counts, backend=backend,
                   **more).cpu()  # fmt: skip
        of_row = row_lengths(lengths, rows, next_n)
        room = columns - (torch.zeros(rows) if begin is None else begin.clamp_max(columns))
        room[0 if begin is None else begin < 0] = columns if begin is None else 0
        want = torch.minimum(of_row, room).clamp(0, k).int()
        assert torch.equal(counts.cpu(), want)
        assert torch.equal((got >= 0).sum(1).int(), want)
        assert all((row[:n] >= 0).all() for row, n in zip(got, want, strict=True))


def test_a_row_depends_on_itself_only(backend, device):
    logits = scores("relu_sum", 40, 900, torch.bfloat16).to(device)
    lengths = torch.randint(0, 900, (40,), generator=torch.Generator().manual_seed(2)).to(device)
    whole = topk(logits, lengths, 128, backend=backend)
    for r in (0, 7, 39):
        alone = topk(logits[r : r + 1], lengths[r : r + 1], 128, backend=backend)
        assert torch.equal(alone[0], whole[r])
    again = topk(logits, lengths, 128, backend=backend)
    assert torch.equal(whole, again)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 90),
    k=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    sort=st.booleans(),
    data=st.data(),
)
def test_property(rows, columns, k, dtype, kind, sort, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(-2, 95), min_size=rows, max_size=rows)))
    logits = scores(kind, rows, columns, dtype, seed=columns)
    got = topk(logits, lengths, k, sort=sort, backend="torch")
    assert torch.equal(got, expect(logits, lengths, k, sort))
    if not sort:
        check_selection(logits, lengths, k, got, ascending=True)


X = torch.zeros(4, 32)
N = torch.full((4,), 32)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"logits": X.double()}, TypeError, "logits.*float64"),
        ({"logits": X[0]}, ValueError, "logits.*2 dimensions"),
        ({"logits": torch.zeros(32, 4).t()}, ValueError, "logits.*unit stride"),
        ({"lengths": N.float()}, TypeError, "lengths.*float32"),
        ({"lengths": N[:3]}, ValueError, r"lengths.*\[4\].*\(3,\)"),
        ({"k": 0}, ValueError, "k must be 1 to 2048, got 0"),
        ({"k": 2049}, ValueError, "k must be 1 to 2048, got 2049"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"next_n": 3}, ValueError, "next_n.*3.*4"),
        ({"row_starts": N[:2]}, ValueError, "row_starts.*4.*2"),
        ({"page_table": N[:, None]}, TypeError, "page_table.*int32.*int64"),
        ({"page_table": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, "page_table.*4 rows"),
        ({"page_size": 0}, ValueError, "page_size.*0"),
        ({"out": torch.zeros(4, 7, dtype=torch.int32)}, ValueError, r"out.*\(4, 8\).*\(4, 7\)"),
        ({"out": torch.zeros(4, 8)}, TypeError, "out.*int32.*float32"),
        ({"out_raw": torch.zeros(4, 8, dtype=torch.int32)}, ValueError, "out_raw.*page_table"),
        ({"out_counts": N[:3].int()}, ValueError, r"out_counts.*\(4,\).*\(3,\)"),
        ({"out_counts": N}, TypeError, "out_counts.*int32.*int64"),
        ({"out_counts": torch.zeros(8, dtype=torch.int32)[::2]}, ValueError, "out_counts.*contig"),
        ({"out_counts": N[:, None].int()}, ValueError, "out_counts.*1 dimension"),
        ({"backend": "triton"}, UnmetError, "no triton implementation"),
        ({"backend": "cuda"}, UnmetError, "on cpu, not on a CUDA device"),
        ({"backend": "rocm"}, UnmetError, "'rocm' is no backend"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"logits": X, "lengths": N, "k": 8} | change
    with pytest.raises(error, match=words):
        topk(arguments.pop("logits"), arguments.pop("lengths"), arguments.pop("k"), **arguments)
