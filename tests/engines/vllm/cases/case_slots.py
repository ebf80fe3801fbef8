"""Slots and counts: vLLM's C4A attention takes those of the plugin's top-k, or makes its own."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from attention import TO_SLOTS, Attention
from case_calls import BATCHES
from conftest import canonical
from kits.seams import moved

import dsv4_plugin
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import Decision
from dsv4_plugin.engines.vllm import register, slots, unregister, wrappers

DECODES = {name: batch for name, batch in BATCHES.items() if batch.get("decode")}


@pytest.fixture
def attention(engine, monkeypatch):
    return Attention(monkeypatch)


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")


def counters():
    return dsv4_plugin.status()["counters"]


def seam():
    return dsv4_plugin.status()["seams"]["topk.slots"]


def select(layer, problem):
    """Run the indexer's layer inside of a forward pass that is open."""
    problem.buffer.fill_(7)
    layer(problem.hidden, problem.query, None, problem.weights)


def through(engine, run, attention, problem, next_n=1, **layer):
    """One layer's indexer and attention in one forward pass."""
    with engine.gpu(90):
        built = run.build(problem, layer=layer)
        with engine.forward(problem):
            select(built, problem)
            return attention.decode(problem, next_n)


@pytest.mark.parametrize("batch", DECODES.values(), ids=DECODES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_attention_gets_what_it_got(engine, run, attention, monkeypatch, batch, dtype):
    """Off and on, the same problem: the same counts and, for rows with scores, the same slots."""
    problem, next_n = engine.problem(**batch), batch.get("next_n", 1)
    want, want_counts = through(engine, run, attention, problem, next_n)
    assert attention.transforms == 1 and counters() == {}
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", dtype)
    monkeypatch.setenv("DSV4_LOGITS", "plugin" if dtype == "bf16" else "engine")
    got, counts = through(engine, run, attention, problem, next_n)
    served = not batch.get("wider_buffer")  # no buffer of DeepSeek-V4's
    assert seam()["engaged"] is served
    assert attention.transforms == (1 if served else 2)
    assert counters().get("topk.slots.taken", 0) == served
    assert torch.equal(counts, want_counts)
    if dtype == "fp32":
        assert torch.equal(canonical(got), canonical(want))
    # The bits that vLLM's function computes from the indices of the plugin's top-k.
    assert all(map(torch.equal, attention.original(**attention.arguments(problem, next_n)),
                   (got, counts)))  # fmt: skip
    assert got.dtype == counts.dtype == torch.int32 and got.is_contiguous()


def test_rows_that_pad_a_graph(engine, run, attention, on):
    """Their length is zero, so they have no slot and count zero, whatever masks and maps hold."""
    problem = engine.problem(decode=(700, 1500, 0, 0))
    with engine.gpu(90), engine.forward(problem):
        select(run.build(problem), problem)
        padded = {
            "is_valid_token": torch.tensor([True, True, False, False]),
            "token_to_req_indices": torch.tensor([0, 1, 0, 0], dtype=torch.int32),
        }
        got, counts = attention.decode(problem, **padded)
        want = attention.original(**attention.arguments(problem, **padded))
    assert attention.transforms == 1  # the line above
    assert torch.equal(got, want[0]) and torch.equal(counts, want[1])
    assert counts.tolist() == [512, 512, 0, 0] and bool((got[2:] == -1).all())


def test_layer_after_layer(engine, run, attention, on):
    """Two layers with one index buffer: each attention gets the slots of its own indexer."""
    problem, other = engine.problem(decode=(700, 1500)), engine.problem(decode=(900, 600), seed=5)
    other.buffer = problem.buffer
    with engine.gpu(90):
        layers = run.build(problem), run.build(other)
        for _ in range(2):
            for layer, one in zip(layers, (problem, other), strict=True):
                with engine.forward(one):
                    select(layer, one)
                    got, counts = attention.decode(one)
                    want = attention.original(**attention.arguments(one))
                assert torch.equal(got, want[0]) and torch.equal(counts, want[1])
    assert counters()["topk.slots.taken"] == 4 and "topk.slots.upstream" not in counters()


def expanded(problem):
    return {"block_table": problem.metadata.decode.block_table.clone()}


def fewer(problem):
    one = problem.metadata.decode.block_table[:1]
    return {"block_table": one, "topk_indices": problem.buffer[:1]}


MISMATCHES = {
    "another table": expanded,
    "fewer requests": fewer,
    "fewer rows": lambda problem: {"topk_indices": problem.buffer[:1]},
    "other rows": lambda problem: {"topk_indices": problem.buffer[1:3]},
    "a copy of the indices": lambda problem: {"topk_indices": problem.buffer[:2].clone()},
    "a part of the columns": lambda problem: {"topk_indices": problem.buffer[:2, :256]},
    "another page size": lambda problem: {"block_size": 128},
}


@pytest.mark.parametrize("change", MISMATCHES.values(), ids=MISMATCHES)
def test_another_question_is_vllms(engine, run, attention, on, change):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90), engine.forward(problem):
        select(run.build(problem), problem)
        given = attention.arguments(problem, **change(problem))
        want = attention.original(**given)
        got = getattr(attention.module, TO_SLOTS)(*given.values())
    assert attention.transforms == 2
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert counters()["topk.slots.upstream"] == 1 and "topk.slots.taken" not in counters()


