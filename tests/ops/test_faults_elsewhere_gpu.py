"""The faults of docs/faults_elsewhere.md that need a GPU: graphs, streams, a busy GPU."""

import pytest
import torch
from kits.oracles import check_selection
from kits.replay import capture
from kits.topk_device import DEVICE, check_on_two_streams, draw, ints, run

pytestmark = pytest.mark.gpu


def test_a_busy_gpu_does_not_hang_a_cluster():
    """More CTAs than fit, beside matrix products on another stream: no CTA waits for another."""
    logits, lengths = draw("relu_sum", 200, 70_000, "bfloat16"), ints([70_000] * 200)
    want = run(logits, lengths, 512)
    check_selection(logits, lengths, 512, want)
    outs = [torch.empty_like(want) for _ in range(20)]
    a = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(60):
            a = (a @ a).clamp(-1, 1)
    for out in outs:
        run(logits, lengths, 512, out=out)
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_graph_follows_lengths_across_every_boundary(dtype):
    """One capture; lengths from 32,767 to 32,772 and around 131,072, in dirty outputs."""
    logits = draw("relu_sum", 2, 131_100, dtype)
    lengths, out = ints([0, 0]), torch.empty(2, 512, dtype=torch.int32, device=DEVICE)
    graph = capture(lambda: run(logits, lengths, 512, out=out))
    for n in (*range(32_765, 32_774), *range(131_068, 131_078), 512, 513, 0, -1, 131_100):
        lengths.copy_(ints([n, 131_100 - max(n, 0)]))
        out.fill_(0x7FFFFFFF)
        graph.replay()
        check_selection(logits, lengths, 512, out)


def test_two_streams_share_no_workspace():
    """The same shape on two streams at once, 50 times, the scores of one the other's negatives."""
    both = [draw("normal", 16, 70_000, "bfloat16")]
    both.append(both[0].neg())
    check_on_two_streams(both, ints([70_000] * 16), 512, 50)
