"""DeepSeek-V4.1: TokenSpeed's own backend calls a plain layer, the source and a consumer in turn.

The scores are sums of small integers, so every implementation has the same bits and many scores
tie. The oracle is a stable sort over them.
"""

from __future__ import annotations

import logging

import pytest
import torch
from case_registry import broken, lines
from kits.tokenspeed_v41 import LAYERS, OnGpu, Step

import dsv4_plugin
from dsv4_plugin.errors import UnmetError

MODE = "dsv41_index_topk"
PLUGIN_KERNEL = f"dsv4_plugin_{MODE}"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEPS = {
    "decode": {"requests": ((2999, 1), (699, 1), (299, 1), (4500, 1), (8, 1))},
    "whole and partial newest blocks": {"requests": ((2047, 1), (2048, 1), (1024, 1), (0, 1))},
    "drafts, and a row of padding": {"requests": ((1994, 3), (1327, 3), (-1, 1))},
    "prefill": {"requests": ((1497, 4), (883, 3)), "prefill": True},
    "prefill from the start": {"requests": ((0, 9), (0, 5), (1100, 1)), "prefill": True},
    "unpadded pages": {"requests": ((1599, 1),), "pad": 0},
}  # fmt: skip
steps = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@pytest.fixture
def v41(engine):
    engine.v41.install_deep_gemm()
    return engine.v41


@pytest.fixture
def by_candidates(monkeypatch):
    """Nothing fits: plain and source score blocks first, prefill consumers their candidates."""
    from dsv4_plugin.engines.tokenspeed import dsv41

    monkeypatch.setattr(dsv41, "DECODE_BYTES", 1)
    monkeypatch.setattr(dsv41, "PREFILL_BYTES", 1)
    monkeypatch.setattr(dsv41, "WHOLE_COLUMNS", 0)


@pytest.fixture
def unasked(load, monkeypatch):
    """Load the plugin without explicit settings, as if it had its kernels; torch serves."""
    from dsv4_plugin.engines.tokenspeed import registration

    monkeypatch.setattr(registration.cuda, "missing", lambda: None)
    return lambda **settings: load(DSV4_BACKEND="auto", **settings)


def counters():
    return dsv4_plugin.status()["counters"]


def check(got, want, names=None):
    for name in names or want:
        assert torch.equal(got[name], want[name]), name


def check_scores(step, got, want):
    """Ties have no order in TokenSpeed, so only the scores of an answer can be compared."""
    for layer in LAYERS:
        assert torch.equal(got[f"{layer} lengths"], want[f"{layer} lengths"])
        for scores, a, b in zip(step.scores(layer), got[layer], want[layer], strict=True):
            a, b = (scores[x[x >= 0].long()].sort().values for x in (a, b))
            assert torch.equal(a, b), layer


@steps
def test_not_asked_for_tokenspeed_serves_all_three(engine, v41, step):
    """Its own Hopper kernel, by the rule that the oracle has; candidates of all blocks, no ties."""
    step = Step(v41, **{"blocks": 2048, **step})
    got = step.run()
    assert {call.by_plugin for call in engine.calls} == {False}
    check_scores(step, got, step.expected(torch.float32))
    assert counters() == {}


@steps
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_in_every_layer(engine, load, v41, step, dtype):
    """Keys and blocks as ordered lists: ascending, the lowest position among ties."""
    load(DSV4_TOPK=dtype, DSV4_STRICT="1")
    step = Step(v41, **step)
    check(step.run(), step.expected(DTYPES[dtype]))


@steps
def test_exact_in_parts_and_by_candidates(engine, load, v41, by_candidates, step):
    """At decode not one layer writes logits of all keys here, at prefill the consumer does not."""
    load(DSV4_STRICT="1")
    step = Step(v41, **{"blocks": 513, **step})  # one more than 512 keys
    check(step.run(), step.expected(torch.bfloat16))
    assert all(call.by_plugin for call in engine.calls)
    rows = sum(call.rows for call in engine.calls)
    lone = sum(n for _, n in step.requests if n == 1)  # a row of its own is no prefill
    assert rows == (2 * (len(step.position) - lone) if step.prefill else 0)


@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_the_same_keys_as_tokenspeed(engine, load, v41, step):
    """In float32, with blocks that do not tie at the threshold: every block of a row."""
    step = Step(v41, **{"blocks": 2048, **STEPS[step]})
    by_engine = step.run()
    load(DSV4_TOPK="fp32", DSV4_STRICT="1")
    by_plugin = step.run()
    check(by_plugin, by_engine, ("blocks", "block lengths"))
    check_scores(step, by_plugin, by_engine)


