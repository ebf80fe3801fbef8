"""Index logits on a GPU: large shapes, memory, CUDA graphs, and scores of independent rows.

The bound is in logits_cases.py. Small shapes are in test_logits.py, which also runs on a GPU.
"""

import pytest
import torch
from kits.logits_cases import (
    TOLERANCE,
    D,
    bits,
    check,
    codes,
    oracle,
    paged,
    ragged_oracle,
    untouched,
)
from kits.replay import capture
from kits.topk_device import BACKEND, DEVICE, Guarded, ints

from dsv4_plugin import paged_logits, ragged_logits, select, topk

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Around a page, a tile of pages, and what one CTA may take at a time.
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 511, 512, 513)
EDGES += (1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097)
FAR = (1 << 31) + 64


def run(case, **more):
    return paged_logits(*case.arguments, backend=BACKEND, **more)


def filled(rows, columns, dtype=torch.bfloat16):
    return torch.full((rows, columns), -77.0, dtype=dtype, device=DEVICE)


def verify(case, out, before, n=None, context=""):
    n = case.lengths if n is None else n
    score, size = oracle(case, columns=out.shape[1])
    check(out, score, size, n, TOLERANCE[BACKEND, case.kind], context)
    untouched(out, n, before, context)


def lengths_of(rows, most, seed=0):
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, most + 1, (rows,), generator=g).tolist()
    some = [n for n in EDGES if n <= most]
    return [some[i % len(some)] if i % 2 else n for i, n in enumerate(drawn)]


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 4, 6])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 31, 33, 66, 131, 132, 133, 264, 300])
def test_batches(batch, next_n, heads):
    rows = batch * next_n
    case = paged(lengths_of(rows, 1100, seed=rows), next_n, heads, pages=200, pad=64).to(DEVICE)
    out = filled(rows, case.table.shape[1] * 64)
    before = out.clone()
    run(case, out=out)
    verify(case, out, before, context=f"batch {batch}, next_n {next_n}, {heads} heads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("next_n", [1, 3])
def test_every_edge_of_a_length(dtype, next_n):
    rows = len(EDGES) // next_n * next_n
    case = paged(list(EDGES[-rows:]), next_n, kind="bytes", pad=448).to(DEVICE)
    out = filled(rows, case.table.shape[1] * 64, dtype)
    before = out.clone()
    run(case, out=out)
    verify(case, out, before)


@pytest.mark.parametrize(
    "batch,columns", [(1, 8192), (1, 65_536), (1, 250_000), (8, 65_536), (32, 40_000), (140, 9000)]
)
def test_long_rows(batch, columns):
    """Rows of very different lengths in one grid, over a cache that they share."""
    lengths = [columns - (i * columns // batch) // 2 - i for i in range(batch)]
    case = paged(lengths, pages=3000, columns=columns).to(DEVICE)
    out = filled(batch, columns)
    before = out.clone()
    run(case, out=out)
    for b in range(batch):  # the oracle's float64 of all rows at once would not fit
        row = slice(b, b + 1)
        one = type(case)(case.q[row], case.cache, case.weights[row], case.lengths[row],
                         case.table[row], case.kind)  # fmt: skip
        verify(one, out[row], before[row], context=f"row {b}")


@pytest.mark.parametrize("rows,keys", [(1, 70_000), (300, 3000), (2000, 1500), (129, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(rows, keys, dtype):
    """Two sequences one after the other, causal windows, as an engine prefills them."""
    g = torch.Generator().manual_seed(rows)
    q, k = codes((rows, 64, D), "normal", g).to(DEVICE), codes((keys, D), "normal", g).to(DEVICE)
    scale = torch.rand(keys, generator=g).to(DEVICE)
    weights = (torch.randn(rows, 64, generator=g) * 0.1).to(DEVICE)
    first = (rows + 1) // 2
    starts = ints([0] * first + [keys // 3] * (rows - first))
    ends = [keys // 3 * (i + 1) // first for i in range(first)]
    ends += [keys // 3 + (keys - keys // 3) * i // (rows - first) for i in range(rows - first)]
    ends = ints(ends)
    out = filled(rows, keys, dtype)
    before = out.clone()
    ragged_logits(q, k, scale, weights, starts, ends, out=out, backend=BACKEND)
    score, size, n = ragged_oracle(q, k, scale, weights, starts, ends)
    check(out, score, size, n, TOLERANCE[BACKEND, "normal"])
    untouched(out, n, before)


# --- a score depends on itself only --------------------------------------------------------------


@pytest.mark.parametrize("heads", [64, 32])
def test_a_score_depends_on_itself_only(heads):
    """The same bits in any batch, at any place of the table, for any length, next_n and grid."""
    bank = paged([1536] * 12, 1, heads, kind="bytes").to(DEVICE)
    want = run(bank, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    for batch in (1, 2, 3, 7, 66, 131, 132, 133, 300):
        for width in (1, 3, 24, 40):
            who = torch.randint(0, 12, (batch,), generator=g)
            page = torch.randint(0, 24, (batch, width), generator=g)
            n = torch.randint(0, width * 64 + 1, (batch,), generator=g)
            n[0] = width * 64
            table = bank.table.cpu()[who].gather(1, page).to(DEVICE)
            got = paged_logits(
                bank.q[who.to(DEVICE)], bank.cache, bank.weights[who.to(DEVICE)], n.to(DEVICE),
                table, dtype=torch.float32, backend=BACKEND,
            )  # fmt: skip
            column = (page[:, :, None] * 64 + torch.arange(64)).flatten(1).to(DEVICE)
            expected = want[who.to(DEVICE)].gather(1, column)
            valid = torch.arange(width * 64, device=DEVICE) < n.to(DEVICE)[:, None]
            assert torch.equal(got[valid], expected[valid]), f"batch {batch}, {width} pages"
    for next_n in (2, 4, 6):  # every request on the pages of the first
        q = bank.q.view(12 // next_n, next_n, heads, D)
        table = bank.table[:1].expand(12 // next_n, -1)
        got = paged_logits(q, bank.cache, bank.weights, bank.lengths, table, dtype=torch.float32,
                           backend=BACKEND)  # fmt: skip
        alone = paged_logits(bank.q, bank.cache, bank.weights, bank.lengths,
                             bank.table[:1].expand(12, -1), dtype=torch.float32,
                             backend=BACKEND)  # fmt: skip
        assert torch.equal(got, alone), f"next_n {next_n}"


def test_call_after_call_gives_the_same_bits():
    case = paged(lengths_of(40, 3000), pages=500).to(DEVICE)
    first = filled(40, case.table.shape[1] * 64)
    run(case, out=first)
    for _ in range(50):
        again = filled(40, first.shape[1])
        run(case, out=again)
        assert torch.equal(bits(again), bits(first))


def test_a_ragged_row_depends_on_itself_only():
    g = torch.Generator().manual_seed(0)
    q, k = codes((200, 64, D), "bytes", g).to(DEVICE), codes((900, D), "bytes", g).to(DEVICE)
    scale, weights = torch.rand(900, device=DEVICE), torch.randn(200, 64, device=DEVICE)
    zeros, all_keys = ints([0] * 200), ints([900] * 200)
    want = ragged_logits(
        q, k, scale, weights, zeros, all_keys, dtype=torch.float32, backend=BACKEND
    )
    for begin, end in ((0, 900), (1, 900), (63, 64), (64, 700), (65, 131), (899, 900)):
        for rows in (slice(0, 200), slice(7, 8), slice(50, 183)):
            count = rows.stop - rows.start
            got = ragged_logits(
                q[rows], k, scale, weights[rows], ints([begin] * count), ints([end] * count),
                dtype=torch.float32, backend=BACKEND,
            )  # fmt: skip
            assert torch.equal(got[:, : end - begin], want[rows, begin:end]), (begin, end, rows)


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize(
    ("rows", "keys"),
    [(4321, 4200), (150, 9000), (300, 40_000), (2048, 33_000)],
)
def test_many_ragged_rows_are_what_few_are(rows, keys, heads):
    """Calls differ in the tiles of keys and in the rows that share one: the bits are the same."""
    g = torch.Generator().manual_seed(heads)
    q, k = codes((rows, heads, D), "normal", g).to(DEVICE), codes((keys, D), "normal", g).to(DEVICE)
    scale = torch.rand(keys, generator=g).to(DEVICE)
    weights = (torch.randn(rows, heads, generator=g) * 0.1).to(DEVICE)
    starts = torch.randint(-9, keys + 9, (rows,), generator=g).int()
    starts[::5] = 0
    ends = starts + torch.randint(-50, keys, (rows,), generator=g).int()
    n = (ends - starts).clamp(0, keys).to(DEVICE)
    starts, ends = starts.to(DEVICE), ends.to(DEVICE)
    out = filled(rows, keys)
    before = out.clone()
    ragged_logits(q, k, scale, weights, starts, ends, out=out, backend=BACKEND)
    untouched(out, n, before)
    ragged_logits(q, k, scale, weights, starts, ends, one_request=True, out=before, backend=BACKEND)
    assert torch.equal(bits(before), bits(out))
    for begin in (0, 31, rows // 4, rows // 2, rows - 40):
        part = slice(begin, begin + 40)
        few = filled(40, keys)
        ragged_logits(
            q[part], k, scale, weights[part], starts[part], ends[part], out=few, backend=BACKEND
        )
        assert torch.equal(bits(out[part]), bits(few)), begin
    some = slice(rows // 2, rows // 2 + 40)
    score, size, count = ragged_oracle(q[some], k, scale, weights[some], starts[some], ends[some])
    check(out[some], score, size, count, TOLERANCE[BACKEND, "normal"])


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment_with_guards(offset, dtype):
    """Nothing outside of `out` is written, nothing past a row's length, and no input."""
    case = paged(lengths_of(24, 1100, seed=offset), 2, pages=100).to(DEVICE)
    inputs = [x.clone() for x in (case.q.view(torch.uint8), case.cache, case.weights, case.table)]
    for columns in (1152, 1100, 1099, 700, 65):
        for stride in (columns, columns + 1, columns + 7, 1200):
            out = Guarded(24, columns, dtype, stride=stride, offset=offset)
            out.inside.fill_(-77.0)
            before = out.inside.clone()
            run(case, out=out.inside)
            context = f"offset {offset}, stride {stride}, {columns} columns"
            verify(case, out.inside, before, case.lengths.clamp(max=columns), context)
            out.assert_untouched(context)
    after = (case.q.view(torch.uint8), case.cache, case.weights, case.table)
    assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(inputs, after, strict=True))


def bits_of(x):
    return x if x.dtype == torch.uint8 else bits(x)


def test_what_lies_past_the_length_changes_nothing():
    """NaN in keys and scales past the length, in unused pages, and in the rest of the table."""
    n = lengths_of(30, 900)
    case = paged(n, columns=1024).to(DEVICE)
    clean = filled(30, 1024)
    run(case, out=clean)
    for r, length in enumerate(n):
        page, at = divmod(length, 64)
        for c in range(page + (at > 0), case.table.shape[1]):
            case.cache[int(case.table[r, c])].fill_(0x7F)
            case.table[r, c] = (1 << 30, -5, len(case.cache), 0)[c % 4]
        if at:
            held = case.cache[int(case.table[r, page])]
            held[at * D : 64 * D].fill_(0xFF)
            held[64 * D + 4 * at :].view(torch.float32).fill_(torch.nan)
    dirty = filled(30, 1024)
    run(case, out=dirty)
    assert torch.equal(bits(clean), bits(dirty))


def test_pages_that_are_none():
    case = paged([1024, 1000, 65, 640], pages=64).to(DEVICE)
    case.table[0, 3] = -1
    case.table[1, ::2] = len(case.cache)
    case.table[2, 1] = (1 << 31) - 1
    case.table[3] = -(1 << 31)
    out = filled(4, 1024)
    before = out.clone()
    run(case, out=out)
    verify(case, out, before)
    assert bool((out[3, :640] == -torch.inf).all())


def test_pages_further_apart_than_32_bits_count():
    """Pages 768 MB apart, the last of them past 2^31 bytes; most of the memory is never touched."""
    stride, pages = 3 << 28, 5
    arena = torch.empty(stride * (pages - 1) + 64 * 132, dtype=torch.uint8, device=DEVICE)
    case = paged([320, 300, 65, 64], pages=pages, columns=320)
    cache = arena.as_strided((pages, 64 * 132), (stride, 1))
    cache.copy_(case.cache)
    near = case.to(DEVICE)
    want = run(near, out=filled(4, 320))
    near.cache = cache
    got = run(near, out=filled(4, 320))
    assert torch.equal(bits(got), bits(want))
    verify(near, got, filled(4, 320))


def test_rows_and_tables_further_apart_than_32_bits_count():
    """`out` and `block_table` with rows 2^31 + 64 elements apart."""
    case = paged([640, 577], pages=30).to(DEVICE)
    want = run(case, out=filled(2, 640))
    far = torch.empty(FAR + 640, dtype=torch.bfloat16, device=DEVICE)
    out = far.as_strided((2, 640), (FAR, 1))
    out.fill_(-77.0)
    run(case, out=out)
    assert torch.equal(bits(out), bits(want))
    del far, out
    far = torch.empty(FAR + 10, dtype=torch.int32, device=DEVICE)
    table = far.as_strided((2, 10), (FAR, 1))
    table.copy_(case.table)
    case.table = table
    assert torch.equal(bits(run(case, out=filled(2, 640))), bits(want))


# --- graphs and streams --------------------------------------------------------------------------


@pytest.mark.parametrize("next_n", [1, 2])
def test_graph_follows_lengths_and_tables(next_n):
    """One graph; lengths, tables and queries change between replays, the result starts dirty."""
    rows = 6 * next_n
    case = paged([4096] * rows, next_n, pages=400).to(DEVICE)
    out = filled(rows, 4096)
    graph = capture(lambda: run(case, out=out))
    for seed in range(30):
        fresh = paged(lengths_of(rows, 4096, seed), next_n, pages=400, columns=4096, seed=seed)
        fresh = fresh.to(DEVICE)
        for held, new in zip(case.arguments, fresh.arguments, strict=True):
            held.copy_(new)
        case.table[::2, seed] = -1
        out.fill_(-77.0)
        before = out.clone()
        graph.replay()
        verify(case, out, before, context=f"replay {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [512, 2048])
def test_select_in_a_graph(k, dtype):
    """The chain is the two ops, from a length of nothing to one past the table."""
    case = paged([8192] * 8, 2, pages=500).to(DEVICE)
    scratch = torch.empty(8, 8192, dtype=dtype, device=DEVICE)
    out, raw = (torch.empty(8, k, dtype=torch.int32, device=DEVICE) for _ in range(2))

    def chain():
        select(*case.arguments, k, page_table=case.table, out=out, out_raw=raw, logits=scratch,
               backend=BACKEND)  # fmt: skip

    graph = capture(chain)
    for step in range(20):
        case.lengths.copy_(ints([0, 1, k - 1, k, k + 1, 37 * step + k, 8192 - step, 9000]))
        out.fill_(-7)
        raw.fill_(-7)
        scratch.fill_(torch.inf)
        graph.replay()
        logits = run(case, dtype=dtype)
        want_raw = torch.empty_like(raw)
        want = topk(logits, case.lengths, k, next_n=2, page_table=case.table, out_raw=want_raw,
                    backend=BACKEND)  # fmt: skip
        assert torch.equal(raw, want_raw) and torch.equal(out, want), f"step {step}"


def test_back_to_back_calls_on_inputs_of_their_own():
    """Producer, logits, top-k, forty times in one graph with nothing between: none starts early."""
    source = paged([3000] * 10, pages=300).to(DEVICE)
    case = paged([3000] * 10, pages=300).to(DEVICE)
    logits, outs = filled(10, 3008), torch.empty(40, 10, 512, dtype=torch.int32, device=DEVICE)
    wide = source.q.view(torch.uint8)

    def chain():
        for i in range(40):
            case.q.view(torch.uint8).copy_(wide.roll(i, 0))
            run(case, out=logits)
            topk(logits, case.lengths, 512, out=outs[i], backend=BACKEND)

    graph = capture(chain)
    for _ in range(3):
        outs.fill_(-7)
        graph.replay()
        for i in range(40):
            alone = paged_logits(wide.roll(i, 0), *case.arguments[1:], backend=BACKEND)
            want = topk(alone, case.lengths, 512, backend=BACKEND)
            assert torch.equal(outs[i], want), f"call {i}"


def test_two_streams():
    """Different calls on two streams at once, 100 of each: there is no state that calls share."""
    work = []
    for seed, (rows, most, heads) in enumerate(((16, 4000, 64), (90, 700, 32))):
        case = paged(lengths_of(rows, most, seed), 1, heads, pages=200, seed=seed).to(DEVICE)
        want = filled(rows, case.table.shape[1] * 64)
        run(case, out=want)
        outs = [filled(*want.shape) for _ in range(100)]
        work.append((case, want, outs, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for i in range(100):
        for case, _, outs, stream in work:
            with torch.cuda.stream(stream):
                run(case, out=outs[i])
    torch.cuda.synchronize()
    for _, want, outs, _ in work:
        assert all(torch.equal(bits(out), bits(want)) for out in outs)
