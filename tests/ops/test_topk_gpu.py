"""Top-k on a GPU: exact for every distribution, at every boundary of a path, for every k.

Siblings: test_topk_forms_gpu.py, test_topk_memory_gpu.py, test_topk_graph_gpu.py,
test_topk_errors.py, test_sanitizer_gpu.py. The lists of boundaries are in
dsv4_plugin/cli/checks/topk_cases.py.
"""

import pytest
import torch
from kits.inputs import poison_tail
from kits.oracles import Ranking
from kits.topk_device import DEVICE, draw, ints, run
from kits.topk_edges import (
    CAPACITIES,
    EDGES,
    GROUP_EDGES,
    ODD_KS,
    ROW_EDGES,
    plateau,
    short_lengths,
)

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS
from dsv4_plugin.cli.checks.topk_cases import DTYPES, KS

pytestmark = pytest.mark.gpu

SHAPES = ((1, 8192), (3, 65_536), (33, 40_000), (2, 262_144), (140, 9001))
ROW_COUNTS = (1, 8, 33, 67, 133)  # for the widths; ROW_EDGES has all


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_every_distribution(kind, dtype, shape):
    """Against a sort by (value, index) for every k, and against the torch reference."""
    logits = draw(kind, *shape, dtype)
    lengths = torch.full((shape[0],), shape[1], dtype=torch.int32, device=DEVICE)
    ranking = Ranking(logits, lengths)
    for k in (*KS, *ODD_KS):
        got = run(logits, lengths, k)
        ranking.check(got, k, context="unsorted")
        best = run(logits, lengths, k, sort=True)
        ranking.check(best, k, sort=True)
        if k in (512, 2048):
            want = topk(logits, lengths, k, sort=True, backend="torch")
            assert torch.equal(best, want), f"not the reference's order, k {k}"
            assert torch.equal(got.sort(1).values, want.sort(1).values), f"not its set, k {k}"


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "relu_sum", "signed_sum", "two_values"])
def test_lengths_around_an_edge(edge, dtype, kind):
    """Lengths of -5 ... +5 in a wider buffer, poison behind them, at every alignment."""
    lengths = ints(edge + d for d in range(-5, 6))
    whole = draw(kind, len(lengths), edge + 6, dtype, seed=edge)
    poison_tail(whole, lengths)
    ranking = Ranking(whole, lengths)
    buffer = torch.empty(len(lengths), edge + 72, dtype=whole.dtype, device=DEVICE)
    for offset in range(8):
        logits = buffer[:, offset : offset + whole.shape[1]]
        logits.copy_(whole)
        for k in KS:
            got = run(logits, lengths, k)
            ranking.check(got, k, context=f"edge {edge}, offset {offset}")


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_around_an_edge(edge, dtype):
    """Buffers that are -5 ... +5 wide, for row counts that get different grids."""
    widths = range(edge - 5, edge + 6)
    # Rows begin at 16-byte boundaries here; the test above has the other alignments.
    buffer = torch.empty(len(widths), edge + 64, dtype=DTYPES[dtype], device=DEVICE)
    whole = buffer[:, : edge + 5].copy_(draw("relu_sum", len(widths), edge + 5, dtype, seed=edge))
    ranking = Ranking(whole, ints(widths))
    for r, width in enumerate(widths):
        for rows in ROW_COUNTS:
            # Rows share one row's memory: 133 rows of a million columns cost nothing.
            logits = whole[r, :width].expand(rows, width)
            lengths = ints([width] * rows)
            for k in (512, 2048):
                got = run(logits, lengths, k)
                want = ranking.rows([r] * rows)
                want.check(got, k, context=f"{rows} x {width}")