def test_a_short_prefill_of_a_consumer_is_scored_whole(engine, load, v41):
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["prefill"])
    check(step.run(), step.expected(torch.bfloat16))
    assert sum(call.rows for call in engine.calls) == 3 * len(step.position)


def test_without_tokenspeeds_kernels_it_is_the_same(engine, load, v41, monkeypatch):
    """They are not in another release: queries by the plugin, candidates alone."""
    monkeypatch.delattr(v41.triton, "quantize_index_queries")
    monkeypatch.delattr(v41.triton, "candidate_scores")
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["prefill"])
    check(step.run(), step.expected(torch.bfloat16))
    assert sum(call.rows for call in engine.calls) == 2 * len(step.position)


def test_counters_and_a_line_a_kind(engine, load, v41, caplog):
    load()
    step = Step(v41, **STEPS["decode"])
    step.run()
    assert counters() == {
        f"topk.{MODE}": 3, f"topk.{MODE}.bf16.torch": 3, "candidates.source": 1,
        "candidates.consumer": 1, "logits.plugin": 1, "logits.plugin.bf16.torch": 1,
    }  # fmt: skip
    active = [line for line in lines(caplog) if "active" in line]
    assert len(active) == 3
    for layer, line in zip(LAYERS, active, strict=True):
        assert line.startswith("dsv4 active in TokenSpeed 0.1")
        assert f"DeepSeek-V4.1 {layer} layers, {MODE}, k 512" in line
        assert "bf16 by torch on the plugin's bf16 logits" in line
    assert dsv4_plugin.status()["seams"][f"topk.{MODE}"]["engaged"]


# --- the op by itself ------------------------------------------------------------------------


def call(v41, step, layer="source", solution=None, **other):
    """One decode call of the facade; returns its four outputs, which held other numbers."""
    at, ratio, n = LAYERS.index(layer), step.ratio[layer], len(step.position)
    table = step.table[ratio][step.request]
    given = {
        "index_q": step.q[at], "weights": step.weights[at], "index_cache": step.cache[ratio],
        "page_table": table, "visible_lens": ((step.position + 1) // ratio).int(),
        "candidate_blocks": None, "topk": 512,
        "candidate_topk": step.blocks if layer == "source" else 0, "candidate_block_size": 8,
        "query_chunk_size": 256, "score_chunk_size": 256, "process_group": None,
    }  # fmt: skip
    given |= other
    if "out" not in given:
        shapes = ((n, 512), (n,), (n, given["candidate_topk"]), (n,))
        given["out"] = tuple(torch.full(s, 7, dtype=torch.int32) for s in shapes)
    return v41.facade.index_topk(*given.values(), solution)


def test_it_is_the_one_that_is_selected_on_hopper(engine, unasked):
    assert PLUGIN_KERNEL in unasked()
    assert engine.chosen(MODE) == PLUGIN_KERNEL
    for gpu in (8, 10):
        engine.pose(gpu)
        assert engine.chosen(MODE, native_indexer=gpu == 10) != PLUGIN_KERNEL


def test_outputs_are_written_whole(engine, load, v41):
    """A layer that selects no blocks writes that, and overwrites the buffers' old content."""
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["drafts, and a row of padding"])
    want = step.expected(torch.bfloat16)
    rows, lengths, blocks, block_lengths = call(v41, step, "plain")
    assert torch.equal(rows, want["plain"]) and torch.equal(lengths, want["plain lengths"])
    assert blocks.shape == (7, 0) and block_lengths.tolist() == [0] * 7
    rows, lengths, blocks, block_lengths = call(v41, step, "source", out=None)
    assert torch.equal(rows, want["source"]) and torch.equal(blocks, want["blocks"])
    assert torch.equal(block_lengths, want["block lengths"])


@pytest.mark.parametrize("layer", LAYERS)
def test_no_rows_and_no_pages(engine, load, v41, layer):
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["decode"])
    more = {"candidate_blocks": torch.zeros(5, 4).int()} if layer == "consumer" else {}
    found = call(v41, step, layer, page_table=torch.zeros(5, 0).int(), **more)
    assert bool((found[0] == -1).all() and (found[2] == -1).all())
    assert found[1].tolist() == found[3].tolist() == [0] * 5
    step.position, step.request = step.position[:0], step.request[:0]
    step.q, step.weights = [x[:0] for x in step.q], [x[:0] for x in step.weights]
    more = {name: value[:0] for name, value in more.items()}
    assert [len(x) for x in call(v41, step, layer, **more)] == [0] * 4