def test_a_call_of_another_form_has_its_arguments(engine, run, attention, on, monkeypatch):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90), engine.forward(problem):
        built, given = run.build(problem), attention.arguments(problem)
        for args, kwargs in (
            ((*given.values(), 3), {}),
            (tuple(given.values()), {"scale": 2}),
            (tuple(given.values())[:4], {}),
        ):
            select(built, problem)
            heard: list = []
            wrappers.take_slots(lambda *a, heard=heard, **k: heard.extend((a, k)), *args, **kwargs)
            assert len(heard[0]) == len(args) and heard[1] == kwargs
            assert all(a is b for a, b in zip(heard[0], args, strict=True))


def upstream_topk(engine, built, problem):
    """vLLM's own top-k wrote the indices after the plugin's, in the same pass."""
    current = adapter.current()
    now, current.decision = current.decision, Decision(enabled=True)
    decisions, current.decisions = current.decisions, {}
    select(built, problem)
    current.decision, current.decisions = now, decisions


def prefill_topk(engine, built, problem):
    """A prefill's top-k wrote to the same buffer, in the same pass."""
    rows = engine.problem(prefill=((900, 4),))
    context = sys.modules["vllm.forward_context"].get_forward_context()
    context.attn_metadata = {name: rows.metadata for name in context.attn_metadata}
    layer = engine.layer(rows, topk_indices_buffer=problem.buffer)
    layer(rows.hidden, rows.query, None, rows.weights)


def decode_topk(engine, built, problem):
    """Another layer's, with a buffer of its own."""
    rows = engine.problem(decode=(900, 4))
    context = sys.modules["vllm.forward_context"].get_forward_context()
    context.attn_metadata = {name: rows.metadata for name in context.attn_metadata}
    select(engine.layer(rows), rows)


BETWEEN = {"vLLM's": upstream_topk, "of a prefill": prefill_topk, "of a decode": decode_topk}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_another_top_k_after_it_voids_it(engine, run, attention, on, between):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90), engine.config():
        built = engine.layer(problem)
        with engine.forward(problem):
            select(built, problem)
            between(engine, built, problem)
            attention.decode(problem)
    assert attention.transforms == 1 and "topk.slots.taken" not in counters()


def test_once_and_in_its_own_pass(engine, run, attention, on):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90):
        built = run.build(problem)
        with engine.forward(problem):
            select(built, problem)
            attention.decode(problem)
            attention.decode(problem)  # the host cannot know that the indices are unchanged
        assert attention.transforms == 1
        with engine.forward(problem):
            select(built, problem)
        with engine.forward(problem):  # 0.33 fills short contexts by a kernel, without a top-k
            problem.buffer[:2] = torch.arange(problem.buffer.shape[1], dtype=torch.int32)
            got, counts = attention.decode(problem)
            want = attention.original(**attention.arguments(problem))
        assert attention.transforms == 3
        assert torch.equal(got, want[0]) and torch.equal(counts, want[1])
        with engine.forward(problem):
            select(built, problem)
        attention.decode(problem)  # outside of any pass
        assert attention.transforms == 4
    assert counters()["topk.slots.taken"] == 1


