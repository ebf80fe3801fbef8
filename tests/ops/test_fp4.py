"""The index logits of FP4 keys: rounding, ties, blocks and candidates, in each implementation.

test_logits.py and test_candidates.py fully test the rules that all keys share (lengths, missing
pages, independence of rows). This file tests them again where the FP4 kernels have code of their
own.
"""

import pytest
import torch
from kits.candidate_cases import dense, equal_bits, guarded, oracle, valid, written
from kits.logits_cases import FP4_SCALES, TOLERANCE, check, paged, untouched
from kits.logits_cases import oracle as exact

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

BACKENDS = ("torch", "cuda")
BF16 = torch.bfloat16
SHORT = [200, 0, 1, 7, 8, 9, 63, 64, 65, -1, 128, 199]  # divisible by 1, 2, 3, 4, 6 and 12
NEXT_N = [1, 2, 3, 4, 6, 12]


def draw(lengths, next_n=1, kind="fp4", heads=32, **more):
    """A call on FP4 pages, which are further apart than they are long."""
    return paged(lengths, next_n, heads, kind=kind, pad=more.pop("pad", 48), **more)


@pytest.mark.parametrize("kind", FP4_SCALES)
@pytest.mark.parametrize("next_n", NEXT_N)
def test_scores(next_n, kind, backend, device):
    case = draw(SHORT, next_n, kind)
    score, size = exact(case)
    columns = score.shape[1]
    held, out, before = guarded(len(SHORT), columns, BF16, device, gap=3)
    call = case.to(device)
    assert paged_logits(*call.arguments, out=out, backend=backend) is out
    check(out.cpu(), score, size, case.lengths, TOLERANCE[backend, kind], f"{next_n} rows")
    untouched(out, call.lengths, before)
    held.assert_untouched()
    if kind == "fp4":  # the dot products are exact, and the heads are added in one order
        equal_bits(out.cpu(), dense(case, BF16).where(valid(case.lengths, columns), before.cpu()))


def sglang(q, keys, weights):
    """The scores of SGLang's prefill (`DeepseekV41Indexer.scores`): sums by torch, in bfloat16."""
    return (torch.einsum("bhd,nd->bhn", q, keys).relu() * weights[..., None]).sum(1)


def test_agrees_with_sglang_but_for_the_order_of_the_sum(backend, device):
    """Its keys are read by the plugin's reader; a sum may differ by one unit in its last place."""
    from dsv4_plugin import read_indexer_cache_mxfp4

    columns = 64 * 100
    case = draw([columns] * 6, 6).to(device)
    slots = (case.table[0, :, None].long() * 64 + torch.arange(64, device=device)).flatten()
    keys = read_indexer_cache_mxfp4(case.cache, slots, dtype=BF16, backend="torch")
    want = sglang(case.q[0].cpu(), keys.cpu(), case.weights.cpu())
    got = paged_logits(*case.arguments, backend=backend).cpu()
    other = got != want
    assert float(other.float().mean()) < 1e-3
    near = torch.nextafter(want[other], got[other])
    assert torch.equal(near, got[other])


