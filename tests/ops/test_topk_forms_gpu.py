"""Top-k on a GPU: row starts, next_n, page tables, out_raw, and every shape of lengths."""

import pytest
import torch
from kits.oracles import Ranking
from kits.topk_device import DEVICE, Guarded, draw, ints, run
from kits.topk_edges import short_lengths

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.topk_cases import DTYPES, KS, Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_starts(dtype, index_dtype):
    """Windows that begin at any alignment, touch the end, are empty, or lie outside.

    What lies outside would win (+inf, 1,000) or lose (NaN) if it were looked at.
    """
    columns = 70_000
    begins = (*range(16), 33_333)  # every place in a unit of 16 bytes, of 2-byte scores twice
    windows = [(s, n) for s in begins for n in (511, 513, 8192, 36_667)]
    windows += [(columns - 600, 600), (columns - 600, 900), (columns - 1, 1), (columns, 5), (-1, 9)]
    windows += [(10, n) for n in short_lengths(512)]
    starts = ints((s for s, _ in windows), index_dtype)
    lengths = ints((n for _, n in windows), index_dtype)
    logits = draw("relu_sum", len(windows), columns, dtype)
    at = torch.arange(columns, device=DEVICE)
    outside = (at < starts[:, None]) | (at >= (starts + lengths)[:, None])
    ranking = None
    for poison in (float("nan"), 1e3, float("inf")):
        logits.masked_fill_(outside, poison)
        ranking = ranking or Ranking(logits, lengths, starts=starts)
        for k in (7, *KS):
            for sort in (False, True):
                got = run(logits, lengths, k, sort=sort, row_starts=starts)
                ranking.check(got, k, sort=sort, context=f"{poison} outside")