def test_a_note_is_the_threads_own(engine, run, attention, on):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90), engine.forward(problem):
        select(run.build(problem), problem)
        thread = threading.Thread(target=attention.decode, args=(problem,))
        thread.start()
        thread.join()
        assert attention.transforms == 1
        attention.decode(problem)
        assert attention.transforms == 1 and counters()["topk.slots.taken"] == 1


def test_an_indexer_with_a_table_of_its_own_is_left_alone(engine, run, attention, on):
    """Hopper flattens next_n 3: a row of the table for each token, in a buffer of the indexer's."""
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90):
        built = run.build(problem)
        for _ in range(3):
            with engine.forward(problem):
                select(built, problem)
                attention.decode(problem, **expanded(problem))
    assert attention.transforms == 3
    assert counters()["topk.slots"] == 1 and counters()["topk.decode"] == 3  # learnt at the first


def test_nobody_asks(engine, run, attention, on):
    """An attention that needs no slots: after some calls none are written."""
    problem = engine.problem(decode=(700,))
    with engine.gpu(90):
        built = run.build(problem)
        for _ in range(slots.PATIENCE + 3):
            with engine.forward(problem):
                select(built, problem)
    assert counters()["topk.slots"] == slots.PATIENCE


def test_more_rows_than_a_batch_has(engine, run, attention, on, monkeypatch):
    """The buffers have the rows that a decode batch can have; a larger call goes without."""
    from dsv4_plugin.engines.vllm import policy

    monkeypatch.setattr(policy, "_decode_rows", lambda config, most: 1)
    problem = engine.problem(decode=(700, 1500))
    through(engine, run, attention, problem)
    assert attention.transforms == 1 and "topk.slots" not in counters()


def test_a_failure_leaves_nothing_to_take(engine, run, attention, on, monkeypatch):
    problem = engine.problem(decode=(700, 1500))
    want, want_counts = through(engine, run, attention, problem)
    monkeypatch.setattr("dsv4_plugin.topk", lambda *a, **k: 1 / 0)
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    got, counts = through(engine, run, attention, problem)
    assert attention.transforms == 1 and "topk" in adapter.current().off
    assert torch.equal(counts, want_counts) and got.shape == want.shape
    assert "switched off" in seam()["why"]


def test_not_deepseek_v4(engine, run, attention, on):
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90):
        built = run.build(problem, model="deepseek_v32")
        with engine.forward(problem):
            select(built, problem)
            attention.decode(problem)
    assert attention.transforms == 1 and "topk.slots" not in counters()
    assert not seam()["engaged"] and "neither DeepSeek-V4's nor V4.1's" in seam()["why"]


def specs(layers):
    """The cache specs of a DeepSeek-V4 with this many layers, by the release's own methods."""
    from vllm.models.deepseek_v4 import attention as v4
    from vllm.models.deepseek_v4 import compressor
    from vllm.v1.attention.backends.mla.sparse_swa import DeepseekV4SWACache

    cache = types.SimpleNamespace(block_size=256, cache_dtype="fp8_ds_mla")
    config = types.SimpleNamespace(cache_config=cache)

    def spec(cls, **values):
        values = {"dtype": torch.uint8, "cache_config": cache, **values}
        values |= {"bounded_replay": False, "packed_bytes_per_token": 584}
        values |= {"packed_page_alignment": 576, "packed_block_stride_alignment": None}
        return cls.get_kv_cache_spec(types.SimpleNamespace(**values), config)

    def state(ratio, width, block):
        window = (2 if ratio == 4 else 1) * ratio
        return spec(compressor.CompressorStateCache, dtype=torch.float32, state_dim=width,
                    sliding_window=window, block_size=block)  # fmt: skip

    found = {}
    for i in range(layers):
        name = f"model.layers.{i}.attn"
        ratio = 1 if i < 2 else 4 if i % 2 == 0 else 128
        if ratio == 4:
            found[f"{name}.indexer.k_cache"] = spec(
                v4.DeepseekV4IndexerCache, head_dim=132, compress_ratio=4
            )
            found[f"{name}.indexer.compressor.state_cache"] = state(4, 2 * 128 * 2, 4)
        found[f"{name}.swa_cache"] = spec(
            DeepseekV4SWACache, head_dim=512, window_size=128, block_size=64
        )
        if ratio > 1:
            found[name] = spec(
                v4.DeepseekV4Attention, head_dim=512, compress_ratio=ratio,
                kv_cache_dtype="fp8_ds_mla",
            )  # fmt: skip
            found[f"{name}.compressor.state_cache"] = (
                state(4, 2 * 512 * 2, 4) if ratio == 4 else state(128, 512 * 2, 8)
            )
    return found


