"""Top-k on a GPU: the same answer for every number of threads and of CTAs for a row."""

import pytest
import torch
from kits.oracles import Ranking
from kits.topk_device import DEVICE, Guarded, draw, ints

from benchmarks.tuning.choice_sweep import CLUSTERS, THREADS, Sweep, choices
from dsv4_plugin.cli.checks.topk_cases import DTYPES, Case
from dsv4_plugin.kernels import cuda

pytestmark = pytest.mark.gpu

LENGTHS = (70_001, 70_000, 65_537, 65_536, 40_003, 20_000, 8193, 8192, 4097, 4096, 2049, 1025, 600)
LENGTHS += (513, 512, 3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "relu_sum", "two_values", "special", "ascending"])
def test_every_choice_gives_the_same_answer(kind, dtype):
    columns = max(LENGTHS)
    logits, lengths = draw(kind, len(LENGTHS), columns, dtype), ints(LENGTHS)
    ranking = Ranking(logits, lengths)
    tried = [*choices(1, columns, sms=1 << 20, solos=(1024, 4096, 8192),
                      guesses=dtype == "float32"), (1024, 1, 8192)]  # fmt: skip
    assert {c for _, c, _ in tried} == set(CLUSTERS) and {t for t, _, _ in tried} > set(THREADS)
    for k in (512, 2048):
        want = None
        for threads, cluster, solo in tried:
            name = f"{cluster} x {threads} solo {solo}"
            out = Guarded(len(LENGTHS), k, torch.int32)
            counts = Guarded(1, len(LENGTHS), torch.int32)
            cuda.topk_with(logits, lengths, out.inside, threads=threads, cluster=cluster, solo=solo,
                           out_counts=counts.inside[0])  # fmt: skip
            out.assert_untouched(name)
            counts.assert_untouched(name)
            assert torch.equal(counts.inside[0], lengths.clamp(max=k)), name
            ranking.check(out.inside, k, context=name)
            want = out.inside.clone() if want is None else want
            assert torch.equal(out.inside, want), f"{name}: another order"


def test_the_sweep_sees_selections_behind_their_logits():
    sweep = Sweep(replays=1, launches=2, behind=True)
    sweep.cell(Case("decode", "bfloat16", 512, 2, 2176, width=8192))
    assert len(sweep.results) > 5
    assert all(row["exact"] and 0 < row["behind_us"] < 1000 for row in sweep.results)


@pytest.mark.parametrize("solo", [1016, 1028, 131_080])
def test_what_no_cta_serves_alone(solo):
    logits = torch.zeros(1, 9000, dtype=torch.bfloat16, device=DEVICE)
    out = torch.zeros(1, 512, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=f"solo is {solo}.*multiple of 8 from 1024 to 131072"):
        cuda.topk_with(logits, ints([5]), out, threads=256, cluster=2, solo=solo)


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
