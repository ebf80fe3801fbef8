"""Top-k on a GPU: CUDA graphs, streams, and the independence of rows."""

import pytest
import torch
from kits.oracles import Ranking, check_selection
from kits.replay import capture
from kits.topk_device import DEVICE, check_on_two_streams, draw, ints, run
from kits.topk_edges import ROW_EDGES

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.topk_cases import DTYPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_with_growing_lengths(dtype, sort):
    """One graph, 200 replays; lengths cross the path boundaries, the output starts dirty."""
    columns, k = 140_000, 512
    logits = draw("relu_sum", 5, columns, dtype)
    shown = logits
    lengths = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    out = torch.empty(5, k, dtype=torch.int32, device=DEVICE)
    graph = capture(lambda: run(logits, lengths, k, sort=sort, out=out))
    for step in range(200):
        lengths.copy_(ints([32_670 + step, 130_972 + step, 412 + step, step * 700, 8092 + step]))
        out.random_(-(1 << 31), (1 << 31) - 1)
        graph.replay()
        check_selection(shown, lengths, k, out)
        if sort and step % 20 == 0:
            assert torch.equal(out, topk(shown, lengths, k, sort=True, backend="torch"))


def test_graph_follows_lengths_starts_and_pages():
    """What changes between replays is read at replay: lengths, row starts and the page table."""
    rows, columns, k = 6, 50_000, 512
    logits = draw("normal", rows, columns, "bfloat16")
    lengths, starts = (torch.zeros(rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
    table = torch.zeros(rows, 800, dtype=torch.int32, device=DEVICE)
    out, raw = (torch.empty(rows, k, dtype=torch.int32, device=DEVICE) for _ in range(2))
    arguments = {"row_starts": starts, "page_table": table}
    counts = torch.empty(rows, dtype=torch.int32, device=DEVICE)
    given = {"out": out, "out_raw": raw, "out_counts": counts, **arguments}
    graph = capture(lambda: run(logits, lengths, k, **given))
    g = torch.Generator().manual_seed(1)
    for _ in range(40):
        starts.copy_(torch.randint(0, 20_000, (rows,), generator=g))
        lengths.copy_(torch.randint(-1, 50_000, (rows,), generator=g))
        table.copy_(torch.randint(-1, 1 << 20, table.shape, generator=g))
        graph.replay()
        Ranking(logits, lengths, starts=starts).check(raw, k)
        want = topk(logits, lengths, k, backend="torch", **arguments)
        assert torch.equal(out.sort(1).values, want.sort(1).values)
        assert torch.equal(counts, (raw >= 0).sum(1).int())


def test_two_streams():
    """Different calls on two streams at once, 100 of each: none sees the other."""
    shapes = [(16, 100_000, "bfloat16", 512), (3, 262_144, "float32", 2048)]
    work = []
    for rows, columns, dtype, k in shapes:
        logits = draw("relu_sum", rows, columns, dtype)
        lengths = ints([columns] * rows)
        want = run(logits, lengths, k)
        Ranking(logits, lengths).check(want, k)
        outs = [torch.empty_like(want) for _ in range(100)]
        work.append((logits, lengths, k, want, outs, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for i in range(100):
        for logits, lengths, k, _, outs, stream in work:
            with torch.cuda.stream(stream):
                run(logits, lengths, k, out=outs[i])
    torch.cuda.synchronize()
    for _, _, _, want, outs, _ in work:
        assert torch.equal(torch.stack(outs), want.expand(100, *want.shape))


def test_one_call_on_two_streams():
    """The same shape on two streams at once: there is no state that calls share."""
    both = [draw("normal", 16, 100_000, "bfloat16", seed=i) for i in (0, 1)]
    check_on_two_streams(both, ints([100_000] * 16), 512, 100)


@pytest.mark.parametrize("columns", [8192, 50_000])
def test_kernels_between_kernels_see_each_other(columns):
    """Producer and consumer around the top-k in one graph: nothing starts too early."""
    source = draw("normal", 8, columns, "bfloat16")
    lengths = ints([columns] * 8)
    logits, out = torch.zeros_like(source), torch.zeros(8, 512, dtype=torch.int32, device=DEVICE)
    total = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    seen_totals = torch.zeros(30, 8, dtype=torch.int64, device=DEVICE)
    run(logits, lengths, 512, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(30):
            logits.copy_(source.roll(i * 1000, 1))
            run(logits, lengths, 512, out=out)
            torch.sum(out, 1, out=total)
            seen_totals[i].copy_(total)
    for _ in range(5):
        seen_totals.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for i in range(30):
            want = topk(source.roll(i * 1000, 1), lengths, 512, backend="torch").sum(1)
            assert torch.equal(seen_totals[i], want), f"call {i}"


def test_calls_back_to_back_on_changing_scores():
    """Top-k after top-k with no kernel between, each on the scores of its own: 50 in one graph."""
    lengths = ints([9000] * 40)
    inputs = [draw("relu_sum", 40, 9000, "bfloat16", seed=i) for i in range(50)]
    outs = [torch.empty(40, 512, dtype=torch.int32, device=DEVICE) for _ in inputs]
    run(inputs[0], lengths, 512)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, out in zip(inputs, outs, strict=True):
            run(x, lengths, 512, out=out)
    for _ in range(5):
        graph.replay()
        for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
            Ranking(x, lengths).check(out, 512, context=f"call {i}")
            out.fill_(-7)


LENGTHS = (0, 300, 513, 700, 4095, 8192, 8193, 20_000, 32_769, 65_536, 131_073, 200_000, 256_000)
KINDS = ("normal", "relu_sum", "crowded", "two_values")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [512, 2048, 1000])
def test_a_row_depends_on_itself_only(dtype, k):
    """The same bits, order included, alone and in any batch, at any position, width and grid."""
    bank = torch.cat([draw(KINDS[i % 4], 1, 256_000, dtype, seed=i) for i in range(len(LENGTHS))])
    lengths = ints(LENGTHS)
    bank.masked_fill_(torch.arange(256_000, device=DEVICE) >= lengths[:, None], float("nan"))
    alone = []
    for r, n in enumerate(LENGTHS):
        row = bank[r : r + 1, : max(n, 1)].contiguous()
        alone.append(run(row, lengths[r : r + 1], k)[0])
        for width in (n + 1, n + 1000, 140_000, 256_000):
            if n <= width <= 256_000:
                wide = run(bank[r : r + 1, :width], lengths[r : r + 1], k)[0]
                assert torch.equal(wide, alone[r]), f"length {n} in a buffer of {width}"
    want = torch.stack(alone)
    Ranking(bank, lengths).check(want, k)
    for rows in (*ROW_EDGES, 300):
        index = (torch.arange(rows, device=DEVICE) * 5 + rows) % len(LENGTHS)
        got = run(bank[index], lengths[index], k)
        assert torch.equal(got, want[index]), f"in a batch of {rows}"
    again = [run(bank, lengths, k) for _ in range(10)]
    assert all(torch.equal(one, want) for one in again), "differs from call to call"