@pytest.mark.parametrize("layers", [6, 43, 61])
def test_an_indexer_and_its_attention_are_of_one_cache_group(engine, layers):
    """vLLM's runner passes both layers of a group the same block table; compare its address."""
    from vllm.v1.core import kv_cache_utils

    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:
        planning = kv_cache_utils
    layout = types.SimpleNamespace(is_block_outermost=True)
    config = types.SimpleNamespace(
        scheduler_config=types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=types.SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
        attention_config=None,
    )
    groups = planning.get_kv_cache_groups(config, specs(layers))
    of = {name: i for i, group in enumerate(groups) for name in group.layer_names}
    indexers = [name for name in of if name.endswith(".indexer.k_cache")]
    assert len(indexers) == (layers - 1) // 2 and len(groups) > 1
    for name in indexers:
        assert of[name] == of[name.removesuffix(".indexer.k_cache")]
        assert of[name] != of[name.replace(".indexer.k_cache", ".swa_cache")]


@pytest.mark.parametrize("pcp", [False, True])
def test_prefill_context_parallelism(engine, run, attention, on, pcp):
    problem = engine.problem(decode=(700,))
    with engine.gpu(90), engine.config():
        layer = engine.layer(problem)
        layer.use_pcp = pcp
        from dsv4_plugin.engines.vllm import policy

        policy.built(layer)
    assert seam()["engaged"] is not pcp


def test_the_patch_comes_and_goes(engine, run, attention, on):
    original = vars(attention.module)[TO_SLOTS]
    assert not hasattr(original, "__wrapped__") and seam()["where"] and not seam()["engaged"]
    run.build(engine.problem(decode=(700,)))
    patched = vars(attention.module)[TO_SLOTS]
    assert patched.__wrapped__ is original and seam()["engaged"]
    run.build(engine.problem(decode=(700,)))
    assert vars(attention.module)[TO_SLOTS] is patched
    unregister()
    assert vars(attention.module)[TO_SLOTS] is original
    register()
    run.build(engine.problem(decode=(700,)))
    assert vars(attention.module)[TO_SLOTS].__wrapped__ is original


@pytest.mark.parametrize("gone", [True, False])
def test_a_seam_that_is_missing_or_other(engine, run, attention, on, monkeypatch, gone):
    """The plugin still selects; vLLM's attention is untouched."""
    if gone:
        monkeypatch.delitem(vars(attention.module), TO_SLOTS)
    else:
        monkeypatch.setattr(attention.module, TO_SLOTS, lambda topk_indices, block_table: None)
    before = vars(attention.module).get(TO_SLOTS)
    problem = engine.problem(decode=(700, 1500))
    with engine.gpu(90):
        built = run.build(problem)
        with engine.forward(problem):
            select(built, problem)
    assert vars(attention.module).get(TO_SLOTS) is before
    assert not seam()["engaged"] and TO_SLOTS in seam()["why"]
    assert counters()["topk.decode"] == 1 and "topk.slots" not in counters()


def test_a_source_without_it_is_one_line(engine, monkeypatch, caplog):
    from dsv4_plugin.engines.vllm import install, probe

    unregister()
    other = moved(probe.SEAMS, "topk.slots", attribute="slots_of_tomorrow")
    monkeypatch.setattr(install, "SEAMS", other)
    caplog.clear()
    register()
    lines = [r.message for r in caplog.records if "the engine's own code stays at" in r.message]
    assert len(lines) == 1 and "topk.slots" in lines[0] and "slots_of_tomorrow" in lines[0]
    assert seam()["where"] is None
    monkeypatch.undo()


def test_somebody_else_patched_it(engine, run, attention, on, monkeypatch):
    problem = engine.problem(decode=(700, 1500))
    run.build(problem)
    patched = vars(attention.module)[TO_SLOTS]
    other = lambda *a, **k: patched(*a, **k)  # noqa: E731
    monkeypatch.setattr(attention.module, TO_SLOTS, other)
    run.build(problem)
    assert "other code" in seam()["why"] and not adapter.current().decision.selection.slots
    unregister()
    assert vars(attention.module)[TO_SLOTS] is other
    monkeypatch.undo()
