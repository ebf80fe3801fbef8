"""Results: TokenSpeed's own facades with the plugin's kernels, against an exact oracle."""

from __future__ import annotations

import pytest
import torch
from kits.engine_parts import canonical, oracle

import dsv4_plugin

BATCHES = {
    "decode": (1536, 700, 513, 512, 511, 3, 1),
    "an empty row": (700, 0, 1500),
    "only empty rows": (0, 0),
    "one row": (2000,),
    "only short rows": (512, 64, 1),
}
batches = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
# In 16 bits `auto` takes the plugin's logits, in float32 DeepGEMM's.
dtypes = pytest.mark.parametrize(
    "topk,logits", [("bf16", "auto"), ("bf16", "engine"), ("fp32", "auto")]
)


def counters():
    return dsv4_plugin.status()["counters"]


def best(engine, lengths, k, call=-1):
    """The exact answer, from the logits that were written."""
    recorded = engine.calls[call]
    spans = [(begin, begin + n) for (begin, _), n in zip(recorded.spans, lengths, strict=True)]
    rows = zip(recorded.logits, spans, strict=True)
    return torch.stack([oracle(row[a:b].float(), k) for row, (a, b) in rows])


def decode(engine, batch, k=512, layout="logical_offsets", **kwargs):
    return engine.dsa.dsa_decode_topk(
        batch["q"], batch["weights"], batch["lengths"], batch["table"], page_size=64, topk=k,
        softmax_scale=0.5, index_k_cache=batch["plane"], topk_layout=layout,
        **{"batch_invariant": False, "slot_order": "selection", **kwargs},
    )  # fmt: skip