@pytest.mark.parametrize("columns", [3000, 20_000, 70_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_of_packed_requests(dtype, columns):
    """The benchmark's prefill case: two requests side by side, each row its causal prefix."""
    for rows in (2048, 300):
        problem = Case("prefill", dtype, 512, rows, columns, windows="causal").make(DEVICE)
        ranking = Ranking(problem.logits, problem.lengths, starts=problem.row_starts)
        for k in (512, 2048):
            got = run(problem.logits, problem.lengths, k, row_starts=problem.row_starts)
            ranking.check(got, k)


@pytest.mark.parametrize("form", ["rows", "batch", "batch1", "two_d", "strided", "strided_batch"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("next_n", [1, 2, 4])
def test_every_shape_of_lengths(form, index_dtype, next_n):
    """One a row or one a request, 1-D, 2-D or strided: the same answer."""
    n = ints([65_536, 40_001, 600, 513, 512, 3, 1, 0, 9000], index_dtype)
    batch = len(n)
    step = torch.arange(1 - next_n, 1, device=DEVICE)
    per_row = (n[:, None] + step).clamp(min=0).to(index_dtype)
    wide = torch.full((batch, 2 * next_n + 1), 7, dtype=index_dtype, device=DEVICE)
    wide[:, : 2 * next_n : 2] = per_row
    sparse = torch.full((3 * batch,), 7, dtype=index_dtype, device=DEVICE)
    sparse[::3] = n
    lengths = {
        "rows": per_row.reshape(-1),
        "batch": n,
        "batch1": n[:, None],
        "two_d": per_row,
        "strided": wide[:, : 2 * next_n : 2],
        "strided_batch": sparse[::3],
    }[form]
    logits = draw("normal", batch * next_n, 65_536, "bfloat16")
    ranking = Ranking(logits, per_row)
    got = run(logits, lengths, 512, next_n=next_n)
    ranking.check(got, 512, context=form)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("per_request", [False, True])
@pytest.mark.parametrize("page_size", [1, 7, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_table(dtype, page_size, per_request, sort):
    """Slots of the engine's pool: padded pages and a table that is too short give -1."""
    next_n, batch, columns = 2, 5, 40_000
    n = ints([40_000, 20_001, 600, 513, 5])
    rows = batch * next_n
    pages = -(-columns // page_size) - 3  # the last columns of the longest row are not covered
    g = torch.Generator().manual_seed(page_size)
    most = (1 << 31) // page_size // 2
    wide = torch.randint(0, most, (batch if per_request else rows, pages + 5), generator=g).int()
    wide[torch.rand(wide.shape, generator=g) < 0.05] = -1
    table = wide.to(DEVICE)[:, :pages]
    logits = draw("normal", rows, columns, dtype)
    for k in (100, *KS):
        raw, out, want_raw = (
            torch.full((rows, k + 3), 9, dtype=torch.int32, device=DEVICE)[:, :k] for _ in range(3)
        )
        got = run(logits, n, k, sort=sort, next_n=next_n, page_table=table,
                  page_size=page_size, out=out, out_raw=raw)  # fmt: skip
        want = topk(logits, n, k, sort=sort, next_n=next_n, page_table=table, page_size=page_size,
                    out_raw=want_raw, backend="torch")  # fmt: skip
        lengths = (n[:, None] + ints([-1, 0])).reshape(-1)
        Ranking(logits, lengths).check(raw, k, sort=sort)
        index = raw.long()
        owner = torch.arange(rows, device=DEVICE) // (next_n if per_request else 1)
        page = index.clamp(min=0) // page_size
        number = table[owner[:, None], page.clamp(max=pages - 1)].long()
        gone = (index < 0) | (page >= pages) | (number < 0)
        slot = (number * page_size + index % page_size).masked_fill(gone, -1)
        assert int(slot.max()) < 1 << 31
        assert torch.equal(got.long(), slot), f"a slot does not belong to its index, k {k}"
        if sort:
            assert torch.equal(raw, want_raw) and torch.equal(got, want)
        assert torch.equal(got.sort(1).values, want.sort(1).values)
        alone = run(logits, n, k, sort=sort, next_n=next_n, page_table=table,
                    page_size=page_size)  # fmt: skip
        assert torch.equal(alone, got), "out_raw changed the slots"


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("next_n", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_counts(dtype, next_n, paged):
    """One count a row, whichever path serves it, and nothing else changes."""
    columns = 140_000
    n = ints([140_000, 131_072, 70_000, 32_769, 8193, 4096, 2049, 2048, 1025, 600, 513, 512, 511,
              100, 1, 0, -3, 999_999])  # fmt: skip
    rows = len(n) * next_n
    logits = draw("relu_sum", rows, columns, dtype)
    logits[0], logits[-1, 600:] = float("nan"), -float("inf")  # left to the kernel of any width
    table = ints(range(rows * 2200)).reshape(rows, 2200) if paged else None
    starts = ints([5] * rows)
    for k in (1, 100, *KS):
        for begin in (None, starts):
            arguments = {"next_n": next_n, "page_table": table, "row_starts": begin}
            counts = Guarded(1, rows, torch.int32)
            out = torch.empty(rows, k, dtype=torch.int32, device=DEVICE)
            run(logits, n, k, out=out, out_counts=counts.inside[0], **arguments)
            counts.assert_untouched(f"k {k}")
            of_row = (n[:, None].long() + ints(range(1 - next_n, 1))).reshape(-1)
            want = of_row.clamp(max=columns - (0 if begin is None else 5)).clamp(0, k)
            assert torch.equal(counts.inside[0].long(), want), f"k {k}"
            assert torch.equal((out >= 0).sum(1), want)
            alone = torch.empty_like(out)
            run(logits, n, k, out=alone, **arguments)
            assert torch.equal(alone, out), "out_counts changed the selection"


@pytest.mark.parametrize("length", [3, 5000, 65_536])
@pytest.mark.parametrize("sort", [False, True])
def test_a_page_table_without_a_page(length, sort):
    """It has no memory, and is a page table all the same: there is no slot."""
    logits = draw("normal", 2, length, "bfloat16")
    table = torch.empty(2, 0, dtype=torch.int32, device=DEVICE)
    raw = torch.full((2, 512), 9, dtype=torch.int32, device=DEVICE)
    n = ints([length, length // 2])
    got = run(logits, n, 512, sort=sort, page_table=table, page_size=64, out_raw=raw)
    assert (got == -1).all()
    Ranking(logits, n).check(raw, 512, sort=sort)
