"""Top-k on a GPU: random calls, all arguments at once. A failure names the seed that repeats it."""

import random

import pytest
import torch
from oracles import Ranking
from topk_device import DEVICE, Guarded, draw, ints, run, seen

from dsv4_plugin.testing.inputs import DISTRIBUTIONS
from dsv4_plugin.testing.topk.cases import DTYPES, EDGES, KS, ODD_KS

pytestmark = pytest.mark.gpu

MOST_SCORES = 5_000_000  # of one call


def size(r):
    """Columns: near a boundary as often as anywhere."""
    if r.random() < 0.5:
        return max(1, r.choice(EDGES) + r.randint(-40, 40))
    return int(2 ** r.uniform(0, 18))


@pytest.mark.parametrize("seed", range(400))
def test_a_random_call(seed):
    r = random.Random(seed)
    dtype, kind = r.choice(list(DTYPES)), r.choice(list(DISTRIBUTIONS))
    columns = min(size(r), MOST_SCORES)
    next_n = r.choice((1, 1, 1, 2, 3))
    most = max(1, min(300, MOST_SCORES // columns // next_n))
    requests = min(most, r.choice((1, 2, 5, 8, 33, 67, 133, 300)))
    rows = requests * next_n
    k = r.choice((*KS, *KS, *ODD_KS, r.randint(1, 2048)))
    sort = r.random() < 0.4
    longest = [columns, columns, min(columns, 9000)][seed % 3]
    ends = [r.choice((longest, r.randint(-1, longest + 5), k, k + 1)) for _ in range(requests)]

    held = Guarded(rows, columns, DTYPES[dtype], stride=columns + r.choice((0, 0, 1, 8, 999)),
                   offset=r.choice((0, 0, 1, 3, 7)))  # fmt: skip
    logits = held.inside
    logits.copy_(draw(kind, rows, columns, dtype, seed=seed))
    lengths = ints(ends, r.choice((torch.int32, torch.int64)))
    step = torch.arange(1 - next_n, 1, device=DEVICE)
    per_row = (lengths[:, None] + step).clamp(min=0).reshape(-1)
    more, starts, table = {"next_n": next_n}, None, None
    if r.random() < 0.3:
        starts = ints(r.randint(0, columns) for _ in range(rows))
        more["row_starts"] = starts
    first = torch.zeros_like(per_row) if starts is None else starts
    at = torch.arange(columns, device=DEVICE)
    outside = (at < first[:, None]) | (at >= (first + per_row)[:, None])
    logits.masked_fill_(outside, r.choice((float("nan"), float("inf"), 0.0)))
    ranking = Ranking(seen(logits, dtype), per_row, starts=starts)

    out, raw = (Guarded(rows, k, torch.int32, stride=k + r.choice((0, 5))) for _ in range(2))
    if r.random() < 0.3:
        page_size = r.choice((1, 48, 64))
        pages = -(-columns // page_size)
        g = torch.Generator().manual_seed(seed)
        table = torch.randint(-1, 10_000, (requests, pages), generator=g).int().to(DEVICE)
        more |= {"page_table": table, "page_size": page_size, "out_raw": raw.inside}
    run(logits, lengths, k, dtype=dtype, sort=sort, out=out.inside, **more)
    context = f"seed {seed}: {dtype} {kind} {rows} x {columns}"
    if table is None:
        ranking.check(out.inside.clone(), k, sort=sort, context=context)
    else:
        ranking.check(raw.inside.clone(), k, sort=sort, context=context)
        index = raw.inside.long()
        pages_of = table.repeat_interleave(next_n, 0)
        number = pages_of.gather(1, index.clamp(min=0) // page_size).long()
        slot = (number * page_size + index % page_size).masked_fill((index < 0) | (number < 0), -1)
        assert torch.equal(out.inside.long(), slot), context
    for guarded in (held, out, raw):
        guarded.assert_untouched(context)