def through(table, indices):
    page = torch.gather(table.long(), 1, indices.clamp_min(0).long() // 64)
    return torch.where(indices < 0, -1, page * 64 + indices % 64).to(torch.int32)


@batches
@dtypes
@pytest.mark.parametrize("pad", [0, 1024, 4], ids=["dense", "arena", "arena of odd words"])
def test_dsa_decode_logical_offsets(engine, load, lengths, topk, logits, pad):
    load(DSV4_TOPK=topk, DSV4_LOGITS=logits)
    batch = engine.batch(lengths, pad=pad)
    got, lens = decode(engine, batch)
    want_dtype = torch.bfloat16 if topk == "bf16" else torch.float32
    by_plugin = (topk, logits) == ("bf16", "auto")
    assert (engine.calls[-1].dtype, engine.calls[-1].by_plugin) == (want_dtype, by_plugin)
    assert torch.equal(canonical(got), best(engine, lengths, 512))
    assert lens.tolist() == [min(n, 512) for n in lengths]
    assert counters() == {
        **({"logits.plugin": 1, "logits.plugin.bf16.torch": 1} if by_plugin else {}),
        "topk.dsa_decode_topk": 1, f"topk.dsa_decode_topk.{topk}.torch": 1,
    }  # fmt: skip


@batches
def test_dsa_decode_pool_slots(engine, load, lengths):
    load()
    batch = engine.batch(lengths)
    got, lens = decode(engine, batch, layout="global_slots")
    want = through(batch["table"], best(engine, lengths, 512))
    assert torch.equal(canonical(got), canonical(want))
    assert lens.tolist() == [min(n, 512) for n in lengths]


@pytest.mark.parametrize("k", [512, 1024, 2048])
def test_every_k(engine, load, k):
    load()
    lengths = (2500, k + 1, k, k - 1)
    got, _ = decode(engine, engine.batch(lengths), k=k)
    assert torch.equal(canonical(got), best(engine, lengths, k))


def test_the_callers_buffers_are_filled(engine, load):
    load()
    lengths = (1500, 3)
    wide = torch.full((4, 512), 7, dtype=torch.int32)
    lens = torch.full((2,), 7, dtype=torch.int32)
    got, got_lens = decode(engine, engine.batch(lengths), out=wide[1:3], lens_out=lens)
    assert got.data_ptr() == wide[1:3].data_ptr() and got_lens is not None
    assert torch.equal(canonical(wide[1:3]), best(engine, lengths, 512))
    assert lens.tolist() == [512, 3]
    assert bool((wide[0] == 7).all() and (wide[3] == 7).all())


def test_a_compact_table_adds_its_base(engine, load):
    """``block_table_base_offsets``: the table begins at a later page of the request."""
    load()
    lengths = (1500, 40)
    batch = engine.batch(lengths)
    base = torch.tensor([3, 0], dtype=torch.int32)
    full = dict(batch, lengths=batch["lengths"] + base * 64)
    got, _ = decode(engine, full, block_table_base_offsets=base)
    want = best(engine, lengths, 512)
    want = torch.where(want < 0, want, want + base[:, None] * 64)
    assert torch.equal(canonical(got), canonical(want))


def test_batch_invariance_is_served(engine, load):
    """TokenSpeed asks for it by a feature; a row's answer is the same in any batch."""
    load()
    batch = engine.batch((900, 1500, 1200))
    whole, _ = decode(engine, batch, batch_invariant=True)
    alone = {k: v if k == "plane" else v[1:2].contiguous() for k, v in batch.items()}
    one, _ = decode(engine, alone, batch_invariant=True)
    assert torch.equal(one[0], whole[1])


def test_raw_bfloat16_weights(engine, load):
    load()
    batch = engine.batch((1500, 3))
    wide = torch.randn(2, 96).bfloat16()
    batch["weights"] = wide[:, 32:]  # a column-split view of the fused projection
    got, _ = decode(engine, batch)
    assert torch.equal(canonical(got), best(engine, (1500, 3), 512))


def test_quantised_queries_score_as_the_originals(engine, load):
    """The scale of a query moves to its weight: the scores are those of the bf16 queries."""
    from kits.engine_parts import read_keys

    from dsv4_plugin.engines.tokenspeed.kernels import quantise

    load(DSV4_TOPK="fp32")
    batch = engine.batch((640,))
    decode(engine, batch)
    got = engine.calls[-1].logits[0, :640]
    keys = read_keys(batch["plane"].view(-1, 64, 132), batch["table"][0], 640)
    values = keys[:, :128].contiguous().view(torch.float8_e4m3fn).float()
    scale = keys[:, 128:].contiguous().view(torch.float32).reshape(-1)
    exact = 0.5 * batch["weights"][0] @ torch.relu(batch["q"][0].float() @ values.T) * scale
    assert torch.allclose(got, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    q8, folded = quantise(batch["q"], batch["weights"], 0.5)
    again = folded[0] @ torch.relu(q8[0].float() @ values.T) * scale
    assert torch.allclose(got, again, rtol=1e-5, atol=1e-3)
    zero, _ = quantise(torch.zeros_like(batch["q"]), batch["weights"], 0.5)
    assert bool((zero.float() == 0).all())  # no division by zero


# --- prefill ---------------------------------------------------------------------------------


def prefill(engine, requests, k=512, pad=1024, seed=0, **kwargs):
    """Two or more requests of ``(keys, queries)``; the last query sees all keys."""
    g = torch.Generator().manual_seed(seed)
    total = sum(keys for keys, _ in requests)
    batch = engine.batch((max(total, 64),), pad=pad, seed=seed)
    pages = batch["plane"].shape[0]
    slots = torch.randperm(pages * 64, generator=g)[:total]
    starts, ends, begin = [], [], 0
    for keys, queries in requests:
        starts += [begin] * queries
        ends += [begin + max(0, keys - queries + 1 + j) for j in range(queries)]
        begin += keys
    tokens = len(starts)
    q = torch.randn(tokens, 64, 128, generator=g).bfloat16()
    weights = torch.randn(tokens, 64, generator=g)
    arguments = {
        "topk": k, "softmax_scale": 0.5, "batch_invariant": False, "page_size": 64,
        "index_k_cache": batch["plane"], "slot_order": "selection", **kwargs,
    }  # fmt: skip
    rows = torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)
    out, lens = engine.dsa.dsa_prefill_topk(q, weights, slots, *rows, **arguments)
    return out, lens, starts, ends, (q, weights, slots, batch["plane"])


@pytest.mark.parametrize(
    "requests",
    [[(1536, 5)], [(700, 3), (1500, 4), (40, 2)], [(5, 5)], [(513, 1), (512, 1), (511, 1)]],
    ids=["one", "three", "shorter than its queries", "around k"],
)
@dtypes
@pytest.mark.parametrize("pad", [0, 1024], ids=["dense", "arena"])
def test_dsa_prefill(engine, load, requests, topk, logits, pad):
    load(DSV4_TOPK=topk, DSV4_LOGITS=logits)
    got, lens, starts, ends, _ = prefill(engine, requests, pad=pad)
    lengths = [max(0, b - a) for a, b in zip(starts, ends, strict=True)]
    want = best(engine, lengths, 512)
    want = torch.where(want < 0, want, want + torch.tensor(starts)[:, None]).to(torch.int32)
    assert torch.equal(canonical(got), canonical(want))
    assert lens.tolist() == [min(n, 512) for n in lengths]


@pytest.mark.parametrize("logits", ["auto", "engine"])
def test_prefill_in_blocks_is_the_same(engine, load, logits):
    """``max_logits_bytes`` splits the queries, never the answer."""
    load(DSV4_LOGITS=logits)
    whole, *_ = prefill(engine, [(700, 3), (1500, 7)])
    engine.calls.clear()
    parts, *_ = prefill(engine, [(700, 3), (1500, 7)], max_logits_bytes=2200 * 2 * 4)
    assert [c.rows for c in engine.calls] == [4, 4, 2]
    assert torch.equal(parts, whole)


def test_prefill_without_keys(engine, load):
    load()
    got, lens, *_ = prefill(engine, [(0, 3)])
    assert bool((got == -1).all()) and lens.tolist() == [0, 0, 0]
    assert not engine.calls


def test_the_gather_by_slot_reads_what_the_reader_reads(engine, load):
    """The gathered keys, dequantised, have the bits that TokenSpeed's own loop returns."""
    from dsv4_plugin.engines.tokenspeed.kernels import gather_slots

    loop = engine.readers["read_deepseek_v4_indexer_fp8_cache"]
    for pad in (0, 1024, 4):
        plane = engine.batch((640,), pad=pad)["plane"]
        slots = torch.randperm(plane.shape[0] * 64)[:300]
        values, scales = gather_slots(plane, slots.int(), 64)
        assert torch.equal(values.float() * scales[:, None], loop(plane, slots, 64))


# --- dsv4_* ----------------------------------------------------------------------------------


@batches
@dtypes
def test_dsv4_decode(engine, load, lengths, topk, logits):
    load(DSV4_TOPK=topk, DSV4_LOGITS=logits)
    batch = engine.batch(lengths)
    q = batch["q"].to(torch.float8_e4m3fn)
    got = engine.dsv4.dsv4_decode_topk(
        (q, torch.empty(0)), batch["weights"], batch["plane"], batch["lengths"][:, None],
        batch["table"], page_size=64, topk=512, max_context_len=batch["table"].shape[1] * 64,
        plan=torch.zeros(133, 2, dtype=torch.int32), index_k_format="fp8_scaled",
    )  # fmt: skip
    assert torch.equal(canonical(got), best(engine, lengths, 512))
    assert counters()[f"topk.dsv4_decode_topk.{topk}.torch"] == 1


@pytest.mark.parametrize("given", [False, True], ids=["gathers", "reuses what was gathered"])
@pytest.mark.parametrize("logits", ["auto", "engine"])
def test_dsv4_prefill(engine, load, given, logits):
    load(DSV4_LOGITS=logits)
    lengths = (1536, 700, 512, 3)
    batch = engine.batch(lengths)
    q = batch["q"].to(torch.float8_e4m3fn)
    cu = torch.zeros(5, dtype=torch.int32)
    cu[1:] = batch["lengths"].cumsum(0)
    gathered = None
    for _ in range(2 if given else 1):
        got, gathered = engine.dsv4.dsv4_prefill_topk(
            (q, torch.empty(0)), batch["weights"], batch["plane"], batch["table"], cu, cu[:-1],
            cu[1:], batch["lengths"], page_size=64, topk=512, max_seqlen_k=1536,
            index_k_format="fp8_scaled", gathered_k=gathered,
        )  # fmt: skip
    assert gathered[0].shape == (int(cu[-1]), 128)
    assert torch.equal(canonical(got), best(engine, lengths, 512))


def test_no_query_no_call(engine, load):
    load()
    batch = {k: v[:0] if k != "plane" else v for k, v in engine.batch((64,)).items()}
    got, lens = decode(engine, batch)
    assert got.shape == (0, 512) and lens.shape == (0,)
    assert not engine.calls
