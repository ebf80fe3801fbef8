"""The candidate ops against stable sorts on dense scores, bit for bit, in each implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.candidate_cases import (
    DTYPES,
    EDGES,
    dense,
    draw,
    equal_bits,
    guarded,
    oracle,
    valid,
    written,
)
from kits.inputs import poison_tail
from kits.logits_cases import D, codes
from kits.oracles import candidate_row, slots_of

import dsv4_plugin
from dsv4_plugin import (
    block_maxima,
    candidate_logits,
    candidate_logits_ragged,
    candidate_select,
    paged_logits,
    ragged_logits,
    select,
    select_blocks,
    select_candidates,
    topk,
)
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, scores
from dsv4_plugin.kernels import reference_candidates

BACKENDS = ("torch", "cuda")
SHORT = [200, 0, 1, 7, 8, 9, 63, 64, 65, -1, 128, 199]


# --- block maxima --------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_maxima(dtype, next_n, heads, block_size, backend, device):
    case = draw(SHORT, next_n, heads, block_size, kind="bytes").to(device)
    rows, columns = len(SHORT), case.table.shape[1] * block_size
    want = oracle.maxima(dense(case, dtype, block_size, backend), case.lengths)
    count = -(-case.lengths.clamp(min=0) // 8)
    more = {"block_size": block_size, "backend": backend}
    for with_logits in (False, True):
        held, out, before = guarded(rows, columns // 8, dtype, device, gap=3)
        scored, logits, blank = guarded(rows, columns, dtype, device, gap=1)
        named = {"logits": logits} if with_logits else {}
        assert block_maxima(*case.arguments, out=out, **named, **more) is out
        equal_bits(out, want, valid(count, columns // 8))
        written(out, count, before)
        held.assert_untouched("out")
        if with_logits:
            equal_bits(
                logits, dense(case, dtype, block_size, backend), valid(case.lengths, columns)
            )
            written(logits, case.lengths, blank)
            scored.assert_untouched("logits")
    new = block_maxima(*case.arguments, dtype=dtype, **more)
    assert (new.shape, new.stride(0) * new.itemsize % 16) == (out.shape, 0)
    equal_bits(new, want, valid(count, columns // 8))


def test_the_scores_alone_are_asked_for(backend, device):
    """`logits` without `out`: a new tensor of their dtype."""
    case = draw(SHORT).to(device)
    logits = torch.zeros(12, 256, dtype=torch.float32, device=device)
    got = block_maxima(*case.arguments, logits=logits, backend=backend)
    assert (got.dtype, got.shape) == (torch.float32, (12, 32))
    equal_bits(got, oracle.maxima(logits, case.lengths), valid(-(-case.lengths // 8), 32))


@pytest.mark.parametrize("blocks,columns", [(3, 256), (25, 150), (40, 64), (1, 1), (40, 300)])
def test_narrow_buffers_clip_the_rows(blocks, columns, backend, device):
    """A row's length is clipped to `out` and to `logits`; past the table keys score -inf."""
    case = draw([10_000, 192, 150, 25, 0, 64], 2, columns=192).to(device)
    q, cache, weights, lengths, whole = case.arguments
    width = min(8 * blocks, columns)
    n = lengths.clamp(0, width)
    for table in (whole, whole[:, :0]):
        held, out, before = guarded(6, blocks, torch.bfloat16, device)
        scored, logits, blank = guarded(6, columns, torch.bfloat16, device)
        exact = torch.full((6, width), -torch.inf, dtype=out.dtype, device=device)
        paged_logits(q, cache, weights, n, table, out=exact, backend=backend)
        assert bool((exact[:, table.shape[1] * 64 :] == -torch.inf).all())
        block_maxima(q, cache, weights, lengths, table, out=out, logits=logits, backend=backend)
        some = -(-width // 8)
        equal_bits(out[:, :some], oracle.maxima(exact, n), valid(-(-n // 8), some))
        equal_bits(logits[:, :width], exact, valid(n, width))
        written(out, -(-n // 8), before)
        written(logits, n, blank)
        held.assert_untouched()
        scored.assert_untouched()


def test_zeros_of_both_signs(backend, device):
    """0.0 is larger than -0.0, whichever comes first; negative scales turn 0.0 into -0.0."""
    case = draw([64, 64])
    case.weights[:] = case.weights.abs()
    case.q.view(torch.uint8)[:] = 0  # every product and every sum is 0.0
    page = case.cache[case.table[0, 0], 64 * D :].view(torch.float32)
    page[:] = -1.0
    page[[3, 8, 16]] = 1.0  # these keys score 0.0
    case = case.to(device)
    got = block_maxima(*case.arguments, dtype=torch.float32, backend=backend)
    assert got[0, :7].signbit().tolist() == [False] * 3 + [True] * 4
    assert bool((got[0, :7] == 0).all()) and got[0, 7] == torch.inf


# --- selection of blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_blocks(kind, dtype, backend, device):
    k = 64
    n = torch.tensor([0, 1, 8, 9, 8 * k - 8, 8 * k - 1, 8 * k, 8 * k + 1, 5000, -3, 8192, 99_999])
    found = scores(kind, len(n), 1024, dtype)
    want = oracle.blocks(found, n, k)
    poison_tail(found, -(-n // 8))
    held, out, _ = guarded(len(n), k, torch.int32, device, gap=5)
    counts = torch.full((len(n),), 77, dtype=torch.int32, device=device)
    given = found.to(device), n.to(device), k
    assert select_blocks(*given, out=out, out_counts=counts, backend=backend) is out
    assert torch.equal(out.cpu(), want)
    assert torch.equal(counts.cpu(), (want >= 0).sum(1).int())
    held.assert_untouched()
    assert torch.equal(select_blocks(*given, backend=backend).cpu(), want)


@pytest.mark.parametrize("piece", [1, 5, 16])
def test_other_pieces_of_blocks(piece):
    n = torch.tensor([0, 1, piece, piece + 1, 333])
    found = scores("relu_sum", 5, 400, torch.float32)
    got = select_blocks(found, n, 20, piece=piece, backend="torch")
    assert torch.equal(got, oracle.blocks(found, n, 20, piece))


@pytest.mark.parametrize("form", ["rows", "batch", "batch1", "two_d", "strided"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forms_of_lengths(form, dtype, backend, device):
    """One a row, or one a request by the engines' rule, in keys: for all four ops."""
    next_n = 3
    a_request = torch.tensor([190, 65, 2, 0], dtype=dtype)
    per_row = (a_request[:, None] - next_n + 1 + torch.arange(next_n)).clamp(min=0).to(dtype)
    n = per_row.reshape(-1)
    lengths = {
        "rows": n,
        "batch": a_request,
        "batch1": a_request[:, None],
        "two_d": per_row,
        "strided": torch.stack([n.view(4, 3), n.view(4, 3) + 9], -1).flatten(1),
    }[form].to(device)
    lengths = lengths[:, ::2] if form == "strided" else lengths
    case = draw(n.tolist(), next_n).to(device)
    q, cache, weights, _, table = case.arguments
    n = n.to(device)
    more = {"backend": backend}
    found = block_maxima(q, cache, weights, lengths, table, **more)
    exact = dense(case, found.dtype, backend=backend)
    equal_bits(found, oracle.maxima(exact, n), valid(-(-n // 8), found.shape[1]))
    chosen = select_blocks(found, lengths, 9, next_n=next_n, **more)
    assert torch.equal(chosen, oracle.blocks(found, n, 9))
    count = torch.zeros(12, dtype=torch.int32, device=device)
    scored = candidate_logits(q, cache, weights, chosen, lengths, table, **more)
    equal_bits(scored, oracle.scores(exact, chosen, n))
    candidate_logits(q, cache, weights, chosen, lengths, table, out_lengths=count, **more)
    assert torch.equal(count.long(), oracle.visible(chosen, n))
    got = select_candidates(scored, chosen, lengths, 8, next_n=next_n, **more)
    assert torch.equal(got, oracle.selection(scored, chosen, n, 8))


# --- the chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype,block_size,next_n",
    [
        (torch.bfloat16, 64, 1),
        (torch.float32, 32, 1),
        (torch.float32, 64, 2),
        (torch.float16, 32, 4),
        (torch.bfloat16, 64, 6),
    ],
)
def test_the_chain_of_a_source_layer(dtype, block_size, next_n, backend, device):
    """About 2,048 blocks: every step by its oracle, and the top-512 that of the whole row."""
    heads = 4 if backend == "torch" else 32  # what takes time on a CPU
    case = draw(EDGES, next_n, heads, block_size, pages=100, seed=next_n).to(device)
    n, more = case.lengths, {"backend": backend}
    rows, (q, cache, weights, _, table) = len(EDGES), case.arguments
    exact = dense(case, dtype, block_size, backend)
    found = block_maxima(*case.arguments, block_size=block_size, dtype=dtype, **more)
    equal_bits(found, oracle.maxima(exact, n), valid(-(-n // 8), found.shape[1]))
    for held in (2048, 513):
        chosen = select_blocks(found, n, held, next_n=next_n, **more)
        assert torch.equal(chosen, oracle.blocks(found, n, held))
        count = torch.full((rows,), -9, dtype=torch.int32, device=device)
        guard, scored, _ = guarded(rows, held * 8, dtype, device, gap=8)
        candidate_logits(
            q, cache, weights, chosen, n, table, block_size=block_size, out=scored,
            out_lengths=count, **more,
        )  # fmt: skip
        guard.assert_untouched()
        assert torch.equal(count.long(), oracle.visible(chosen, n))
        equal_bits(scored, oracle.scores(exact, chosen, n), valid(count, held * 8))
        got = select_candidates(scored, chosen, n, 512, next_n=next_n, **more)
        assert torch.equal(got, oracle.selection(scored, chosen, n, 512))
        whole = topk(exact, n, 512, next_n=next_n, backend=backend)
        assert torch.equal(got, oracle.ascending(whole)), "not the top-k of the whole row"


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_blocks_tie(dtype, backend, device):
    """All scores equal: the first blocks and the newest, the first keys."""
    case = draw([4000, 4001, 3999, 100], 2)
    case.weights[:] = 0
    case = case.to(device)
    q, cache, weights, n, table = case.arguments
    found = block_maxima(*case.arguments, dtype=dtype, backend=backend)
    chosen = select_blocks(found, n, 33, next_n=2, backend=backend).cpu()
    for r, newest in ((0, 499), (1, 500), (2, 499)):
        assert chosen[r].tolist() == [*range(32), newest]
    assert chosen[3].tolist() == [*range(13), *[-1] * 20]
    chosen = chosen.to(device)
    scored = candidate_logits(q, cache, weights, chosen, n, table, dtype=dtype, backend=backend)
    got = select_candidates(scored, chosen, n, 32, next_n=2, backend=backend)
    assert got.tolist() == [list(range(32))] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_plateaus_across_the_threshold(dtype, backend, device):
    """Blocks above, a plateau that is cut, blocks below: the plateau's lowest are taken."""
    g = torch.Generator().manual_seed(3)
    found = torch.zeros(40, 700, dtype=dtype)
    for r in range(40):
        order = torch.randperm(700, generator=g)
        above, plateau = r * 3, 100 + r * 5
        found[r, order[:above]] = 2.0
        found[r, order[above : above + plateau]] = 1.0
    n = torch.arange(40) * 17 + 4900
    got = select_blocks(found.to(device), n.to(device), 128, backend=backend).cpu()
    assert torch.equal(got, oracle.blocks(found, n, 128))


def _through_blocks(row_scores, n, held, k, backend, device):
    """The top-k within the candidates, of scores that are drawn and not computed."""
    found = oracle.maxima(row_scores, n)
    n = n.to(device)
    chosen = select_blocks(found.to(device), n, held, backend=backend)
    scored = oracle.scores(row_scores.to(device), chosen, n)
    return select_candidates(scored, chosen, n, k, backend=backend), chosen, scored


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lemma_on_every_distribution(kind, dtype, backend, device):
    """k + 1 blocks hold the k best keys of a row, ties included."""
    rows, columns = 24, 3000
    drawn = scores(kind, rows, columns, dtype).nan_to_num(nan=0.5, posinf=None, neginf=None)
    if kind == "special":  # nan_to_num makes numbers of infinities too
        raw = scores(kind, rows, columns, dtype)
        drawn = torch.where(raw.isnan(), torch.tensor(0.5, dtype=dtype), raw)
    n = torch.tensor([3000 - 125 * i - i % 9 for i in range(rows)])
    for k in (1, 7, 64, 200):
        got, chosen, scored = _through_blocks(drawn, n, k + 1, k, backend, device)
        whole = oracle.Ranking(drawn, n, k).want(k)
        assert torch.equal(got.cpu(), oracle.ascending(whole))
        assert torch.equal(got, oracle.selection(scored, chosen, n.to(device), k))


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 120),
    k=st.integers(1, 20),
    held=st.integers(1, 20),
    piece=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_property(columns, k, held, piece, dtype, data):
    """Every step against a loop over Python numbers: NaN, infinities, any length, any piece."""
    pool = [float("nan"), torch.inf, -torch.inf, 0.0, 1.0, 2.0, -1.0]
    row = data.draw(st.lists(st.sampled_from(pool), min_size=columns, max_size=columns))
    length = data.draw(st.integers(-1, columns + 3))
    best, blocks, seen, index = candidate_row(row, length, held, k, piece)
    x, n = torch.tensor([row]).to(dtype), torch.tensor([length])
    found = torch.full((1, -(-columns // piece)), 0.25, dtype=dtype)
    held_out = reference_candidates._maxima(x, n.clamp(0, columns), found, piece)
    equal_bits(held_out[:, : len(best)], torch.tensor([best]).to(dtype).view(1, -1))
    assert bool((held_out[:, len(best) :] == 0.25).all())
    right = oracle.maxima(x, n, piece)
    equal_bits(right[:, : len(best)], held_out[:, : len(best)])
    n = n.clamp(max=columns)
    assert oracle.blocks(right, n, held, piece)[0].tolist() == blocks
    chosen = select_blocks(held_out, n, held, piece=piece, backend="torch")
    assert chosen[0].tolist() == blocks
    scored = oracle.scores(x, chosen, n, piece)
    assert oracle.visible(chosen, n, piece).tolist() == [seen]
    assert oracle.selection(scored, chosen, n, k, piece)[0].tolist() == index
    counts = torch.zeros(1, dtype=torch.int32)
    got = select_candidates(scored, chosen, n, k, piece=piece, out_counts=counts, backend="torch")
    assert got[0].tolist() == index and counts.tolist() == [min(k, seen)]


def test_a_million_keys(backend, device):
    """131,072 blocks, of which 2,048 are chosen; positions up to the last key."""
    n = torch.tensor([1 << 20, (1 << 20) - 7, (1 << 20) - 8, 500_001])
    found = scores("relu_sum", 4, 1 << 17, torch.bfloat16, seed=9)
    found[torch.arange(4), (n - 1) // 8] = torch.inf
    want = oracle.blocks(found, n, 2048)
    chosen = select_blocks(found.to(device), n.to(device), 2048, backend=backend)
    assert torch.equal(chosen.cpu(), want) and int(chosen.max()) == (1 << 17) - 1
    logits = scores("relu_sum", 4, 16_384, torch.float32, seed=4)
    logits[:, -8:] = 100.0
    got = select_candidates(logits.to(device), chosen, n.to(device), 512, backend=backend).cpu()
    assert torch.equal(got, oracle.selection(logits, want, n, 512))
    assert got[:, -1].tolist() == (n - 1).tolist()


def test_lengths_past_what_int32_holds(backend, device):
    n = torch.tensor([1 << 40, 1 << 31, (1 << 31) - 1], device=device)
    last = (1 << 28) - 2  # whose keys all have an int32
    chosen = torch.tensor([[5, last, -1]] * 3, dtype=torch.int32, device=device)
    logits = torch.ones(3, 24, device=device)
    got = select_candidates(logits, chosen, n, 20, backend=backend)
    want = [*range(40, 48), *range(8 * last, 8 * last + 8), *[-1] * 4]
    assert got.tolist() == [want] * 3
    found = torch.ones(3, 20, device=device)
    assert select_blocks(found, n, 20, backend=backend).tolist() == [list(range(20))] * 3


# --- NaN, infinities, pages ----------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan(dtype, block_size, backend, device):
    """A NaN in a key, a scale, a whole block, a weight: the block is chosen, the NaN is kept."""
    case = draw([1000, 1000, 1000], block_size=block_size, seed=5)
    case.weights *= 2.0**-9  # so that float16 has no infinities
    places = {1: 20, 2: 307, 3: 640}  # in block 2, 38, 80

    def at(position):
        return int(case.table[0, position // block_size]), position % block_size

    page, key = at(places[1])
    case.cache[page, key * D + 9] = 0xFF
    page, key = at(places[2])
    case.cache[page, block_size * D + 4 * key :][:4].view(torch.float32)[0] = torch.nan
    for position in range(places[3], places[3] + 8):
        page, key = at(position)
        case.cache[page, key * D : (key + 1) * D] = 0x7F
    case.weights[1, 5] = torch.nan
    case = case.to(device)
    q, cache, weights, n, table = case.arguments
    more = {"block_size": block_size, "backend": backend}
    exact = dense(case, dtype, block_size, backend)
    found = block_maxima(*case.arguments, dtype=dtype, **more)
    equal_bits(found, oracle.maxima(exact, n), valid(-(-n // 8), found.shape[1]))
    assert (found[0, :125] == torch.inf).nonzero().reshape(-1).tolist() == [2, 38, 80, 124]
    assert bool((found[1, :125] == torch.inf).all())
    chosen = select_blocks(found, n, 10, backend=backend)
    assert {2, 38, 80, 124} <= set(chosen[0].tolist()) and chosen[1].tolist() == list(range(10))
    scored = candidate_logits(q, cache, weights, chosen, n, table, dtype=dtype, **more)
    equal_bits(scored, oracle.scores(exact, chosen, n))
    assert int(scored[0].isnan().sum()) == 10 and bool(scored[1].isnan().all())
    got = select_candidates(scored, chosen, n, 64, backend=backend)
    assert torch.equal(got, oracle.selection(scored, chosen, n, 64))
    assert not {20, 307, *range(640, 648)} & set(got[0].tolist()), "NaN before numbers"


@pytest.mark.parametrize("block_size", [64, 32])
def test_pages_that_are_none(block_size, backend, device):
    """Below zero, past the end, repeated: -inf, and chosen last; the newest block all the same."""
    case = draw([512, 512, 300, 512], block_size=block_size)
    table, pages = case.table, len(case.cache)
    table[0, ::2] = -1
    table[1, 1] = pages
    table[1, 2] = (1 << 31) - 1
    table[1, 3] = -(1 << 31)
    table[1, -1] = -5
    table[2, :] = -1
    table[3, :] = table[3, 0]  # the same page again and again
    case = case.to(device)
    q, cache, weights, n, table = case.arguments
    more = {"block_size": block_size, "backend": backend}
    exact = dense(case, torch.float32, block_size, backend)
    found = block_maxima(*case.arguments, dtype=torch.float32, **more)
    equal_bits(found, oracle.maxima(exact, n), valid(-(-n // 8), found.shape[1]))
    assert bool((found[2, :37] == -torch.inf).all()) and found[2, 37] == torch.inf
    chosen = select_blocks(found, n, 40, backend=backend)
    assert torch.equal(chosen, oracle.blocks(found, n, 40))
    scored = candidate_logits(q, cache, weights, chosen, n, table, dtype=torch.float32, **more)
    equal_bits(scored, oracle.scores(exact, chosen, n))
    slots = torch.zeros(4, 64, dtype=torch.int32, device=device)
    got = select_candidates(
        scored, chosen, n, 64, block_table=table, page_size=block_size, out_slots=slots,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got, oracle.selection(scored, chosen, n, 64))
    assert torch.equal(slots.long(), slots_of(got, table, block_size, 1))
    assert bool((slots[2] == -1).all()) and bool((got[2] >= 0).all())


def test_a_table_narrower_than_the_length(backend, device):
    """Keys past the table are not seen: the newest block is the table's last."""
    case = draw([1000, 500, 129, 128], columns=128).to(device)
    q, cache, weights, n, table = case.arguments
    found = block_maxima(*case.arguments, backend=backend)
    assert found.shape == (4, 16) and bool((found[:, 15] == torch.inf).all())
    chosen = torch.arange(20, device=device).int().expand(4, -1).contiguous()
    count = torch.zeros(4, dtype=torch.int32, device=device)
    scored = candidate_logits(q, cache, weights, chosen, n, table, backend=backend)
    exact = dense(case, torch.bfloat16, backend=backend)
    equal_bits(scored, oracle.scores(exact, chosen, n))
    assert bool((scored[:, 128:] == -torch.inf).all())
    chosen = select_blocks(found, n, 20, backend=backend)
    candidate_logits(q, cache, weights, chosen, n, table, out_lengths=count, backend=backend)
    assert count.tolist() == [128] * 4
    slots = torch.zeros(4, 512, dtype=torch.int32, device=device)
    scored = torch.zeros(4, 160, dtype=torch.bfloat16, device=device)
    wide = torch.arange(20, device=device).int().expand(4, -1).contiguous()
    got = select_candidates(
        scored, wide, n, 512, block_table=table, out_slots=slots, backend=backend
    )
    assert torch.equal(slots.long(), slots_of(got, table, 64, 1))
    assert bool((slots[0, 128:] == -1).all()) and int(got[0].max()) == 159


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("gap", [0, 16, 192, 8640 * 3])
def test_strides_of_the_cache(gap, block_size, backend, device):
    """Pages with others' memory in between, and the three forms of a cache: the same bits."""
    case = draw([300, 17, 256], block_size=block_size).to(device)
    q, cache, weights, n, table = case.arguments
    size = block_size * 132
    arena = torch.full((len(cache) + 1, size + gap), 0xFF, dtype=torch.uint8, device=device)
    aliased = arena[1:, :size] if not gap else arena[:-1, gap : gap + size]
    aliased.copy_(cache)
    chosen = torch.tensor([[0, 3, 9, 30, 37], [0, 1, 2, -1, -1], [31, 2, -1, 5, 6]]).int()
    chosen = chosen.to(device)
    more = {"block_size": block_size, "dtype": torch.float32, "backend": backend}
    exact = dense(case, torch.float32, block_size, backend)
    count = -(-n // 8)
    stride = aliased.stride(0)
    for shape, inner in (((size,), (1,)), ((block_size, 132), (132, 1)),
                         ((block_size, 1, 132), (132, 132, 1))):  # fmt: skip
        view = aliased.as_strided((len(cache), *shape), (stride, *inner), aliased.storage_offset())
        found = block_maxima(q, view, weights, n, table, **more)
        equal_bits(found, oracle.maxima(exact, n), valid(count, found.shape[1]))
        scored = candidate_logits(q, view, weights, chosen, n, table, **more)
        equal_bits(scored, oracle.scores(exact, chosen, n))


def test_forms_and_strides_of_the_other_arguments(backend, device):
    case = draw([100, 65, 130, 64], 2, heads=64).to(device)
    n, width = case.lengths, case.table.shape[1]
    arena = torch.full((2, 5, 64, D), 0x7F, dtype=torch.uint8, device=device)
    arena[:, 1:3] = case.q.view(torch.uint8)
    weights = torch.full((4, 99), float("nan"), device=device)
    weights[:, :64] = case.weights
    table = torch.full((2, 9), -1, dtype=torch.int32, device=device)
    table[:, :width] = case.table
    chosen = torch.full((4, 40), 1 << 30, dtype=torch.int32, device=device)
    chosen[:, :17] = torch.arange(17, device=device)
    exact = dense(case, torch.float32, backend=backend)
    more = {"dtype": torch.float32, "backend": backend}
    for q in (arena[:, 1:3], arena.view(torch.float8_e4m3fn)[:, 1:3]):
        given = q, case.cache, weights[:, :64]
        found = block_maxima(*given, n, table[:, :width], **more)
        equal_bits(found, oracle.maxima(exact, n), valid(-(-n // 8), found.shape[1]))
        scored = candidate_logits(*given, chosen[:, :17], n, table[:, :width], **more)
        equal_bits(scored, oracle.scores(exact, chosen[:, :17], n))
    flat = candidate_logits(  # three dimensions: one row a request
        case.q.flatten(0, 1), case.cache, case.weights, chosen[:, :17], n,
        case.table.repeat_interleave(2, 0), **more,
    )  # fmt: skip
    equal_bits(flat, scored)


# --- candidates ----------------------------------------------------------------------------------


def _any_candidates(rows, held, seed=0):
    """Any int32: holes, duplicates, disorder, past every length, the ends of the range."""
    g = torch.Generator().manual_seed(seed)
    near = torch.randint(-3, 70, (rows, held), generator=g)
    wild = torch.randint(-(1 << 31), 1 << 31, (rows, held), generator=g)
    ends = torch.tensor([-(1 << 31), (1 << 31) - 1, 1 << 28, (1 << 28) + 1, -1, 1 << 29])
    pick = torch.rand(rows, held, generator=g)
    some = ends[torch.randint(0, len(ends), (rows, held), generator=g)]
    return torch.where(pick < 0.6, near, torch.where(pick < 0.8, wild, some)).int()


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2])
def test_any_candidates_are_safe(next_n, block_size, backend, device):
    """Candidates in any order are scored; for any values the result is -1 or a visible key."""
    case = draw([512, 100, 0, 1, 9, -1, 300, 513], next_n, block_size=block_size).to(device)
    q, cache, weights, n, table = case.arguments
    chosen = _any_candidates(8, 64).to(device)
    exact = dense(case, torch.float32, block_size, backend)
    more = {"block_size": block_size, "backend": backend}
    held, scored, _ = guarded(8, 512, torch.float32, device, gap=4)
    candidate_logits(q, cache, weights, chosen, n, table, out=scored, **more)
    equal_bits(scored, oracle.scores(exact, chosen, n))
    held.assert_untouched()
    count = torch.full((8,), -9, dtype=torch.int32, device=device)
    candidate_logits(q, cache, weights, chosen, n, table, out=scored, out_lengths=count, **more)
    held.assert_untouched()
    assert bool(((count >= 0) & (count <= 512)).all())
    for content in (scored, torch.full_like(scored, torch.inf), torch.full_like(scored, torch.nan)):
        for k in (7, 512, 600):
            guard, out, _ = guarded(8, k, torch.int32, device)
            slot_guard, slots, _ = guarded(8, k, torch.int32, device)
            counts = torch.full((8,), -9, dtype=torch.int32, device=device)
            select_candidates(
                content, chosen, n, k, next_n=next_n, out=out, block_table=table,
                page_size=block_size, out_slots=slots, out_counts=counts, backend=backend,
            )  # fmt: skip
            guard.assert_untouched()
            slot_guard.assert_untouched()
            assert bool(((out == -1) | ((out >= 0) & (out < n[:, None]))).all())
            assert torch.equal(slots.long(), slots_of(out, table, block_size, next_n))
            assert bool(((counts >= 0) & (counts <= k)).all())


def test_candidates_past_a_row_that_became_shorter(backend, device):
    """Candidates of an earlier step, ascending: keys that the row no longer sees do not count."""
    case = draw([512, 40, 9, 8, 1, 0]).to(device)
    q, cache, weights, n, table = case.arguments
    chosen = torch.arange(64, device=device).int().expand(6, -1).contiguous()
    count = torch.zeros(6, dtype=torch.int32, device=device)
    scored = candidate_logits(q, cache, weights, chosen, n, table, backend=backend)
    equal_bits(scored, oracle.scores(dense(case, scored.dtype, backend=backend), chosen, n))
    got = select_candidates(scored, chosen, n, 512, backend=backend)
    want = torch.where(valid(n, 512), torch.arange(512, device=device), -1)
    assert torch.equal(got.long(), want)
    candidate_logits(q, cache, weights, chosen, n, table, out_lengths=count, backend=backend)
    assert bool((count >= 0).all()) and bool((count <= 512).all())


@pytest.mark.parametrize("per_request", [False, True])
@pytest.mark.parametrize("page_size", [64, 32, 7, 1])
def test_slots_and_counts(page_size, per_request, backend, device):
    rows, next_n, held, k = 6, 2, 50, 64
    n = torch.tensor([400, 399, 20, 0, 65, 63], device=device)
    found = scores("relu_sum", rows, held, torch.float32).to(device)
    chosen = select_blocks(found, n, 20, backend=backend)
    logits = scores("two_values", rows, 160, torch.bfloat16).to(device)
    pages = -(-400 // page_size)
    g = torch.Generator().manual_seed(1)
    wide = torch.randint(-1, 10_000, (3 if per_request else 6, pages + 3), generator=g).int()
    table = wide.to(device)[:, :pages]
    guard, slots, _ = guarded(rows, k, torch.int32, device, gap=2)
    counts = torch.full((rows,), 77, dtype=torch.int32, device=device)
    got = select_candidates(
        logits, chosen, n, k, next_n=next_n, block_table=table, page_size=page_size,
        out_slots=slots, out_counts=counts, backend=backend,
    )  # fmt: skip
    want = oracle.selection(logits, chosen, n, k)
    assert torch.equal(got, want)
    assert torch.equal(slots.long(), slots_of(want, table, page_size, next_n))
    assert torch.equal(counts, (want >= 0).sum(1).int())
    guard.assert_untouched()
    none = select_candidates(
        logits, chosen, n, k, next_n=next_n, block_table=table[:, :0], out_slots=slots,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(none, want) and bool((slots == -1).all())


# --- the chain of a consumer ---------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("next_n", [1, 2, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chain_is_its_two_ops(dtype, next_n, heads, block_size, backend, device):
    """Indices, slots and counts of `select_candidates` on `candidate_logits`."""
    batch = 12 // next_n
    case = draw(SHORT[: batch * next_n], next_n, heads, block_size).to(device)
    q, cache, weights, n, table = case.arguments
    chosen = select_blocks(block_maxima(*case.arguments, block_size=block_size, backend=backend),
                           n, 17, next_n=next_n, backend=backend)  # fmt: skip
    more = {"block_size": block_size, "dtype": dtype, "backend": backend}
    scored = candidate_logits(q, cache, weights, chosen, n, table, **more)
    places = torch.arange(-1, 2 * len(table) * 9 - 1, 2, device=device).int().view(len(table), 9)
    for k in (1, 7, 64, 136, 200):
        outs = []
        for _ in range(2):
            guard, out, _ = guarded(len(n), k, torch.int32, device, gap=3)
            slot_guard, slots, _ = guarded(len(n), k, torch.int32, device)
            counts = torch.full((len(n),), -9, dtype=torch.int32, device=device)
            outs.append((out, slots, counts, guard, slot_guard))
        want, got = outs
        select_candidates(
            scored, chosen, n, k, next_n=next_n, block_table=places, page_size=24, out=want[0],
            out_slots=want[1], out_counts=want[2], backend=backend,
        )  # fmt: skip
        back = candidate_select(
            q, cache, weights, chosen, n, table, k, page_table=places, page_size=24, out=got[0],
            out_slots=got[1], out_counts=got[2], **more,
        )  # fmt: skip
        assert back is got[0]
        assert torch.equal(got[0], oracle.selection(scored, chosen, n, k))
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b), k
        got[3].assert_untouched()
        got[4].assert_untouched()
        alone = candidate_select(q, cache, weights, chosen, n, table, k, **more)
        assert torch.equal(alone, want[0])


def test_the_chain_of_any_candidates_is_safe(backend, device):
    """Uninitialised lists; and nothing to score: no row, no page."""
    case = draw([512, 100, 0, 1, 9, -1, 300, 513]).to(device)
    q, cache, weights, n, table = case.arguments
    chosen = _any_candidates(8, 64).to(device)
    for k in (7, 512, 600):
        guard, out, _ = guarded(8, k, torch.int32, device)
        candidate_select(q, cache, weights, chosen, n, table, k, out=out, backend=backend)
        guard.assert_untouched()
        assert bool(((out == -1) | ((out >= 0) & (out < n[:, None]))).all())
    none = candidate_select(
        q[:0], cache, weights[:0], chosen[:0], n[:0], table[:0], 5, backend=backend
    )
    assert none.shape == (0, 5)
    ascending = torch.arange(64, device=device).int().expand(8, -1).contiguous()
    for pages, width in ((cache[:0], table), (cache, table[:, :0])):
        got = candidate_select(q, pages, weights, ascending, n, width, 512, backend=backend)
        scored = torch.full((8, 512), -torch.inf, device=device)
        assert torch.equal(got, oracle.selection(scored, ascending, n, 512))


def test_short_rows_need_no_scores(backend, device):
    """A row that sees at most k columns selects all of them, whatever its scores are."""
    n = torch.tensor([100, 64, 3, 0], device=device)
    chosen = select_blocks(torch.zeros(4, 13, device=device), n, 13, backend=backend)
    for filling in (torch.nan, -torch.inf, 5.0):
        logits = torch.full((4, 104), filling, device=device)
        got = select_candidates(logits, chosen, n, 100, backend=backend)
        assert torch.equal(
            got.long(), torch.where(valid(n, 100), torch.arange(100, device=device), -1)
        )


# --- gathered keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "bytes"])
@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_keys(dtype, heads, kind, backend, device):
    windows = [(0, 300), (0, 0), (0, 1), (7, 70), (64, 128), (299, 300), (300, 300), (301, 400),
               (-1, 50), (20, 10), (100, 5000), (1, 300), (0, -4), (0, 9), (5, 21)]  # fmt: skip
    g = torch.Generator().manual_seed(7)
    rows, keys = len(windows), 300
    scale = torch.exp2(torch.randint(-12, 4, (keys,), generator=g).float())
    inputs = (
        codes((rows, heads, D), kind, g), codes((keys, D), kind, g), scale,
        torch.randn(rows, heads, generator=g) * 0.1,
    )  # fmt: skip
    inputs = tuple(x.to(device) for x in inputs)
    for index in (torch.int32, torch.int64):
        starts, ends = torch.tensor(windows, dtype=index, device=device).T.contiguous()
        exact = torch.full((rows, keys), -torch.inf, dtype=dtype, device=device)
        ragged_logits(*inputs, starts, ends, out=exact, backend=backend)
        n = (ends.clamp(max=keys) - starts).clamp(min=0).masked_fill(starts < 0, 0)
        for chosen in (_any_candidates(rows, 20).to(device),
                       select_blocks(oracle.maxima(exact, n), n, 20, backend=backend)):  # fmt: skip
            held, out, _ = guarded(rows, 160, dtype, device, gap=3)
            given = (*inputs, chosen, starts, ends)
            assert candidate_logits_ragged(*given, out=out, backend=backend) is out
            equal_bits(out, oracle.scores(exact, chosen, n))
            held.assert_untouched()
        count = torch.zeros(rows, dtype=torch.int32, device=device)
        new = candidate_logits_ragged(*given, dtype=dtype, out_lengths=count, backend=backend)
        assert (new.shape, new.stride(0) * new.itemsize % 16) == ((rows, 160), 0)
        assert torch.equal(count.long(), oracle.visible(chosen, n))
        equal_bits(new, oracle.scores(exact, chosen, n), valid(count, 160))
        got = select_candidates(new, chosen, n, 64, backend=backend)
        assert torch.equal(got, oracle.selection(new, chosen, n, 64))


# --- every score depends on itself only ----------------------------------------------------------


def test_independence(backend, device):
    """The same bits alone and in a batch, whatever the length and the other candidates."""
    case = draw([640] * 12, 2, kind="bytes").to(device)
    q, cache, weights, n, table = case.arguments
    more = {"dtype": torch.float32, "backend": backend}
    found = block_maxima(*case.arguments, **more)
    chosen = select_blocks(found, n, 30, next_n=2, backend=backend)
    whole = candidate_logits(q, cache, weights, chosen, n, table, **more)
    for b in (0, 3, 5):
        rows = slice(2 * b, 2 * b + 2)
        alone = (q[b : b + 1], cache, weights[rows])
        assert torch.equal(block_maxima(*alone, n[rows], table[b : b + 1], **more), found[rows])
        assert torch.equal(
            candidate_logits(*alone, chosen[rows], n[rows], table[b : b + 1], **more), whole[rows]
        )
        picked = select_candidates(whole[rows], chosen[rows], n[rows], 32, backend=backend)
        assert torch.equal(picked, select_candidates(whole, chosen, n, 32, backend=backend)[rows])
    turned = candidate_logits(q, cache, weights, chosen.flip(1), n, table, **more)
    assert torch.equal(turned.view(12, 30, 8).flip(1), whole.view(12, 30, 8))
    again = candidate_logits(q, cache, weights, chosen, n, table, **more)
    assert torch.equal(again, whole)


def test_nothing_to_do(backend, device):
    case = draw([64, 64]).to(device)
    q, cache, weights, n, table = case.arguments
    chosen = torch.zeros(2, 4, dtype=torch.int32, device=device)
    more = {"backend": backend}
    none = (q[:0], cache, weights[:0])
    assert block_maxima(*none, n[:0], table[:0], **more).shape == (0, 8)
    assert candidate_logits(*none, chosen[:0], n[:0], table[:0], **more).shape == (0, 32)
    assert block_maxima(*case.arguments[:4], table[:, :0], **more).shape == (2, 0)
    for empty in ((q, cache[:0], weights, chosen, n, table),
                  (q, cache, weights, chosen, n, table[:, :0])):  # fmt: skip
        count = torch.full((2,), 7, dtype=torch.int32, device=device)
        got = candidate_logits(*empty, out_lengths=count, **more)
        assert bool(((count == 0) | (got[:, 0] == -torch.inf)).all())
        assert bool((candidate_logits(*empty, **more) == -torch.inf).all())
    found = block_maxima(q, cache[:0], weights, n, table, **more)
    assert found.tolist() == [[-torch.inf] * 7 + [torch.inf]] * 2
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    keys = q.view(-1, D)[:0], torch.zeros(0, device=device)
    got = candidate_logits_ragged(q[:, 0], *keys, weights, chosen, starts, starts + 9, **more)
    assert bool((got == -torch.inf).all())
    assert select_blocks(got[:0], n[:0], 5, **more).shape == (0, 5)
    assert select_blocks(got[:, :0], n, 5, **more).tolist() == [[-1] * 5] * 2
    assert select_candidates(got[:0], chosen[:0], n[:0], 5, **more).shape == (0, 5)


# --- the reference alone -------------------------------------------------------------------------


@pytest.mark.parametrize("block_size,piece", [(3, 8), (16, 8), (100, 7), (32, 5), (64, 64)])
def test_other_sizes(block_size, piece):
    """Blocks that lie across pages, too: any sizes, in torch."""
    case = draw([150, 1, 0, 99], heads=3, block_size=block_size)
    if case.cache.stride(0) % 4:
        arena = torch.zeros(len(case.cache), -(-case.cache.shape[1] // 4) * 4, dtype=torch.uint8)
        arena[:, : case.cache.shape[1]] = case.cache
        case.cache = arena[:, : case.cache.shape[1]]
    q, cache, weights, n, table = case.arguments
    more = {"block_size": block_size, "piece": piece, "dtype": torch.float32, "backend": "torch"}
    exact = dense(case, torch.float32, block_size)
    found = block_maxima(*case.arguments, **more)
    count = -(-n // piece)
    equal_bits(found, oracle.maxima(exact, n, piece), valid(count, found.shape[1]))
    chosen = select_blocks(found, n, 6, piece=piece, backend="torch")
    assert torch.equal(chosen, oracle.blocks(found, n, 6, piece))
    scored = candidate_logits(q, cache, weights, chosen, n, table, **more)
    equal_bits(scored, oracle.scores(exact, chosen, n, piece))
    got = select_candidates(scored, chosen, n, 9, piece=piece, backend="torch")
    assert torch.equal(got, oracle.selection(scored, chosen, n, 9, piece))


@pytest.mark.parametrize("chunk", [1, 4096, 1 << 16])
def test_chunks_change_nothing(chunk, monkeypatch):
    """Memory is bounded by the chunk, or a candidate of a row where that is more."""
    case = draw([300, 257, 200, 0], 2)
    q, cache, weights, n, table = case.arguments
    g = torch.Generator().manual_seed(0)
    k, scale = codes((300, D), "normal", g), torch.ones(300)
    starts, ends = torch.tensor([0, 9, 0, 5]), torch.tensor([300, 300, 17, 290])
    chosen = _any_candidates(4, 20)

    def all_of_them():
        found = block_maxima(*case.arguments, backend="torch")
        some = select_blocks(found, n, 20, backend="torch")
        scored = candidate_logits(q, cache, weights, chosen, n, table, backend="torch")
        ragged = candidate_logits_ragged(
            q.flatten(0, 1), k, scale, weights, chosen, starts, ends, backend="torch"
        )
        return [torch.where(valid(-(-n // 8), 40), found, 0), some, scored, ragged]

    want = all_of_them()
    seen = []
    inner = reference_candidates.reference_logits.scores

    def watched(q, keys, scale, weights):
        if q.shape[1] == 1:  # of candidates, each row has its own keys
            seen.append(keys.shape[0] * keys.shape[1] * max(q.shape[2:]))
        return inner(q, keys, scale, weights)

    monkeypatch.setattr(reference_candidates.reference_logits, "scores", watched)
    monkeypatch.setattr(reference_candidates, "_CHUNK", chunk)
    got = all_of_them()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert seen and max(seen) <= max(chunk, 8 * D)


def test_paged_logits_and_select_on_pages_of_32(backend, device):
    """The ratio-2 layers' pages: the same bits as on pages of 64."""
    case = draw([640, 65, 31, 0, 320, 32], 2, block_size=64)
    halves = case.cache.view(torch.uint8)
    values = halves[:, : 64 * D].unflatten(1, (2, 32 * D))
    scales = halves[:, 64 * D : 64 * 132].unflatten(1, (2, 32 * 4))
    arena = torch.full((2 * len(halves), 4608), 0xFF, dtype=torch.uint8, device=device)
    arena[:, : 32 * D] = values.flatten(0, 1).to(device)
    arena[:, 32 * D : 32 * 132] = scales.flatten(0, 1).to(device)
    table = (case.table[:, :, None] * 2 + torch.arange(2)).flatten(1).int().to(device)
    case = case.to(device)
    q, _, weights, n, _ = case.arguments
    want = paged_logits(*case.arguments, backend=backend)
    small = q, arena[:, : 32 * 132], weights, n, table
    got = paged_logits(*small, block_size=32, backend=backend)
    equal_bits(got, want, valid(n, want.shape[1]))
    indices = select(*small, 64, block_size=32, backend=backend)
    assert torch.equal(indices, select(*case.arguments, 64, backend=backend))


def test_the_names_are_public():
    for name in ("block_maxima", "select_blocks", "candidate_logits", "candidate_logits_ragged",
                 "candidate_select", "select_candidates"):  # fmt: skip
        assert name in dsv4_plugin.__all__ and callable(getattr(dsv4_plugin, name))
