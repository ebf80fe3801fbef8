"""The vectorised oracles of the GPU tests against a loop over Python numbers."""

import pytest
import torch
from kits.inputs import mxfp4_cache
from kits.oracles import (
    Ranking,
    check_selection,
    fp8_keys,
    mxfp4_keys,
    read_mxfp4_one_by_one,
    read_one_by_one,
    slots_of,
    topk_row,
)

from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, fp8_cache, scores
from dsv4_plugin.cli.checks.oracles import RULES, Wrong, faults, same_bits


def by_loop(logits, lengths, k, starts, sort):
    rows = []
    for row, n, s in zip(logits.float().tolist(), lengths, starts, strict=True):
        rows.append(topk_row(row[s:] if s >= 0 else [], n, k, sort))
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ranking_is_the_loop(kind, dtype):
    """With windows anywhere: what lies outside of one must not come before its NaN."""
    lengths, starts = [90, 5, 40, 41, 200, -1, 30], [0, 3, 50, 60, 150, 7, -1]
    logits = scores(kind, len(lengths), 200, dtype)
    ranking = Ranking(logits, torch.tensor(lengths), most=64, starts=torch.tensor(starts))
    for k in (1, 40, 64):
        for sort in (False, True):
            want = by_loop(logits, lengths, k, starts, sort)
            ranking.check(want, k, sort=sort)
            some = ranking.rows([4, 0])
            some.check(want[[4, 0]], k, sort=sort)


def test_the_ranking_sees_every_mistake():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, float("nan"), 9.0]])
    ranking = Ranking(logits, torch.tensor([5]))
    ranking.check(torch.tensor([[1, 2]], dtype=torch.int32), 2, sort=True)
    ranking.check(torch.tensor([[1, 2]], dtype=torch.int32), 2)
    for sort in (False, True):  # neither by value nor by column
        with pytest.raises(AssertionError, match="1 of 1 rows are wrong"):
            ranking.check(torch.tensor([[2, 1]], dtype=torch.int32), 2, sort=sort)
    for wrong in ([1, 3], [1, 1], [1, 5], [1, -1], [1, 4], [0, 1]):
        with pytest.raises(AssertionError, match="1 missing|2 missing|1 of 1 rows"):
            ranking.check(torch.tensor([wrong], dtype=torch.int32), 2)


def test_a_short_row_keeps_its_order():
    ranking = Ranking(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
    ranking.check(torch.tensor([[0, 1, -1]], dtype=torch.int32), 3, sort=True)
    for sort in (False, True):
        with pytest.raises(AssertionError, match="no longer than k"):
            ranking.check(torch.tensor([[1, 0, -1]], dtype=torch.int32), 3, sort=sort)


def test_the_check_of_a_selection_sees_every_mistake():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 9.0]])
    n = torch.tensor([4])
    backwards = torch.tensor([[2, 1]], dtype=torch.int32)
    check_selection(logits, n, 2, backwards)
    with pytest.raises(AssertionError, match="do not ascend"):
        check_selection(logits, n, 2, backwards, ascending=True)
    for wrong, words in (
        ([1, 3], "lowest index"), ([1, 0], "larger score"), ([1, 1], "twice"),
        ([1, 4], "outside of the row"), ([1, -1], "number of indices"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            check_selection(logits, n, 2, torch.tensor([wrong], dtype=torch.int32))


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_what_the_loop_selects_has_no_fault(kind, dtype, sort):
    """Windows anywhere, NaN outside of them; k below, at and above the lengths."""
    lengths, starts = [90, 5, 40, 41, 200, -1, 30, 0], [0, 3, 50, 60, 150, 7, -1, 200]
    logits = scores(kind, len(lengths), 200, dtype)
    n, at = torch.tensor(lengths), torch.tensor(starts)
    column = torch.arange(200)
    outside = (column < at[:, None]) | (column >= (at + n)[:, None])
    logits.masked_fill_(outside, float("nan"))
    for k in (1, 40, 64):
        out = by_loop(logits, lengths, k, starts, sort)
        assert not faults(logits, n, k, out, starts=at, sort=sort, ascending=True).any()


def test_each_rule_names_its_rows():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 9.0]]).repeat(3, 1)
    n = torch.tensor([4, 4, 2])
    right = torch.tensor([[1, 2], [1, 2], [0, 1]], dtype=torch.int32)
    assert not faults(logits, n, 2, right, sort=True).any()
    for row, wrong, rule in (
        (0, [1, -1], 0), (1, [1, 4], 1), (1, [-7, 1], 1), (0, [1, 1], 2), (0, [1, 0], 3),
        (0, [1, 3], 4), (2, [1, 0], 5), (0, [2, 1], 6),
    ):  # fmt: skip
        out = right.clone()
        out[row] = torch.tensor(wrong)
        broken = faults(logits, n, 2, out, sort=True)
        assert bool(broken[row, rule]), RULES[rule]
        assert not broken[[r for r in range(3) if r != row]].any()
        with pytest.raises(Wrong) as raised:
            check_selection(logits, n, 2, out, sort=True)
        assert raised.value.rows == [row]


def test_no_rows_and_no_columns():
    none = torch.zeros(0, 5)
    check_selection(none, torch.zeros(0), 3, torch.zeros(0, 3, dtype=torch.int32))
    empty = torch.full((2, 3), -1, dtype=torch.int32)
    check_selection(torch.zeros(2, 0), torch.tensor([3, 0]), 3, empty)
    with pytest.raises(Wrong):
        check_selection(torch.zeros(2, 0), torch.tensor([3, 0]), 3, empty + 1)


def test_the_tables_decode_as_the_loops_do():
    slots = torch.arange(96)
    cache = fp8_cache(3, block_size=32, pad=8)
    cache[0, :256] = torch.arange(256).to(torch.uint8)
    codes, scale, values = fp8_keys(cache, slots // 32, slots % 32, 32, 128)
    assert bool(same_bits(values, read_one_by_one(cache, slots, 32)).all())
    assert bool(values.isnan().any()) and torch.equal(codes[0], torch.arange(128))
    assert torch.equal(scale, cache[:, 32 * 128 :].contiguous().view(torch.float32).reshape(-1))
    cache = mxfp4_cache(3, block_size=32, pad=8)
    cache[0, -1] = 255
    want = read_mxfp4_one_by_one(cache, slots, 32)
    assert bool(same_bits(mxfp4_keys(cache, slots // 32, slots % 32, 32, 128), want).all())


def test_slots_through_a_page_table():
    table = torch.tensor([[5, -1], [7, 2]], dtype=torch.int32)
    index = torch.tensor([[0, 3, 4, 8], [-1, 1, 7, 9], [2, 5, 0, 0], [6, 8, -1, 3]])
    want = [[20, 23, -1, -1], [-1, 21, -1, -1], [30, 9, 28, 28], [10, -1, -1, 31]]
    assert slots_of(index, table, 4, 2).tolist() == want
    assert slots_of(index[:2], table, 4, 1).tolist() == [want[0], [-1, 29, 11, -1]]
    assert bool((slots_of(index, table[:, :0], 4, 2) == -1).all())


def test_bits_tell_zeros_apart_and_nan_from_numbers_only():
    a = torch.tensor([0.0, float("nan"), float("nan"), 1.0])
    b = torch.tensor([-0.0, -float("nan"), 1.0, 1.0])
    assert same_bits(a, b).tolist() == [False, True, False, True]