def test_candidates_that_nobody_wrote_are_safe(engine, load, v41):
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["decode"])
    g = torch.Generator().manual_seed(1)
    wild = torch.randint(-(2**31), 2**31, (5, 300), generator=g).int()
    rows, *_ = call(v41, step, "consumer", candidate_blocks=wild)
    assert bool(((rows >= -1) & (rows <= step.position[:, None])).all())


def test_a_row_without_candidates_has_no_keys(engine, load, v41):
    load(DSV4_STRICT="1")
    step = Step(v41, **STEPS["decode"])
    none = torch.full((5, 16), -1).int()
    none[1, :2] = torch.tensor([3, 7])
    rows, lengths, *_ = call(v41, step, "consumer", candidate_blocks=none)
    assert lengths.tolist() == [0, 16, 0, 0, 0]
    assert rows[1, :16].tolist() == [*range(24, 32), *range(56, 64)]
    assert bool((rows[0] == -1).all())


# --- what the plugin leaves to TokenSpeed ----------------------------------------------------


UNFIT = {
    "64-bit page table": ({"page_table": "long"}, "page_table is torch.int64"),
    "transposed tables": ({"page_table": "columns"}, "page_table is torch.int32 with strides"),
}


@pytest.mark.parametrize("how, why", UNFIT.values(), ids=UNFIT)
def test_another_form_is_tokenspeeds(engine, unasked, v41, how, why, caplog):
    unasked()
    step = Step(v41, **STEPS["decode"])
    table = step.table[1][step.request]
    other = {"long": table.long(), "columns": table.t().contiguous().t()}[how["page_table"]]
    for _ in range(2):
        rows, *_ = call(v41, step, page_table=other)
    assert {c.by_plugin for c in engine.calls} == {False}
    scores = step.scores("source")
    for s, a, b in zip(scores, rows, step.expected(torch.float32)["source"], strict=True):
        assert torch.equal(s[a[a >= 0].long()].sort().values, s[b[b >= 0].long()].sort().values)
    (line,) = [line for line in lines(caplog) if "inactive" in line]
    assert f"DeepSeek-V4.1 source layers, {MODE}" in line and why in line
    assert counters() == {f"topk.{MODE}.upstream": 2, "candidates.source.engine": 2}