def test_every_code_and_scale(backend, device):
    """Each FP4 code with each scale byte: numbers of bfloat16, the smallest included."""
    keys = 16 * 16
    cache = torch.zeros(keys // 64, 64 * 68, dtype=torch.uint8)
    code = torch.arange(keys) % 16
    values = cache[:, : 64 * 64].view(keys // 64, 64, 64)
    scales = cache[:, 64 * 64 :].view(keys // 64, 64, 4)
    values[:, :, 16] = (code * 16).view(-1, 64).to(torch.uint8)  # element 33, of the second block
    q = torch.zeros(1, 1, 32, 128, dtype=BF16)
    q[..., 33] = 1.0
    q[0, 0, 1::2, 33] = -1.0
    table = torch.arange(keys // 64, dtype=torch.int32)[None]
    weights = torch.zeros(1, 32, dtype=BF16)
    weights[0, 0], weights[0, 1] = 1.0, -1.0  # the value itself, of either sign
    for first in range(0, 256, 16):
        byte = first + torch.arange(keys) // 16
        scales[:, :, 1] = byte.view(-1, 64).to(torch.uint8)
        call = [x.to(device) for x in (q, cache, weights, torch.tensor([keys]), table)]
        got = paged_logits(*call, backend=backend)[0].cpu()
        sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
        want = torch.cat((sizes, -sizes))[code] * torch.exp2(byte.double() - 127)
        want = want.masked_fill(byte == 255, torch.nan).float().bfloat16()
        same = (got == want) | (got.isnan() & want.isnan()) | want.isinf()  # past bfloat16
        assert bool(same.all()), (first, got[~same], want[~same])


@pytest.mark.parametrize("where", ["q", "weights", "scale"])
def test_a_nan_makes_the_scores_nan_that_it_is_part_of(where, backend, device):
    case = draw([200, 130])
    if where == "q":
        case.q[1, 0, 3, 77] = torch.nan
    elif where == "weights":
        case.weights[1, 9] = torch.nan
    else:
        case.cache[case.table[1, 1], 64 * 64 + 5 * 4 + 2] = 255  # key 69 of row 1
    got = paged_logits(*case.to(device).arguments, backend=backend).cpu()
    seen = got.isnan() & valid(case.lengths, got.shape[1])
    want = torch.zeros_like(seen)
    want[1, 69 if where == "scale" else slice(0, 130)] = True
    assert torch.equal(seen, want)


@pytest.mark.parametrize("next_n", NEXT_N)
def test_block_maxima(next_n, backend, device):
    case = draw(SHORT, next_n).to(device)
    columns = case.table.shape[1] * 64
    want = oracle.maxima(dense(case, BF16, backend=backend), case.lengths)
    count = -(-case.lengths.clamp(min=0) // 8)
    for with_logits in (False, True):
        held, out, before = guarded(len(SHORT), columns // 8, BF16, device, gap=3)
        scored, logits, blank = guarded(len(SHORT), columns, BF16, device, gap=1)
        named = {"logits": logits} if with_logits else {}
        assert block_maxima(*case.arguments, out=out, **named, backend=backend) is out
        equal_bits(out, want, valid(count, columns // 8))
        written(out, count, before)
        held.assert_untouched()
        if with_logits:
            equal_bits(logits, dense(case, BF16, backend=backend), valid(case.lengths, columns))
            written(logits, case.lengths.clamp(min=0), blank)
        scored.assert_untouched()


@pytest.mark.parametrize("kind", FP4_SCALES)
@pytest.mark.parametrize("next_n", NEXT_N)
def test_a_score_does_not_depend_on_the_rows_beside_it(next_n, kind, backend, device):
    case = draw([200] * 12, next_n, kind).to(device)
    q, cache, weights, n, table = case.arguments
    got = paged_logits(*case.arguments, backend=backend)
    table = table.repeat_interleave(next_n, 0)
    alone = paged_logits(q.flatten(0, 1), cache, weights, n, table, backend=backend)
    equal_bits(got, alone, valid(n, got.shape[1]))


@pytest.mark.parametrize("next_n", [1, 2, 6])
@pytest.mark.parametrize("counted", [False, True])
def test_candidates(counted, next_n, backend, device):
    """From maxima to indices: the answer of the top-k on all keys."""
    lengths = [700, 699, 513, 64, 9, 0]
    case = draw(lengths, next_n).to(device)
    q, cache, weights, n, table = case.arguments
    scores = dense(case, BF16, backend=backend)
    chosen = select_blocks(block_maxima(*case.arguments, backend=backend), n, 65, backend=backend)
    out_lengths = torch.full((6,), -7, dtype=torch.int32, device=device) if counted else None
    got = candidate_logits(
        q, cache, weights, chosen, n, table, out_lengths=out_lengths, backend=backend
    )
    want = oracle.scores(scores, chosen, n)
    seen = oracle.visible(chosen, n)
    equal_bits(got, want, valid(seen, got.shape[1]) if counted else None)
    if out_lengths is not None:
        assert torch.equal(out_lengths.long(), seen)
    picked = select_candidates(got, chosen, n, 64, backend=backend)
    assert torch.equal(picked, topk(scores, n, 64, backend=backend))
    assert torch.equal(picked, select(*case.arguments, 64, backend=backend))
    once = candidate_select(q, cache, weights, chosen, n, table, 64, backend=backend)
    assert torch.equal(picked, once)


def test_candidates_of_any_kind(backend, device):
    """Holes, duplicates and numbers of no block score -inf or their key's score."""
    case = draw([300, 65, 0, 128]).to(device)
    q, cache, weights, n, table = case.arguments
    g = torch.Generator().manual_seed(5)
    chosen = torch.randint(-2, 45, (4, 50), generator=g).int()
    chosen[:, 7] = -(1 << 31)
    chosen[:, 9] = (1 << 31) - 1
    chosen = chosen.to(device)
    table[0, 1], table[1, 0] = -1, len(cache)
    got = candidate_logits(q, cache, weights, chosen, n, table, backend=backend)
    equal_bits(got, oracle.scores(dense(case, BF16, backend=backend), chosen, n))


def test_missing_pages_score_minus_inf(backend, device):
    case = draw([300, 300, 300], 3).to(device)
    case.table[0, 1], case.table[0, 3] = -1, len(case.cache)
    got = paged_logits(*case.arguments, backend=backend)
    gone = torch.zeros(got.shape[1], dtype=torch.bool, device=device)
    gone[64:128] = gone[192:256] = True
    assert torch.equal((got == -torch.inf)[:, :300], gone[:300].expand(3, -1))
    empty = (case.q, case.cache[:0], *case.arguments[2:])
    assert bool((paged_logits(*empty, backend=backend)[:, :300] == -torch.inf).all())


def test_many_rows_of_a_request(backend, device):
    """A chunk of prefill is one request's rows, each with its own length."""
    lengths = list(range(300, 337))
    case = draw(lengths, 37).to(device)
    got = paged_logits(*case.arguments, backend=backend)
    q, cache, weights, n, table = case.arguments
    one = paged_logits(q.flatten(0, 1), cache, weights, n, table.expand(37, -1), backend=backend)
    equal_bits(got, one, valid(n, got.shape[1]))


def test_views_of_the_cache(backend, device):
    case = draw([130, 70], pad=0).to(device)
    q, cache, weights, n, table = case.arguments
    want = paged_logits(*case.arguments, backend=backend)
    for shape in ((64, 68), (64, 1, 68)):
        view = cache.view(len(cache), *shape)
        got = paged_logits(q[:, 0], view, weights, n, table, backend=backend)
        equal_bits(got, want, valid(n, got.shape[1]))


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": torch.half}, TypeError, "q must be one of float8_e4m3fn, uint8, bfloat16"),
        ({"weights": torch.float32}, TypeError, "weights must be one of bfloat16"),
        ({"dtype": torch.float32}, ValueError, "out must be bfloat16 if q is"),
        ({"out": torch.half}, ValueError, "out must be bfloat16 if q is"),
    ],
)  # fmt: skip
def test_refused(change, error, words):
    q, cache, weights, n, table = draw([64, 64]).arguments
    q = q.to(change.get("q", BF16))
    weights = weights.to(change.get("weights", BF16))
    more = {"dtype": change.get("dtype", BF16)}
    if "out" in change:
        more["out"] = torch.empty(2, 64, dtype=change["out"])
    with pytest.raises(error, match=words):
        paged_logits(q, cache, weights, n, table, **more)
    if "out" in change:
        more["out"] = more["out"][:, :8]
    with pytest.raises(error, match=words):
        block_maxima(q, cache, weights, n, table, **more)
    chosen = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(error, match=words):
        candidate_logits(q, cache, weights, chosen, n, table, **more)
    if "out" not in change:
        with pytest.raises(error, match=words.replace("out", "dtype")):
            candidate_select(q, cache, weights, chosen, n, table, 1, **more)


def test_the_cache_must_have_fp4_keys():
    q, _, weights, n, table = draw([64]).arguments
    fp8 = torch.zeros(1, 64, 132, dtype=torch.uint8)
    with pytest.raises(ValueError, match="68 bytes a key"):
        paged_logits(q, fp8, weights, n, table)


def test_gathered_keys_are_fp8():
    q = draw([64]).q[:, 0]
    k, scale, w = torch.zeros(3, 128, dtype=torch.uint8), torch.ones(3), torch.ones(1, 32)
    n = torch.tensor([3])
    with pytest.raises(TypeError, match="q must be one of float8_e4m3fn, uint8"):
        ragged_logits(q, k, scale, w, n - 3, n)
    with pytest.raises(TypeError, match="q must be one of float8_e4m3fn, uint8"):
        candidate_logits_ragged(q, k, scale, w, n.int()[:, None], n - 3, n)
