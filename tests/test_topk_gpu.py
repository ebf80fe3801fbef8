"""Top-k on a GPU: engine sizes, path boundaries, CUDA graphs, streams, far memory."""

import pytest
import torch
from oracles import check_selection

from dsv4_plugin import topk
from dsv4_plugin.testing.inputs import DISTRIBUTIONS, poison_tail, scores

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KS = [512, 1024, 2048]
# Where a kernel may change its path: vectors, tiles, registers, shared memory, clusters.
EDGES = [512, 1024, 2048, 4096, 8192, 16_384, 24_576, 32_768, 49_152, 65_536, 98_304, 131_072]


def run(logits, lengths, k, **more):
    got = topk(logits, lengths, k, backend="cuda", **more)
    check_selection(logits, lengths, k, got)
    return got


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("shape", [(1, 8192), (3, 65_536), (33, 40_000), (2, 262_144)])
def test_engine_sizes(kind, dtype, k, shape):
    logits = scores(kind, *shape, dtype, device="cuda")
    lengths = torch.full((shape[0],), shape[1], dtype=torch.int32, device="cuda")
    got = run(logits, lengths, k)
    want = topk(logits, lengths, k, backend="torch")
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    best = run(logits, lengths, k, sort=True)
    assert torch.equal(best, topk(logits, lengths, k, sort=True, backend="torch"))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "relu_sum", "two_values"])
def test_around_every_edge(edge, dtype, kind):
    lengths = torch.tensor([edge + d for d in range(-5, 6)], dtype=torch.int32, device="cuda")
    for offset in (0, 1, 3):
        buffer = torch.empty(len(lengths), edge + 64, dtype=dtype, device="cuda")
        logits = buffer[:, offset : offset + edge + 5]
        logits.copy_(scores(kind, *logits.shape, dtype, seed=edge, device="cuda"))
        poison_tail(logits, lengths)
        for k in KS:
            run(logits, lengths, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_rows_in_a_wide_buffer(dtype):
    """Rows of every length in a 256,000-wide buffer whose tail is poison."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.cat([torch.tensor([-1, 0, 1, 511, 512, 513, 256_000]),
                         torch.randint(0, 256_000, (57,), generator=g)]).int().cuda()  # fmt: skip
    logits = scores("normal", 64, 256_000, dtype, device="cuda")
    poison_tail(logits, lengths)
    whole = run(logits, lengths, 512)
    for r in (2, 5, 6, 20, 63):  # the batch a row is in changes nothing
        alone = run(logits[r : r + 1, : max(int(lengths[r]), 1)], lengths[r : r + 1], 512)
        assert torch.equal(alone[0], whole[r])


def test_many_rows():
    logits = scores("relu_sum", 3000, 5000, torch.bfloat16, device="cuda")
    lengths = (torch.arange(3000, device="cuda") * 5003 // 3000).int()
    poison_tail(logits, lengths)
    run(logits, lengths, 512)


def test_next_n_and_page_table_at_engine_size():
    rows, next_n, columns = 8, 2, 65_536
    n = torch.tensor([65_536, 40_001, 600, 3], dtype=torch.int32, device="cuda")
    logits = scores("normal", rows, columns, torch.bfloat16, device="cuda")
    table = torch.randint(0, 1 << 24, (4, columns // 64), dtype=torch.int32, device="cuda")
    args = {"next_n": next_n, "page_table": table, "page_size": 64}
    raw, want_raw = (torch.empty(rows, 512, dtype=torch.int32, device="cuda") for _ in range(2))
    got = topk(logits, n, 512, out_raw=raw, backend="cuda", **args)
    want = topk(logits, n, 512, out_raw=want_raw, backend="torch", **args)
    assert torch.equal(raw.sort(1).values, want_raw.sort(1).values)
    assert torch.equal(got.sort(1).values, want.sort(1).values)


def test_row_stride_past_two_gib():
    """Rows 3 GiB apart: offsets need 64 bits."""
    stride = 3 << 29  # elements of bfloat16
    buffer = torch.empty(2 * stride + 70_000, dtype=torch.bfloat16, device="cuda")
    logits = buffer.as_strided((3, 70_000), (stride, 1))
    logits.copy_(scores("normal", 3, 70_000, torch.bfloat16, device="cuda"))
    run(logits, torch.full((3,), 70_000, device="cuda"), 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graph_replays_with_growing_lengths(dtype):
    """One graph, 200 replays; lengths cross the path boundaries, the output starts dirty."""
    rows, columns, k = 4, 140_000, 512
    logits = scores("relu_sum", rows, columns, dtype, device="cuda")
    lengths = torch.zeros(rows, dtype=torch.int32, device="cuda")
    out = torch.empty(rows, k, dtype=torch.int32, device="cuda")
    topk(logits, lengths, k, out=out, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk(logits, lengths, k, out=out, backend="cuda")
    for step in range(200):
        base = [32_760 + step, 131_000 + step, 500 + step, step * 700][:rows]
        lengths.copy_(torch.tensor(base, dtype=torch.int32))
        out.random_(-(1 << 31), (1 << 31) - 1)
        graph.replay()
        check_selection(logits, lengths, k, out)


def test_two_streams():
    logits = [scores("normal", 16, 100_000, torch.bfloat16, seed=i, device="cuda") for i in (0, 1)]
    lengths = torch.full((16,), 100_000, dtype=torch.int32, device="cuda")
    want = [run(x, lengths, 512) for x in logits]
    streams = [torch.cuda.Stream() for _ in logits]
    outs = [[torch.empty_like(want[0]) for _ in range(50)] for _ in logits]
    torch.cuda.synchronize()
    for i in range(50):
        for stream, x, out in zip(streams, logits, outs, strict=True):
            with torch.cuda.stream(stream):
                topk(x, lengths, 512, out=out[i], backend="cuda")
    torch.cuda.synchronize()
    for w, some in zip(want, outs, strict=True):
        assert all(torch.equal(w, o) for o in some)


def test_kernels_between_kernels_see_each_other():
    """Producer and consumer around the top-k in one graph: nothing starts too early."""
    source = scores("normal", 8, 50_000, torch.bfloat16, device="cuda")
    lengths = torch.full((8,), 50_000, dtype=torch.int32, device="cuda")
    logits, out = torch.zeros_like(source), torch.zeros(8, 512, dtype=torch.int32, device="cuda")
    total = torch.zeros(8, dtype=torch.int64, device="cuda")
    seen = torch.zeros(30, 8, dtype=torch.int64, device="cuda")
    topk(logits, lengths, 512, out=out, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(30):
            logits.copy_(source.roll(i * 1000, 1))
            topk(logits, lengths, 512, out=out, backend="cuda")
            torch.sum(out, 1, out=total)
            seen[i].copy_(total)
    graph.replay()
    torch.cuda.synchronize()
    for i in range(30):
        want = topk(source.roll(i * 1000, 1), lengths, 512, backend="torch").sum(1)
        assert torch.equal(seen[i], want)
