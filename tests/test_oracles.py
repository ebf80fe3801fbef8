"""The vectorised oracles of the GPU tests against a loop over Python numbers."""

import pytest
import torch
from oracles import Ranking, check_selection, topk_row

from dsv4_plugin.testing.inputs import DISTRIBUTIONS, scores


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
    ranking.check(torch.tensor([[2, 1]], dtype=torch.int32), 2)
    for wrong in ([2, 1],):
        with pytest.raises(AssertionError, match="1 of 1 rows are wrong"):
            ranking.check(torch.tensor([wrong], dtype=torch.int32), 2, sort=True)
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
    check_selection(logits, n, 2, torch.tensor([[2, 1]], dtype=torch.int32))
    for wrong, words in (
        ([1, 3], "lowest index"), ([1, 0], "larger score"), ([1, 1], "twice"),
        ([1, 4], "outside of the row"), ([1, -1], "number of indices"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=words):
            check_selection(logits, n, 2, torch.tensor([wrong], dtype=torch.int32))
