"""The plugin's logits in place of DeepGEMM's: use, answers, fallback, refusals with reasons."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from case_calls import BATCHES, UPSTREAM_TOPK, batches, names
from conftest import another_reader

import dsv4_plugin
from dsv4_plugin.errors import UnmetError

MIXED = BATCHES["mixed"]
LATER = BATCHES["prefill, a later request longer than k"]


def logits(engine):
    return [c for c in engine.calls if c.logits is not None]


def scores(engine):
    """The scores of every row's window, decode first, in whatever columns they are."""
    return [
        row[begin:end].float()
        for name in ("paged_logits", "dense_logits")
        for call in logits(engine)
        if call.name == name
        for row, (begin, end) in zip(call.logits, call.spans, strict=True)
    ]


@pytest.fixture
def plugin_logits(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", "plugin")


@batches
def test_plugin_logits_are_deepgemms_rounded(engine, run, batch, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    problem = engine.problem(**batch)
    run(problem)
    assert not any(c.by_plugin for c in logits(engine))
    by_engine = scores(engine)
    monkeypatch.delenv("DSV4_TOPK")
    monkeypatch.setenv("DSV4_LOGITS", "plugin")
    got = run(problem)
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.bfloat16, True)}
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK
    for a, b in zip(scores(engine), by_engine, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert bool(((a - b).abs() <= 2**-8 * b.abs() + 1e-5 * b.abs().max()).all())
    counters = dsv4_plugin.status()["counters"]
    parts = bool(batch.get("decode")) + bool(batch.get("prefill"))
    assert counters["logits.plugin"] == counters["logits.plugin.bf16.torch"] == parts
    assert counters["logits.upstream"] == parts  # of the first run
    assert "logits.bf16" not in counters


@pytest.mark.parametrize(
    "topk,model,dtype",
    [
        ("auto", "deepseek_v32", torch.float32),
        ("fp32", "deepseek_v4", torch.float32),
        ("fp16", "deepseek_v4", torch.float16),
    ],
)
def test_other_dtypes(engine, run, plugin_logits, monkeypatch, topk, model, dtype):
    monkeypatch.setenv("DSV4_TOPK", topk)
    problem = engine.problem(**MIXED)
    got = run(problem, model=model)
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(dtype, True)}
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK


