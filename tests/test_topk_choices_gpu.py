"""Top-k on a GPU: the same answer with every number of threads and CTAs a row."""

import pytest
import torch
from oracles import Ranking
from topk_device import DEVICE, Guarded, draw, ints, seen

from dsv4_plugin.kernels import cuda
from dsv4_plugin.testing.topk.cases import DTYPES
from dsv4_plugin.testing.topk.sweep import CLUSTERS, THREADS, choices

pytestmark = pytest.mark.gpu

LENGTHS = (70_001, 70_000, 65_537, 40_003, 20_000, 8193, 8192, 4096, 2049, 600, 513, 512, 3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "relu_sum", "two_values", "special", "ascending"])
def test_every_choice_gives_the_same_answer(kind, dtype):
    columns = max(LENGTHS)
    logits, lengths = draw(kind, len(LENGTHS), columns, dtype), ints(LENGTHS)
    ranking = Ranking(seen(logits, dtype), lengths)
    tried = [*choices(1, columns, sms=1 << 20), (1024, 1)]
    assert {c for _, c in tried} == set(CLUSTERS) and {t for t, _ in tried} > set(THREADS)
    for k in (512, 2048):
        want = None
        for threads, cluster in tried:
            out = Guarded(len(LENGTHS), k, torch.int32)
            cuda.topk_with(logits, lengths, out.inside, threads=threads, cluster=cluster,
                           narrow=dtype == "narrow")  # fmt: skip
            out.assert_untouched(f"{cluster} x {threads}")
            ranking.check(out.inside, k, context=f"{cluster} x {threads}")
            want = out.inside.clone() if want is None else want
            assert torch.equal(out.inside, want), f"{cluster} x {threads}: another order"


@pytest.mark.parametrize(
    "threads,cluster,words",
    [
        (128, 1, "threads is 128.*256, 512 or 1024"),
        (512, 0, "cluster is 0.*1 ..."),
        (512, 17, "cluster is 17.*1 ..."),
        (1024, 2, "cluster is 2; with 1024 threads it must be 1 ... 1"),
        (256, 1, "hold rows of 131072 scores, logits has 131073 columns"),
    ],
)
def test_a_choice_that_there_is_none(threads, cluster, words):
    logits = torch.zeros(1, 131_073, dtype=torch.bfloat16, device=DEVICE)
    out = torch.zeros(1, 512, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        cuda.topk_with(logits, ints([5]), out, threads=threads, cluster=cluster)
