"""The candidate ops on a GPU: large shapes, memory, CUDA graphs, and scores of independent rows.

Small shapes and every rule are in test_candidates.py, which also runs on a GPU. The oracle is a
stable sort on the scores of ``paged_logits``; no comparison has a tolerance.
"""

import pytest
import torch
from kits.candidate_cases import DTYPES, EDGES, PAD, dense, draw, equal_bits, oracle, valid, written
from kits.logits_cases import D, codes
from kits.replay import capture
from kits.topk_device import BACKEND, DEVICE, Guarded, bits, ints

from dsv4_plugin import (
    block_maxima,
    candidate_logits,
    candidate_logits_ragged,
    candidate_select,
    paged_logits,
    ragged_logits,
    select_blocks,
    select_candidates,
    topk,
)

pytestmark = pytest.mark.gpu

MILLION = 1 << 20
FAR = (1 << 31) + 64
CUDA = {"backend": BACKEND}


def lists(n, held, seed=0):
    """Random candidates of rows of `n` keys, as `select_blocks` writes them."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    blocks = -(-n.reshape(-1, 1).long().clamp(min=0) // 8)
    rank = torch.rand(len(blocks), max(int(blocks.max()), held), generator=g, device=DEVICE)
    block = torch.arange(rank.shape[1], device=DEVICE)
    rank = torch.where(block == blocks - 1, 2.0, torch.where(block < blocks, rank, -1.0))
    value, index = rank.topk(held, dim=1)
    return oracle.ascending(torch.where(value < 0, -1, index).int())


def full_pages(case, keys, size):
    """Tables of shuffled pages for rows of `keys` keys, over a cache of few pages."""
    g = torch.Generator(device=DEVICE).manual_seed(keys)
    shape = len(case.q), -(-keys // size)
    return torch.randint(0, len(case.cache), shape, generator=g, device=DEVICE).int()


def long_case(rows, keys, heads=32, block_size=64, next_n=1):
    """Rows of up to `keys` keys over 3,000 pages that they share."""
    case = draw([64] * rows, next_n, heads, block_size, pages=3000).to(DEVICE)
    case.table = full_pages(case, keys, block_size)
    case.lengths = ints(keys - 7 * r - (r * keys // rows) // 2 for r in range(rows))
    return case


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize(
    "rows,keys", [(1, MILLION), (3, MILLION), (2, 300_001), (17, 65_535), (64, 40_000), (140, 9000)]
)
def test_the_chains_of_long_rows(rows, keys, block_size):
    """Source and consumer at decode's sizes, in bfloat16 with its ties, and float32."""
    case = long_case(rows, keys, block_size=block_size)
    n, (q, cache, weights, _, table) = case.lengths, case.arguments
    for dtype in (torch.bfloat16, torch.float32):
        more = {"block_size": block_size, "dtype": dtype, **CUDA}
        exact = dense(case, dtype, block_size, BACKEND)
        scored = torch.full_like(exact, torch.nan)
        found = block_maxima(*case.arguments, logits=scored, **more)
        want = oracle.maxima(exact, n)
        equal_bits(scored, exact, valid(n, exact.shape[1]))
        equal_bits(found, want, valid(-(-n // 8), found.shape[1]))
        alone = block_maxima(*case.arguments, **more)
        equal_bits(alone, want, valid(-(-n // 8), found.shape[1]))
        counts = torch.full((rows,), -9, dtype=torch.int32, device=DEVICE)
        chosen = select_blocks(found, n, 2048, out_counts=counts, **CUDA)
        assert torch.equal(chosen, oracle.blocks(want, n, 2048))
        assert torch.equal(counts.long(), (chosen >= 0).sum(1))
        visible = torch.full_like(counts, -9)
        got = candidate_logits(q, cache, weights, chosen, n, table, **more)
        equal_bits(got, oracle.scores(exact, chosen, n))
        again = candidate_logits(q, cache, weights, chosen, n, table, out_lengths=visible, **more)
        equal_bits(again, got, valid(visible, got.shape[1]))
        assert torch.equal(visible.long(), oracle.visible(chosen, n))
        slots = torch.empty(rows, 512, dtype=torch.int32, device=DEVICE)
        index = select_candidates(
            got, chosen, n, 512, block_table=table, page_size=block_size, out_slots=slots, **CUDA
        )
        assert torch.equal(index, oracle.selection(got, chosen, n, 512))
        assert torch.equal(index, topk(exact, n, 512, **CUDA)), "of all keys"
        places = torch.empty_like(slots)
        both = candidate_select(
            q, cache, weights, chosen, n, table, 512, page_table=table, page_size=block_size,
            out_slots=places, **more,
        )  # fmt: skip
        assert torch.equal(both, index) and torch.equal(places, slots)
        at = index.clamp(min=0).long()
        page = table.long().gather(1, at // block_size)
        assert torch.equal(
            slots.long(), (page * block_size + at % block_size).masked_fill(index < 0, -1)
        )


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 4, 6])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 33, 132, 300])
def test_batches(batch, next_n, heads):
    """Every share of the work: rows of all lengths, more of them than fit at once."""
    rows = batch * next_n
    some = [x for x in EDGES if x < 600]
    lengths = [some[(r * 5) % len(some)] if r % 3 else (r * 37) % 3000 for r in range(rows)]
    lengths[0] = 3000
    for size in (64, 32):
        case = draw(lengths, next_n, heads, size, pages=200).to(DEVICE)
        n, (q, cache, weights, _, table) = case.lengths, case.arguments
        exact = dense(case, torch.bfloat16, size, BACKEND)
        out = torch.full((rows, -(-table.shape[1] * size // 8)), -77.0, device=DEVICE)
        out = out.bfloat16()
        before = out.clone()
        block_maxima(*case.arguments, block_size=size, out=out, **CUDA)
        equal_bits(out, oracle.maxima(exact, n), valid(-(-n // 8), out.shape[1]))
        written(out, -(-n // 8), before)
        for held in (1, 7, 8, 9, 40, 33):
            chosen = lists(n, held, seed=held)
            got = candidate_logits(q, cache, weights, chosen, n, table, block_size=size, **CUDA)
            equal_bits(got, oracle.scores(exact, chosen, n), context=f"{held} candidates")
            index = select_candidates(got, chosen, n, 50, **CUDA)
            assert torch.equal(index, oracle.selection(got, chosen, n, 50)), held
            both = candidate_select(
                q, cache, weights, chosen, n, table, 50, block_size=size, **CUDA
            )
            assert torch.equal(both, index), held


@pytest.mark.parametrize("rows", [1, 5, 70, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_keys_of_many_rows(dtype, rows):
    """Windows anywhere among the keys, at every alignment of their scales."""
    g = torch.Generator().manual_seed(rows)
    keys = 20_011
    k = codes((keys, D), "bytes", g).to(DEVICE)
    scale = (torch.rand(keys, generator=g) * 2.0**-9).to(DEVICE)
    q = codes((rows, 32, D), "normal", g).to(DEVICE)
    weights = (torch.randn(rows, 32, generator=g) * 0.01).to(DEVICE)
    starts = torch.randint(0, 3000, (rows,), generator=g).int()
    ends = torch.randint(0, keys + 50, (rows,), generator=g).int()
    starts[0], ends[0] = 0, keys
    starts[-1] = -1 if rows > 1 else 0
    n = (ends.clamp(max=keys) - starts).clamp(min=0).masked_fill(starts < 0, 0).to(DEVICE)
    given = k, scale, weights
    starts, ends = starts.to(DEVICE), ends.to(DEVICE)
    exact = torch.full((rows, keys), -torch.inf, dtype=dtype, device=DEVICE)
    ragged_logits(q, *given, starts, ends, out=exact, **CUDA)
    for held in (2048, 65):
        chosen = lists(n, held, seed=held)
        visible = torch.full((rows,), -9, dtype=torch.int32, device=DEVICE)
        got = candidate_logits_ragged(q, *given, chosen, starts, ends, dtype=dtype, **CUDA)
        equal_bits(got, oracle.scores(exact, chosen, n))
        again = candidate_logits_ragged(
            q, *given, chosen, starts, ends, dtype=dtype, out_lengths=visible, **CUDA
        )
        assert torch.equal(visible.long(), oracle.visible(chosen, n))
        equal_bits(again, got, valid(visible, got.shape[1]))
        index = select_candidates(got, chosen, n, 512, **CUDA)
        assert torch.equal(index, oracle.selection(got, chosen, n, 512))


# --- the selection's shapes ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16, 17, 29, 33, 66, 67, 132, 133, 264, 265, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_of_ctas_a_row(rows, dtype):
    """Around every number of rows at which the choice changes, for both selections."""
    g = torch.Generator(device=DEVICE).manual_seed(rows)
    n = torch.randint(0, 200_000, (rows,), generator=g, device=DEVICE)
    n[:2] = ints([200_000, 16_390])[:rows]
    found = torch.randn(rows, 25_000, generator=g, device=DEVICE).to(dtype)
    logits = (torch.randn(rows, 16_384, generator=g, device=DEVICE) * 3).to(dtype)
    for k in (2048, 512):
        chosen = select_blocks(found, n, k, **CUDA)
        assert torch.equal(chosen, oracle.blocks(found, n, k)), k
    chosen = lists(n, 2048)
    for k in (2048, 512, 1):
        index = select_candidates(logits, chosen, n, k, **CUDA)
        assert torch.equal(index, oracle.selection(logits, chosen, n, k)), k


@pytest.mark.parametrize("kind", ["ties", "zeros", "inf", "nan", "sorted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_hurt(kind, dtype):
    """Rows whose threshold is a plateau, -inf or NaN go the rare ways of the selection."""
    rows = 24
    g = torch.Generator(device=DEVICE).manual_seed(3)
    x = torch.randn(rows, 16_384, generator=g, device=DEVICE)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "inf":
        x[:, 300:] = -torch.inf
        x[::2, :100] = torch.inf
    elif kind == "nan":
        x[:, 400:] = torch.nan
    else:
        x = x.sort(1, descending=True).values
    logits = x.to(dtype)
    n = ints([131_000 - 1000 * r for r in range(rows)])
    chosen = lists(n, 2048)
    for k in (512, 2048):
        index = select_candidates(logits, chosen, n, k, **CUDA)
        assert torch.equal(index, oracle.selection(logits, chosen, n, k)), k


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment_with_guards(offset, dtype):
    """Nothing outside of the outputs is written, whatever the candidates are."""
    case = draw([900, 513, 64, 0, 1, 700], 2, pages=60).to(DEVICE)
    n, (q, cache, weights, _, table) = case.lengths, case.arguments
    exact = dense(case, dtype, backend=BACKEND)
    g = torch.Generator(device=DEVICE).manual_seed(offset)
    garbage = torch.randint(-(1 << 31), (1 << 31) - 1, (6, 50), generator=g, device=DEVICE).int()
    for held in (50, 33):
        for chosen in (lists(n, held), garbage[:, :held]):
            scored = Guarded(6, held * 8, dtype, stride=held * 8 + offset, offset=offset)
            candidate_logits(q, cache, weights, chosen, n, table, out=scored.inside, **CUDA)
            equal_bits(scored.inside, oracle.scores(exact, chosen, n))
            scored.assert_untouched()
            out = Guarded(6, 40, torch.int32, stride=43, offset=offset)
            slots = Guarded(6, 40, torch.int32, stride=41, offset=offset)
            select_candidates(
                scored.inside, chosen, n, 40, next_n=2, out=out.inside, block_table=table,
                out_slots=slots.inside, **CUDA,
            )  # fmt: skip
            out.assert_untouched()
            slots.assert_untouched()
            assert bool(((out.inside >= -1) & (out.inside < n[:, None].clamp(min=1))).all())
            assert bool((slots.inside < len(cache) * 64).all())
        assert torch.equal(
            select_candidates(
                candidate_logits(q, cache, weights, lists(n, held), n, table, dtype=dtype, **CUDA),
                lists(n, held), n, 40, **CUDA,
            ),
            oracle.selection(oracle.scores(exact, lists(n, held), n), lists(n, held), n, 40),
        )  # fmt: skip


@pytest.mark.parametrize("block_size", [64, 32])
def test_what_the_row_does_not_see_changes_nothing(block_size):
    """NaN in keys and scales past the length, in the newest block, too."""
    n = [900, 513, 65, 1, 1023]
    case = draw(n, block_size=block_size, columns=1024).to(DEVICE)
    q, cache, weights, lengths, table = case.arguments
    chosen, more = lists(lengths, 130), {"block_size": block_size, **CUDA}

    def answers():
        found = block_maxima(*case.arguments, **more)
        scored = candidate_logits(q, cache, weights, chosen, lengths, table, **more)
        return found.masked_fill(~valid(-(-lengths // 8), found.shape[1]), 0), scored

    clean = answers()
    for r, length in enumerate(n):
        page, at = divmod(length, block_size)
        if at:
            held = cache[int(table[r, page])]
            held[at * D : block_size * D].fill_(0xFF)
            held[block_size * D + 4 * at :][: 4 * (block_size - at)].view(torch.float32).fill_(
                torch.nan
            )
    for a, b in zip(clean, answers(), strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("block_size", [64, 32])
def test_pages_further_apart_than_32_bits_count(block_size):
    """Pages 768 MB apart, the last of them past 2^32 bytes; most of the memory is never touched."""
    stride, pages, size = 3 << 28, 7, block_size * 132
    arena = torch.empty(stride * (pages - 1) + size, dtype=torch.uint8, device=DEVICE)
    keys = pages * block_size
    case = draw([keys, keys - 30, 65, 40], block_size=block_size, pages=pages, columns=keys)
    near = case.to(DEVICE)
    q, _, weights, n, table = near.arguments
    cache = arena.as_strided((pages, size), (stride, 1))
    cache.copy_(near.cache[:, :size])
    chosen, more = lists(n, 60), {"block_size": block_size, **CUDA}
    got = []
    for held in (near.cache, cache):
        found = block_maxima(q, held, weights, n, table, **more)
        scored = paged_logits(q, held, weights, n, table, **more)
        got.append((
            candidate_logits(q, held, weights, chosen, n, table, **more),
            found.masked_fill(~valid(-(-n // 8), found.shape[1]), 0),
            scored.masked_fill(~valid(n, scored.shape[1]), 0),
        ))  # fmt: skip
    for a, b in zip(*got, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_rows_further_apart_than_32_bits_count():
    """Outputs and candidates with rows 2^31 + 64 elements apart."""
    case = draw([640, 577], pages=30).to(DEVICE)
    n, (q, cache, weights, _, table) = case.lengths, case.arguments
    chosen = lists(n, 40)
    want = candidate_logits(q, cache, weights, chosen, n, table, **CUDA)
    index = select_candidates(want, chosen, n, 40, **CUDA)
    arena = torch.empty(FAR + 400, dtype=torch.bfloat16, device=DEVICE)
    far = arena.as_strided((2, 320), (FAR, 1))
    candidate_logits(q, cache, weights, chosen, n, table, out=far, **CUDA)
    assert torch.equal(bits(far), bits(want))
    maxima = arena.as_strided((2, 80), (FAR, 1))
    block_maxima(q, cache, weights, n, table, out=maxima, **CUDA)
    exact = dense(case, torch.bfloat16, backend=BACKEND)
    equal_bits(maxima, oracle.maxima(exact, n), valid(-(-n // 8), 80))
    arena = None
    arena = torch.empty(FAR + 400, dtype=torch.int32, device=DEVICE)
    held = arena.as_strided((2, 40), (FAR, 1))
    held.copy_(chosen)
    assert torch.equal(
        bits(candidate_logits(q, cache, weights, held, n, table, **CUDA)), bits(want)
    )
    assert torch.equal(select_candidates(want, held, n, 40, **CUDA), index)


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size,next_n", [(64, 1), (32, 1), (64, 2), (64, 6)])
def test_graph_follows_lengths_candidates_and_tables(block_size, next_n):
    """One graph of a source and its consumers; everything changes between the replays."""
    rows, held, k = 6 * next_n, 60, 32
    case = draw([3000] * rows, next_n, block_size=block_size, pages=300).to(DEVICE)
    q, cache, weights, n, table = case.arguments
    blocks = -(-table.shape[1] * block_size // 8)
    found = torch.empty(rows, blocks, dtype=torch.bfloat16, device=DEVICE)
    chosen = torch.full((rows, held), 1 << 30, dtype=torch.int32, device=DEVICE)
    outs = [torch.empty(rows, k, dtype=torch.int32, device=DEVICE) for _ in range(3)]
    scored = torch.empty(rows, held * 8, dtype=torch.bfloat16, device=DEVICE)

    def consumer(out):
        candidate_logits(
            q, cache, weights, chosen, n, table, block_size=block_size, out=scored, **CUDA
        )
        select_candidates(scored, chosen, n, k, next_n=next_n, out=out, **CUDA)

    def chain(out):
        candidate_select(
            q, cache, weights, chosen, n, table, k, block_size=block_size, out=out, **CUDA
        )

    def step():
        chain(outs[0])  # before the source: the buffer is an earlier step's
        block_maxima(q, cache, weights, n, table, block_size=block_size, out=found, **CUDA)
        select_blocks(found, n, held, next_n=next_n, out=chosen, **CUDA)
        consumer(outs[1])
        chain(outs[2])

    graph = capture(step)
    for seed in range(20):
        lengths = [(seed * 977 + r * 331) % 3001 if r % 4 else 0 for r in range(rows)]
        fresh = draw(lengths, next_n, block_size=block_size, pages=300, columns=3000, seed=seed)
        for now, new in zip(case.arguments, fresh.to(DEVICE).arguments, strict=True):
            now.copy_(new)
        for dirty in (found, scored):
            dirty.fill_(torch.nan)
        before = chosen.clone()
        graph.replay()
        exact = dense(case, torch.bfloat16, block_size, BACKEND)
        want = oracle.blocks(oracle.maxima(exact, n), n, held)
        assert torch.equal(chosen, want), seed
        index = oracle.selection(oracle.scores(exact, want, n), want, n, k)
        assert torch.equal(outs[1], index) and torch.equal(outs[2], index), seed
        stale = outs[0]
        assert bool(((stale >= -1) & (stale < n.reshape(-1, 1).clamp(min=1))).all()), seed
        assert before.shape == chosen.shape


def test_call_after_call_gives_the_same_bits():
    case = long_case(20, 30_000)
    n, (q, cache, weights, _, table) = case.lengths, case.arguments
    first = None
    for _ in range(30):
        found = block_maxima(*case.arguments, **CUDA)
        chosen = select_blocks(found, n, 2048, **CUDA)
        scored = candidate_logits(q, cache, weights, chosen, n, table, **CUDA)
        index = select_candidates(scored, chosen, n, 512, **CUDA)
        assert torch.equal(
            candidate_select(q, cache, weights, chosen, n, table, 512, **CUDA), index
        )
        now = found.masked_fill(~valid(-(-n // 8), found.shape[1]), 0), chosen, scored, index
        first = first or now
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, now, strict=True))


def test_pads_are_those_of_the_engines():
    assert {size: size * (D + 4) + pad for size, pad in PAD.items()} == {64: 8640, 32: 4608}
