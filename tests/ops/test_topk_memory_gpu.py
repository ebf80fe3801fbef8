"""Top-k and memory on a GPU: alignment, strides, far rows, dirty buffers, guard zones."""

import pytest
import torch
from kits.inputs import poison_tail
from kits.oracles import Ranking
from kits.topk_device import DEVICE, Guarded, bits, draw, ints, run
from kits.topk_edges import short_lengths

from dsv4_plugin.cli.checks.topk_cases import DTYPES, KS

pytestmark = pytest.mark.gpu

FAR = (1 << 31) + 64  # elements between rows: past what 32 bits count


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment_with_guards(offset, dtype):
    """Bases and strides of any alignment; nothing outside of `out` is written, nothing inside is
    left as it was, the scores stay as they are."""
    lengths = ints([*short_lengths(512), 8192, 30_001, 33_000, 5003])
    rows, columns = len(lengths), 33_000
    whole = draw("normal", rows, columns, dtype)
    poison_tail(whole, lengths)
    ranking = Ranking(whole, lengths)
    for stride in (columns, columns + 1, columns + 7, 40_000):
        held = Guarded(rows, columns, DTYPES[dtype], stride=stride, offset=offset)
        held.inside.copy_(whole)
        for k in (7, 512, 2048):
            out = Guarded(rows, k, torch.int32, stride=k + offset, offset=offset)
            got = run(held.inside, lengths, k, out=out.inside)
            assert got.data_ptr() == out.inside.data_ptr()
            context = f"offset {offset}, stride {stride}, k {k}"
            ranking.check(got.clone(), k, context=context)
            out.assert_untouched(context)
        assert torch.equal(bits(held.inside), bits(whole)), "the scores were written to"
        held.assert_untouched(f"around the scores, offset {offset}, stride {stride}")


