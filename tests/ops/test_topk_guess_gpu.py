"""Top-k on a GPU with a guess of the threshold: a wrong guess costs time and never an answer."""

import pytest
import torch
from kits.inputs import poison_tail
from kits.oracles import Ranking
from kits.topk_device import DEVICE, Guarded, draw, ints, run
from kits.topk_edges import plateau

from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS
from dsv4_plugin.kernels import cuda

pytestmark = pytest.mark.gpu

LENGTHS = (70_001, 65_537, 65_536, 40_003, 20_000, 16_385, 8197, 8193, 8192, 8187, 2049, 600, 0)


def guess(logits, lengths, k, **more):
    out = Guarded(len(logits), k, torch.int32)
    cuda.topk_with(logits, lengths, out.inside, threads=cuda.GUESS, cluster=1, **more)
    out.assert_untouched(f"{tuple(logits.shape)}, k {k}")
    return out.inside.clone()


def odd(kind, rows, columns):
    """Scores that mislead a sample, or that leave few numbers."""
    x = draw("normal", rows, columns, "float32")
    at = torch.arange(columns, device=DEVICE)
    part = draw("normal", rows, columns, "float32", seed=1).sigmoid()
    pages = draw("normal", rows, columns // 64 + 1, "float32", seed=2).repeat_interleave(64, 1)
    return {
        "few numbers": lambda: x.masked_fill(part > 0.2, float("nan")),
        "few above -inf": lambda: x.masked_fill(part > 0.2, -float("inf")),
        "denormal": lambda: x * 1e-40,
        "rounded": lambda: (64 * x).round() / 64,
        "coarse": lambda: (4 * x).round() / 4,
        "pages alike": lambda: pages[:, :columns].contiguous(),
        "pages nearly alike": lambda: pages[:, :columns] + x / 100,
        "infinities": lambda: x.masked_fill(part < 0.02, float("inf")),
        # The sample sees none of the best scores: no piece of it begins where they are.
        "beside the sample": lambda: torch.where(at % 8 < 4, x, x + 9),
        "only in the sample": lambda: torch.where(at % 64 < 4, x + 9, x),
    }[kind]()  # fmt: skip


ODD = ("few numbers", "few above -inf", "denormal", "rounded", "coarse", "pages alike",
       "pages nearly alike", "infinities", "beside the sample", "only in the sample")  # fmt: skip


@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, *ODD])
def test_every_row_has_the_answer_of_a_sort(kind):
    columns = max(LENGTHS)
    draws = odd if kind in ODD else lambda *shape: draw(*shape, "float32")
    logits, lengths = draws(kind, len(LENGTHS), columns), ints(LENGTHS)
    poison_tail(logits, lengths)
    ranking = Ranking(logits, lengths)
    for k in (1, 100, 512, 1000, 1024, 2048):
        ranking.check(guess(logits, lengths, k), k, context=f"k {k}")


@pytest.mark.parametrize("k", [512, 2048])
@pytest.mark.parametrize("above", [0, 1, 500])
def test_ties_for_the_last_places(k, above):
    """Around the number that the kernel ranks, around k, and around the room of its list."""
    counts = sorted({c + d for c in (1, 256, k, 2 * k + 1024, 9000) for d in (-1, 0, 1, above)})
    logits = plateau([max(c, 1) for c in counts], 20_000, torch.float32, DEVICE)
    logits[:, 7000 : 7000 + above] = 3.0
    lengths = ints([20_000] * len(counts))
    Ranking(logits, lengths).check(guess(logits, lengths, k), k, context=f"{above} above")


@pytest.mark.parametrize("columns", [9000, 40_000, 163_840])
def test_the_table_guesses(columns):
    """In every form of a call, with rows that begin anywhere, and short ones among them."""
    rows = 140
    whole = draw("normal", rows, columns + 8, "float32", seed=columns)
    at = torch.arange(rows, device=DEVICE)
    lengths = torch.where(at % 4 == 0, 60 * at, columns - at).int()
    for offset in (0, 1, 2, 3):
        logits = whole[:, offset : offset + columns]
        ranking = Ranking(logits, lengths)
        for sort in (False, True):
            ranking.check(run(logits, lengths, 2048, sort=sort), 2048, sort=sort)
    starts = (at % 8).int()
    rows_of = torch.stack([whole[r, s : s + columns] for r, s in enumerate(starts.tolist())])
    want = Ranking(rows_of, lengths)
    want.check(run(whole, lengths, 2048, row_starts=starts), 2048, context="row starts")
    pages = torch.randperm(4096, device=DEVICE)[: columns // 64 + 1].int().repeat(rows, 1)
    slots = run(logits, lengths, 2048, page_table=pages, page_size=64)
    index = run(logits, lengths, 2048).long()
    expected = pages.gather(1, index.clamp(min=0) // 64) * 64 + index.clamp(min=0) % 64
    assert torch.equal(slots, torch.where(index < 0, -1, expected).int())


def test_the_answer_does_not_depend_on_timing():
    logits, lengths = draw("relu_sum", 132, 30_000, "float32"), ints([30_000] * 132)
    want = guess(logits, lengths, 2048)
    for _ in range(50):
        assert torch.equal(guess(logits, lengths, 2048), want)


def test_there_is_a_guess_for_float32_only():
    logits = torch.zeros(1, 9000, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(TypeError, match="bfloat16.*float32"):
        guess(logits, ints([9000]), 512)
    with pytest.raises(ValueError, match="cluster is 2; with 0 threads it must be 1 ... 1"):
        cuda.topk_with(logits.float(), ints([9000]), torch.zeros(1, 512, dtype=torch.int32,
                       device=DEVICE), threads=cuda.GUESS, cluster=2)  # fmt: skip