@pytest.mark.parametrize("columns", [6000, 9000, 20_000, 40_000, 70_000, 140_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(dtype, columns):
    """Around every number of rows at which the grid changes; long and short rows mixed."""
    rows = max(ROW_EDGES)
    logits = draw("relu_sum", rows, columns, dtype)
    at = torch.arange(rows, device=DEVICE)
    lengths = torch.where(at % 3 == 0, columns - at, torch.where(at % 3 == 1, 600 + at, columns))
    poison_tail(logits, lengths)
    ranking = Ranking(logits, lengths)
    for count in ROW_EDGES:
        for k in (512, 2048):
            got = run(logits[:count], lengths[:count], k)
            ranking.rows(slice(count)).check(got, k, context=f"{count} x {columns}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [*KS, *ODD_KS])
def test_lengths_around_k(k, dtype):
    """Padding, short rows, and rows of a few multiples of k, where groups change size."""
    around = [m * k // 4 + d for m in GROUP_EDGES for d in range(-5, 6)]
    lengths = ints([*short_lengths(k), *around, 70_000])
    for kind in ("normal", "special", "all_equal"):
        logits = draw(kind, len(lengths), 70_000, dtype, seed=k)
        poison_tail(logits, lengths)
        ranking = Ranking(logits, lengths)
        for sort in (False, True):
            got = run(logits, lengths, k, sort=sort)
            ranking.check(got, k, sort=sort, context=kind)


@pytest.mark.parametrize("rows", [1, 140])
@pytest.mark.parametrize("columns", [4096, 8192, 20_000])
def test_a_nan_whose_upper_half_is_infinitys(columns, rows):
    """It is the last of all, also for code that looks at the upper halves of the scores."""
    logits = torch.full((rows, columns), 1.5, device=DEVICE)
    logits[:, :2047] = 100.0
    logits.view(torch.int32)[:, 4000] = 0x7F800001
    lengths = torch.full((rows,), columns, dtype=torch.int32, device=DEVICE)
    ranking = Ranking(logits, lengths)
    for sort in (False, True):
        ranking.check(run(logits, lengths, 2048, sort=sort), 2048, sort=sort)


@pytest.mark.parametrize("columns", [40_000, 262_144])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", KS)
def test_ties_that_fill_a_buffer(k, dtype, columns):
    """Around the size of every buffer that could hold candidates: none may be dropped."""
    caps = (*CAPACITIES, 5 * k, 9 * k)
    counts = sorted({min(c + d, columns) for c in caps for d in (-1, 0, 1, c)})
    lengths = ints([columns] * len(counts))
    logits = plateau(counts, columns, DTYPES[dtype], DEVICE)
    for above in (0, 1, k - 1):  # elements that are larger than those that tie
        if above:
            logits[:, columns // 3 : columns // 3 + above] = 3.0
        ranking = Ranking(logits, lengths)
        for sort in (False, True):
            got = run(logits, lengths, k, sort=sort)
            ranking.check(got, k, sort=sort, context=f"{above} above")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_bits(dtype):
    """Random bits: every exponent, denormals, NaN with any payload, all in one row."""
    g = torch.Generator().manual_seed(7)
    size = DTYPES[dtype].itemsize
    logits = torch.randint(0, 256, (9, 50_000 * size), generator=g, dtype=torch.uint8)
    logits = logits.to(DEVICE).view(DTYPES[dtype])
    lengths = ints([50_000, 49_999, 2049, 2048, 2047, 513, 512, 1, 0])
    ranking = Ranking(logits, lengths)
    for k in (*KS, *ODD_KS):
        for sort in (False, True):
            ranking.check(run(logits, lengths, k, sort=sort), k, sort=sort)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [float("nan"), float("-inf")])
def test_fewer_numbers_than_k(rest, dtype):
    """The k-th score is -inf or NaN: these fill up, lowest column first."""
    logits = torch.full((6, 40_000), rest, dtype=DTYPES[dtype], device=DEVICE)
    for r, numbers in enumerate((0, 1, 511, 512, 513, 2047)):
        logits[r, 39_999 - torch.arange(numbers, device=DEVICE) * 7] = 1.5
    logits[:, 17_000:17_003] = float("-inf")
    lengths = ints([40_000] * 6)
    ranking = Ranking(logits, lengths)
    for k in (7, *KS):
        for sort in (False, True):
            ranking.check(run(logits, lengths, k, sort=sort), k, sort=sort)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_tie(dtype):
    """The k-th score is zero: -0.0 and 0.0 go by their column alone."""
    g = torch.Generator().manual_seed(5)
    logits = torch.where(torch.rand(4, 30_000, generator=g) < 0.5, 0.0, -0.0)
    logits[1:, ::100] = -1.0
    logits[2:, ::90] = 1.0
    logits = logits.to(DTYPES[dtype]).to(DEVICE)
    lengths = ints([30_000, 30_000, 30_000, 20_000])
    ranking = Ranking(logits, lengths)
    for k in KS:
        for sort in (False, True):
            ranking.check(run(logits, lengths, k, sort=sort), k, sort=sort)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_rows_in_a_wide_buffer(dtype):
    """Rows of every length in a 256,000-wide buffer whose tail is poison."""
    g = torch.Generator().manual_seed(3)
    some = torch.randint(0, 256_000, (57,), generator=g).tolist()
    lengths = ints([-1, 0, 1, 511, 512, 513, 256_000, *some])
    logits = draw("normal", 64, 256_000, dtype)
    poison_tail(logits, lengths)
    ranking = Ranking(logits, lengths)
    for k in KS:
        ranking.check(run(logits, lengths, k), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_rows(dtype):
    logits = draw("relu_sum", 6000, 5000, dtype)
    lengths = (torch.arange(6000, device=DEVICE) * 5003 // 6000).int()
    poison_tail(logits, lengths)
    ranking = Ranking(logits, lengths)
    for k in (100, 512, 2048):
        ranking.check(run(logits, lengths, k), k)