@pytest.mark.parametrize(
    "topk,dtype,by_plugin",
    [
        ("auto", torch.bfloat16, True),
        ("bf16", torch.bfloat16, True),
        ("fp16", torch.float16, True),
        ("fp32", torch.float32, False),
    ],
)
def test_whose_they_are_where_nobody_says(engine, run, monkeypatch, topk, dtype, by_plugin):
    """Ours in 16 bits, whatever DeepGEMM can; the engine's in float32."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", topk)
    problem = engine.problem(**MIXED)
    got = run(problem)
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(dtype, by_plugin)}
    assert torch.equal(got, engine.expected(problem.k))


def test_v32_calls_past_the_layer(engine, run, plugin_logits):
    problem = engine.problem(**MIXED)
    got = run(problem, model="deepseek_v32", direct=True)
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.float32, True)}
    assert torch.equal(got, engine.expected(problem.k))


def test_the_line_says_whose_logits(engine, run, plugin_logits, caplog):
    run.build(engine.problem(**MIXED))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert "bf16 by torch on the plugin's bf16 logits" in line
    assert dsv4_plugin.status()["seams"]["logits"]["engaged"]


def test_engine_logits_on_this_release(engine, run, monkeypatch, can_bf16):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    problem = engine.problem(**MIXED)
    got = run(problem)
    dtype = torch.bfloat16 if can_bf16 else torch.float32
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(dtype, False)}
    assert torch.equal(got, engine.expected(problem.k))


# --- the plugin's logits fail --------------------------------------------------------------------


def broken(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("batch", [MIXED, LATER], ids=["mixed", "prefill"])
def test_logits_that_fail_cost_no_request(engine, run, plugin_logits, monkeypatch, caplog, batch):
    monkeypatch.setattr("dsv4_plugin.ops.logits.paged_logits", broken)
    monkeypatch.setattr("dsv4_plugin.ops.logits.ragged_logits", broken)
    problem = engine.problem(**batch)
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        for _ in range(2):
            engine.calls.clear()
            got = engine.step(layer, problem)
            assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.float32, False)}
            assert torch.equal(got.sort(1).values, engine.expected(problem.k).sort(1).values)
            assert names(engine) & UPSTREAM_TOPK
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1 and "no kernel image" in errors[0]
    assert "no kernel image" in dsv4_plugin.status()["seams"]["logits"]["why"]


def test_logits_that_fail_under_strict_are_an_error(engine, run, plugin_logits, monkeypatch):
    monkeypatch.setenv("DSV4_STRICT", "1")
    monkeypatch.setattr("dsv4_plugin.ops.logits.paged_logits", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(engine.problem(decode=(700, 40)))


@pytest.mark.parametrize("batch", [MIXED, LATER], ids=["mixed", "prefill"])
def test_a_topk_that_fails_leaves_logits_that_upstream_reads(
    engine, run, plugin_logits, monkeypatch, batch
):
    """Widened, and in the columns that the release expects."""
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem(**batch)
    got = run(problem)
    assert logits(engine)[0].by_plugin
    for mine, exact, row in zip(got, engine.expected(problem.k), scores(engine), strict=True):
        mine, exact = mine[mine >= 0].long(), exact[exact >= 0].long()
        assert mine.unique().numel() == exact.numel()
        assert torch.equal(row[mine].sort().values, row[exact].sort().values)
    assert names(engine) & UPSTREAM_TOPK


def refused_once(monkeypatch, name):
    real = getattr(sys.modules["dsv4_plugin.ops.logits"], name)
    answers = [UnmetError("backend 'cuda' for paged_logits", ["q has 8 heads"])]

    def refuses(*args, **kwargs):
        if answers:
            raise answers.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(f"dsv4_plugin.ops.logits.{name}", refuses)


@pytest.mark.parametrize("topk", ["auto", "bf16", "fp16"])
@pytest.mark.parametrize(
    "op,batch", [("paged_logits", {"decode": (700, 40)}), ("ragged_logits", LATER)]
)
def test_a_call_the_plugin_does_not_take_is_deepgemms(engine, run, monkeypatch, topk, op, batch):
    """Without an explicit setting: DeepGEMM serves this call in float32, the plugin the next.

    Also where DeepGEMM could write bfloat16: it is asked where that was decided, and only there.
    """
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", topk)
    refused_once(monkeypatch, op)
    problem = engine.problem(**batch)
    half = torch.float16 if topk == "fp16" else torch.bfloat16
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        for dtype, by_plugin in ((torch.float32, False), (half, True)):
            engine.calls.clear()
            got = engine.step(layer, problem)
            assert [(c.dtype, c.by_plugin) for c in logits(engine)] == [(dtype, by_plugin)]
            assert torch.equal(got.sort(1).values, engine.expected(problem.k).sort(1).values)
            assert not names(engine) & UPSTREAM_TOPK


def test_a_call_the_plugin_does_not_take_is_an_error_where_it_was_asked_for(
    engine, run, plugin_logits, monkeypatch
):
    refused_once(monkeypatch, "paged_logits")
    with pytest.raises(UnmetError, match="q has 8 heads"):
        run(engine.problem(decode=(700, 40)))


def test_other_forms_are_deepgemms(engine, run, plugin_logits):
    """A scale beside the queries, indices, cleaned logits: forms that the plugin does not take."""
    problem = engine.problem(decode=(700, 40))
    decode = problem.metadata.decode
    q = problem.query[:, None]
    rest = (problem.cache.unsqueeze(2), problem.weights, decode.seq_lens, decode.block_table,
            decode.schedule_metadata, problem.max_model_len)  # fmt: skip
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        call = engine.indexer.fp8_fp4_paged_mqa_logits
        clean = {} if hasattr(engine.indexer, "as_fp32_logits") else {"clean_logits": False}
        engine.calls.clear()
        call((q, None), *rest, **clean)
        call((q, torch.zeros(2)), *rest, **clean)
        other = {"clean_logits": True} if clean else {"indices": torch.zeros(2, dtype=torch.int32)}
        call((q, None), *rest, **other)
        assert [c.by_plugin for c in logits(engine)] == [True, False, False]
    del layer


def test_plugin_logits_are_not_written_once_their_reader_was_replaced(engine, run, plugin_logits):
    problem = engine.problem(**LATER)
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        with another_reader():
            engine.calls.clear()
            got = engine.step(layer, problem)
            assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.float32, False)}
            assert torch.equal(got.sort(1).values, engine.expected(problem.k).sort(1).values)


# --- what cannot be met --------------------------------------------------------------------------


def test_plugin_logits_that_cannot_be_met_list_everything(engine, run, plugin_logits, monkeypatch):
    from dsv4_plugin.kernels import cuda

    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    monkeypatch.setattr(cuda, "missing", lambda: "the library is not there")
    with pytest.raises(UnmetError) as caught:
        run.build(engine.problem(decode=(700,), k=256), layer={"use_fp4_cache": True})
    assert caught.value.wish == "DSV4_LOGITS=plugin"
    for part in ("index_topk is 256", "MXFP4", "plugin's logits by cuda: the tensors are on cpu",
                 "plugin's logits by cuda: the library is not there"):  # fmt: skip
        assert part in str(caught.value)
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    with pytest.raises(UnmetError, match="DSV4_TOPK=bf16, DSV4_LOGITS=plugin"):
        run.build(engine.problem(**MIXED))


def test_plugin_logits_and_no_topk_contradict(engine, run, plugin_logits, monkeypatch):
    monkeypatch.setenv("DSV4_TOPK", "off")
    with pytest.raises(UnmetError, match="DSV4_TOPK=off leaves the logits to the engine"):
        run.build(engine.problem(**MIXED))


@batches
def test_auto_is_deepgemms_where_the_plugin_cannot(
    engine, run, monkeypatch, caplog, can_bf16, no_plugin_logits, batch
):
    """bfloat16 where DeepGEMM writes it; if neither can: float32, and the reasons of both."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**batch)
    got = run(problem)
    dtype = torch.bfloat16 if can_bf16 else torch.float32
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(dtype, False)}
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK
    counters = dsv4_plugin.status()["counters"]
    assert "logits.plugin" not in counters and bool(counters.get("logits.bf16")) is can_bf16
    seam = dsv4_plugin.status()["seams"]["logits"]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert seam["engaged"] is can_bf16
    if can_bf16:
        assert "bf16 by torch on the engine's bf16 logits" in line
        return
    for part in ("takes no logits_dtype", "plugin's logits by torch: the library is not there"):
        assert part in seam["why"] and part in line


def test_bf16_where_the_plugin_cannot(engine, run, monkeypatch, can_bf16, no_plugin_logits):
    """An explicit dtype: DeepGEMM's, or one error with the reasons of both."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    problem = engine.problem(**MIXED)
    if can_bf16:
        run(problem)
        assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.bfloat16, False)}
        return
    with pytest.raises(UnmetError, match="takes no logits_dtype") as caught:
        run.build(problem)
    assert "plugin's logits by torch: the library is not there" in caught.value.unmet


def test_additional_config(engine, run):
    problem = engine.problem(**MIXED)
    run(problem, config={"dsv4": {"logits": "plugin"}})
    assert {(c.dtype, c.by_plugin) for c in logits(engine)} == {(torch.bfloat16, True)}