@pytest.mark.parametrize("sort", [False, True])
def test_guards_around_every_output(sort):
    """With a page table there are two outputs; the table and the lengths stay as they are."""
    lengths = ints([*short_lengths(1024), 40_000, 20_000])
    rows, k = len(lengths), 1024
    logits = draw("relu_sum", rows, 40_000, "bfloat16")
    table = Guarded(rows, 625, torch.int32, stride=631, offset=3)
    table.inside.copy_(torch.arange(625, device=DEVICE).flip(0))
    out, raw = (Guarded(rows, k, torch.int32, stride=k + 5, offset=o) for o in (1, 2))
    before = lengths.clone(), table.inside.clone()
    counts = Guarded(1, rows, torch.int32, stride=rows + 3, offset=1)
    run(logits, lengths, k, sort=sort, page_table=table.inside, out=out.inside, out_raw=raw.inside,
        out_counts=counts.inside[0])  # fmt: skip
    assert torch.equal(counts.inside[0], lengths.clamp(0, k))
    Ranking(logits, lengths).check(raw.inside.clone(), k, sort=sort)
    assert torch.equal(lengths, before[0]) and torch.equal(table.inside, before[1])
    for guarded, name in ((out, "out"), (raw, "out_raw"), (counts, "out_counts"),
                          (table, "page_table")):  # fmt: skip
        guarded.assert_untouched(name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_past_the_length_changes_nothing(dtype):
    """The same bits with zeros, NaN, inf and 1e30 behind every row, and with a dirty output."""
    lengths = ints([*short_lengths(512), 4099, 8192, 33_001, 70_000])
    logits = draw("relu_sum", len(lengths), 80_000, dtype)
    past = torch.arange(80_000, device=DEVICE) >= lengths[:, None]
    answers = []
    for poison in (0.0, float("nan"), float("inf"), -float("inf"), 1e30, -1e30):
        logits.masked_fill_(past, torch.tensor(poison).to(logits.dtype))  # float16: inf
        for dirt in (-1, 0, 0x7FFFFFFF, 513):
            out = torch.full((len(lengths), 512), dirt, dtype=torch.int32, device=DEVICE)
            answers.append(run(logits, lengths, 512, out=out))
    assert all(torch.equal(answers[0], answer) for answer in answers[1:])
    Ranking(logits, lengths).check(answers[0], 512)


def test_a_call_leaves_nothing_behind():
    """Calls of every size in turn, in the shared memory that the one before left dirty."""
    shapes = [(1, 8192), (133, 9000), (3, 262_144), (40, 600), (8, 70_000), (1, 131_073)]
    cases = []
    for i, (rows, columns) in enumerate(shapes):
        dtype = list(DTYPES)[i % len(DTYPES)]
        logits = draw("relu_sum", rows, columns, dtype, seed=i)
        lengths = ints([columns] * rows)
        cases.append((dtype, logits, lengths, Ranking(logits, lengths)))
    g = torch.Generator().manual_seed(0)
    for i in torch.randint(0, len(cases), (60,), generator=g).tolist():
        dtype, logits, lengths, ranking = cases[i]
        for k in (2048, 7, 512):
            got = run(logits, lengths, k, sort=i % 2 == 1)
            ranking.check(got, k, sort=i % 2 == 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_further_apart_than_32_bits_count(dtype):
    """Two rows 2^31 + 64 elements apart: 4 GiB of bfloat16, 8 GiB of float32, mostly untouched."""
    columns = 70_000
    buffer = torch.empty(FAR + columns, dtype=DTYPES[dtype], device=DEVICE)
    logits = buffer.as_strided((2, columns), (FAR, 1))
    logits.copy_(draw("normal", 2, columns, dtype))
    lengths = ints([columns, columns - 3])
    ranking = Ranking(logits, lengths)
    for k in (512, 2048):
        ranking.check(run(logits, lengths, k), k)


def test_more_scores_than_32_bits_count():
    """262,200 rows of 8,192 in one buffer: the last rows lie past 2^31 elements."""
    rows, columns = 262_200, 8192
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    lengths = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    some = torch.cat([torch.arange(40), torch.arange(rows - 60, rows)]).to(DEVICE)
    values = draw("normal", len(some), columns, "bfloat16")
    logits[some] = values
    lengths[some] = columns
    got = run(logits, lengths, 64)
    ranking = Ranking(values, ints([columns] * len(some)))
    ranking.check(got[some], 64)
    assert int((got >= 0).sum()) == 64 * len(some), "an index in a row of padding"


def test_outputs_and_pages_further_apart_than_32_bits_count():
    """`out` and `page_table` with rows 2^31 + 64 elements apart."""
    columns, k = 20_000, 512
    logits = draw("normal", 2, columns, "bfloat16")
    lengths = ints([columns, columns - 7])
    ranking = Ranking(logits, lengths)
    far = torch.empty(FAR + 2048, dtype=torch.int32, device=DEVICE)
    out = far.as_strided((2, k), (FAR, 1))
    ranking.check(run(logits, lengths, k, out=out).clone(), k)
    table = far.as_strided((2, 313), (FAR, 1))
    table.copy_(torch.arange(313, device=DEVICE).flip(0) + ints([[0], [1000]]))
    raw = torch.empty(2, k, dtype=torch.int32, device=DEVICE)
    got = run(logits, lengths, k, page_table=table, out_raw=raw)
    ranking.check(raw, k)
    index = raw.long()
    assert torch.equal(got.long(), table.long().gather(1, index // 64) * 64 + index % 64)


@pytest.mark.parametrize("stride", [0, 1, 3, 4096])
def test_rows_that_share_memory(stride):
    """Any row stride, also one that is smaller than the row."""
    rows, columns = 20, 9000
    flat = draw("normal", 1, (rows - 1) * stride + columns, "float32").reshape(-1)
    logits = flat.as_strided((rows, columns), (stride, 1))
    lengths = ints(columns - 11 * r for r in range(rows))
    ranking = Ranking(logits, lengths)
    for k in KS:
        ranking.check(run(logits, lengths, k), k, context=f"stride {stride}")


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_rows_of_nan_beside_long_ones(dtype, sort):
    """A threshold among NaN, where a cluster's first CTA selects by the whole row.

    Its shared memory once lay over the cluster's barriers, and one row in thousands came out with
    their state in place of its first entries.
    """
    rows, columns, k = 76, 65_568, 2047
    lengths = ints(columns if row % 2 else k + 1 for row in range(rows))
    logits = draw("special", rows, columns, dtype)
    ranking = Ranking(logits, lengths)
    for turn in range(40):
        got = run(logits, lengths, k, sort=sort)
        ranking.check(got, k, sort=sort, context=f"turn {turn}")