@pytest.mark.parametrize("layer", LAYERS)
def test_heads_that_are_divided(engine, unasked, v41, layer, monkeypatch, upstream, caplog):
    """TokenSpeed's portable kernel serves; torch replaces it here."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    unasked()
    step = Step(v41, **STEPS["decode"])
    q = [x[:, :16] for x in step.q]
    at = LAYERS.index(layer)
    blocks = {"candidate_blocks": torch.zeros(5, 4).int()} if layer == "consumer" else {}
    served = []
    portable = "triton_dsv41_index_topk"
    monkeypatch.setitem(engine.registry._impls, portable, lambda *given: served.append(given))
    engine.registry.clear_cache()
    call(v41, step, layer, index_q=q[at], weights=step.weights[at][:, :16], process_group=object(),
         **blocks)  # fmt: skip
    assert len(served) == 1 and served[0][0].shape == (5, 16, 128)
    (line,) = [line for line in lines(caplog) if "inactive" in line]
    assert "divided among ranks" in line
    engine.registry.clear_cache()


def test_a_wish_that_cannot_be_met_is_one_error(engine, load, v41):
    load(DSV4_TOPK="bf16")
    step = Step(v41, **STEPS["decode"])
    with pytest.raises(UnmetError, match="DSV4_TOPK=bf16") as caught:
        call(v41, step, page_table=step.table[1][step.request].long(), candidate_block_size=16)
    assert len(caught.value.unmet) == 2
    assert "candidate blocks have 16 keys, not 8" in caught.value.unmet


def test_deepgemms_logits_are_tokenspeeds_kernel(engine, unasked, v41, caplog):
    unasked(DSV4_LOGITS="engine")
    step = Step(v41, blocks=2048, **STEPS["decode"])
    check_scores(step, step.run(), step.expected(torch.float32))
    assert {c.by_plugin for c in engine.calls} == {False}
    said = [line for line in lines(caplog) if "inactive" in line]
    assert len(said) == 3 and all("the plugin's own logits" in line for line in said)
    unasked(DSV4_LOGITS="engine", DSV4_TOPK="fp32")
    from dsv4_plugin.engines.shared import adapter

    adapter.current().forget_decisions()
    with pytest.raises(UnmetError, match="DSV4_TOPK=fp32"):
        step.run()


@pytest.mark.parametrize(
    "settings", [{"DSV4_PLUGIN": "0"}, {"DSV4_PLUGIN": ""}, {"DSV4_TOPK": "off"}], ids=str
)
def test_off_is_tokenspeeds(engine, load, v41, settings):
    assert PLUGIN_KERNEL not in load(**settings)
    step = Step(v41, blocks=2048, **STEPS["decode"])
    check_scores(step, step.run(), step.expected(torch.float32))
    assert {c.by_plugin for c in engine.calls} == {False} and counters() == {}


def test_without_the_plugins_read_the_prefill_is_tokenspeeds(engine, load, v41, caplog):
    load(DSV4_INDEXER_READ="off", DSV4_TOPK="fp32")
    step = Step(v41, blocks=2048, **STEPS["prefill"])
    check_scores(step, step.run(), step.expected(torch.float32))
    assert {c.by_plugin for c in engine.calls} == {False}
    assert sum("DSV4_INDEXER_READ=off" in line for line in lines(caplog)) == 1
    decode = Step(v41, **STEPS["decode"])
    check(decode.run(), decode.expected(torch.float32))


# --- an op of the plugin fails ---------------------------------------------------------------


# op -> the step in which it is called
OPS = {
    "block_maxima": "decode", "select_blocks": "decode",
    "topk": "decode", "candidate_select": "decode",
    "select_candidates": "prefill", "gather_indexer_cache": "prefill",
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_raises_is_tokenspeeds_call(engine, load, v41, op, monkeypatch, caplog):
    step = Step(v41, blocks=2048, **STEPS[OPS[op]])
    load(DSV4_TOPK="fp32")
    monkeypatch.setattr(f"dsv4_plugin.{op}", broken)
    check_scores(step, step.run(), step.expected(torch.float32))
    (error,) = lines(caplog, logging.ERROR)
    assert "no such kernel image" in error
    assert not {"candidates.source", "candidates.consumer"} <= set(counters())
    assert "no such kernel image" in dsv4_plugin.status()["seams"][f"topk.{MODE}"]["why"]


@pytest.mark.parametrize("op", ["paged_logits", "ragged_logits"])
def test_logits_that_fail_are_tokenspeeds_call(engine, load, v41, op, monkeypatch, caplog):
    step = Step(v41, blocks=2048, **STEPS["prefill" if op == "ragged_logits" else "decode"])
    load(DSV4_TOPK="fp32")
    monkeypatch.setattr(f"dsv4_plugin.ops.logits.{op}", broken)
    check_scores(step, step.run(), step.expected(torch.float32))
    assert len(lines(caplog, logging.ERROR)) == 1


def test_strict_raises_instead(engine, load, v41, monkeypatch):
    load(DSV4_STRICT="1")
    monkeypatch.setattr("dsv4_plugin.select_blocks", broken)
    with pytest.raises(RuntimeError, match="no such kernel image"):
        call(v41, Step(v41, **STEPS["decode"]))


def test_an_override_of_the_plugins_kernel_ends(engine, load, v41, monkeypatch):
    """A fallback does not return to the plugin, whatever kernel is requested from TokenSpeed."""
    load()
    monkeypatch.setenv("TOKENSPEED_KERNEL_OVERRIDE_ATTENTION_DSV41_INDEX_TOPK", "dsv4_plugin")
    monkeypatch.setattr("dsv4_plugin.select_blocks", broken)
    served = []
    portable = "triton_dsv41_index_topk"
    monkeypatch.setitem(engine.registry._impls, portable, lambda **given: served.append(given))
    call(v41, Step(v41, **STEPS["decode"]))
    assert len(served) == 1


def test_a_pose_is_a_tensor():
    """A tensor that reports a GPU holds the numbers of a tensor on the CPU."""
    posed = torch.ones(3).as_subclass(OnGpu)
    assert posed[:2].is_cuda and posed.device.type == "cpu"
