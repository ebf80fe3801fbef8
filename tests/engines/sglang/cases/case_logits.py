"""The plugin's logits in place of DeepGEMM's: use, answers, fallback, refusals with reasons."""

from __future__ import annotations

import pytest
import torch
from case_calls import UPSTREAM, batches, counters, v2
from case_guard import lines
from conftest import expected, names
from kits.engine_parts import canonical

import dsv4_plugin
from dsv4_plugin.errors import UnmetError

can_bf16 = pytest.mark.parametrize(
    "can_bf16", [False, True], ids=["DeepGEMM in float32", "DeepGEMM in bfloat16"]
)


def check(engine, problem, out, dtype, by_plugin):
    call = engine.logits_of()
    assert (call.dtype, call.by_plugin) == (dtype, by_plugin)
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))


@batches
@v2
def test_plugin_logits_are_deepgemms_rounded(engine, load, batch, v2):
    load(DSV4_TOPK="fp32")
    problem = engine.problem(**batch)
    engine.step(problem, v2=v2)
    engine_call = engine.logits_of()
    assert not engine_call.by_plugin
    load(DSV4_LOGITS="plugin", DSV4_TOPK="auto")
    from dsv4_plugin.engines.shared import adapter

    adapter.current().forget_decisions()
    dsv4_plugin.state.state.counters.clear()
    engine.calls.clear()
    out = engine.step(problem, v2=v2)
    check(engine, problem, out, torch.bfloat16, True)
    assert not names(engine) & UPSTREAM
    assert counters() == {
        "logits.plugin": 1, "logits.plugin.bf16.torch": 1, "topk.paged": 1,
        "topk.paged.bf16.torch": 1,
    }  # fmt: skip
    plugin_call = engine.logits_of()
    assert plugin_call.spans == engine_call.spans
    for a, b, (begin, end) in zip(
        plugin_call.logits, engine_call.logits, plugin_call.spans, strict=True
    ):
        a, b = a[begin:end].float(), b[begin:end]
        if b.numel():
            assert bool(((a - b).abs() <= 2**-8 * b.abs() + 1e-5 * b.abs().max()).all())


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@can_bf16
def test_auto_is_the_plugin(engine, load, caplog, prefill, can_bf16):
    load()
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    problem = engine.problem((600, 1100, 1500), prefill=prefill)
    check(engine, problem, engine.step(problem), torch.bfloat16, True)
    (line,) = [line for line in lines(caplog) if "active" in line]
    assert "bf16 by torch on the plugin's bf16 logits" in line
    assert dsv4_plugin.status()["seams"]["logits"]["engaged"]


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@can_bf16
def test_auto_is_deepgemms_where_the_plugin_cannot(
    engine, load, caplog, no_plugin_logits, prefill, can_bf16
):
    """In bfloat16 where it writes that, else in float32, and the line has both reasons."""
    load()
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    problem = engine.problem((600, 1100, 1500), prefill=prefill)
    dtype = torch.bfloat16 if can_bf16 else torch.float32
    check(engine, problem, engine.step(problem), dtype, False)
    assert not names(engine) & UPSTREAM
    assert "logits.plugin" not in counters() and (counters().get("logits.bf16") == 1) is can_bf16
    (line,) = [line for line in lines(caplog) if "active" in line]
    assert dsv4_plugin.status()["seams"]["logits"]["engaged"] is can_bf16
    if can_bf16:
        assert "bf16 by torch on the engine's bf16 logits" in line
        return
    for part in ("takes no logits_dtype", "plugin's logits by torch: the library is not there"):
        assert part in line


def test_bf16_that_nobody_can_write_is_one_error(engine, load, no_plugin_logits):
    load(DSV4_TOPK="bf16")
    engine.install_deep_gemm(has_logits_dtype=False)
    with pytest.raises(UnmetError, match="takes no logits_dtype") as caught:
        engine.step(engine.problem())
    assert "plugin's logits by torch: the library is not there" in caught.value.unmet


@pytest.mark.parametrize("topk,dtype", [("fp32", torch.float32), ("fp16", torch.float16)])
def test_other_dtypes(engine, load, topk, dtype):
    load(DSV4_TOPK=topk, DSV4_LOGITS="plugin")
    problem = engine.problem()
    check(engine, problem, engine.step(problem), dtype, True)


def broken(*args, **kwargs):
    raise RuntimeError("no such kernel image")


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_logits_that_fail_cost_no_request(engine, load, monkeypatch, caplog, prefill):
    import logging

    load(DSV4_LOGITS="plugin")
    monkeypatch.setattr("dsv4_plugin.ops.logits.paged_logits", broken)
    monkeypatch.setattr("dsv4_plugin.ops.logits.ragged_logits", broken)
    problem = engine.problem((600, 1100, 1500), prefill=prefill)
    for _ in range(2):
        engine.calls.clear()
        check(engine, problem, engine.step(problem), torch.float32, False)
        assert "topk_v2" in names(engine)
    assert len(lines(caplog, logging.ERROR)) == 1


def test_logits_that_fail_strictly(engine, load, monkeypatch):
    load(DSV4_LOGITS="plugin", DSV4_STRICT="1")
    monkeypatch.setattr("dsv4_plugin.ops.logits.paged_logits", broken)
    with pytest.raises(RuntimeError, match="no such kernel image"):
        engine.step(engine.problem())


def test_a_topk_that_fails_leaves_logits_that_upstream_reads(engine, load, monkeypatch):
    load(DSV4_LOGITS="plugin")
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem((600, 1100, 1500), raw=True)
    engine.step(problem)
    assert engine.logits_of().by_plugin
    scores = engine.logits_of().logits.float().nan_to_num(-1e9)
    got, want = (scores.gather(1, i.long()) for i in (problem.raw, expected(engine, problem)))
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    assert [c.dtype for c in engine.calls if c.name.startswith("topk")] == [torch.float32]


@pytest.mark.parametrize("asked_for", [False, True], ids=["auto", "plugin"])
@can_bf16
def test_a_call_the_plugin_does_not_take(engine, load, monkeypatch, asked_for, can_bf16):
    """Nobody asked: DeepGEMM's for this call, in float32 in any case. Somebody asked: an error."""
    from dsv4_plugin.ops import logits

    load(DSV4_LOGITS="plugin" if asked_for else "auto")
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    real, answers = logits.paged_logits, [UnmetError("backend 'cuda'", ["q has 8 heads"])]
    monkeypatch.setattr(
        "dsv4_plugin.ops.logits.paged_logits",
        lambda *a, **k: (_ for _ in ()).throw(answers.pop()) if answers else real(*a, **k),
    )
    problem = engine.problem()
    if asked_for:
        with pytest.raises(UnmetError, match="q has 8 heads"):
            engine.step(problem)
        return
    check(engine, problem, engine.step(problem), torch.float32, False)
    assert not names(engine) & UPSTREAM
    check(engine, problem, engine.step(problem), torch.bfloat16, True)


def test_plugin_logits_that_cannot_be_met_list_everything(engine, load, monkeypatch):
    from dsv4_plugin.kernels import cuda

    monkeypatch.setattr(cuda, "missing", lambda: "the library is not there")
    load(DSV4_LOGITS="plugin", DSV4_BACKEND="cuda")
    with pytest.raises(UnmetError) as caught:
        engine.step(engine.problem(k=256))
    assert caught.value.wish == "DSV4_LOGITS=plugin"
    for part in ("index_topk is 256", "plugin's logits by cuda: the tensors are on cpu",
                 "plugin's logits by cuda: the library is not there"):  # fmt: skip
        assert part in str(caught.value)


def test_plugin_logits_elsewhere(engine, load):
    """Logits that SGLang was told to compute by torch do not come past our wrapper."""
    engine.envs.SGLANG_FP8_PAGED_MQA_LOGITS_TORCH.set(True)
    try:
        load(DSV4_LOGITS="plugin")
        with pytest.raises(UnmetError, match="SGLANG_FP8_PAGED_MQA_LOGITS_TORCH"):
            engine.step(engine.problem())
    finally:
        engine.envs.SGLANG_FP8_PAGED_MQA_LOGITS_TORCH.clear()


def test_plugin_logits_have_no_seam_in_dsa(engine, load):
    load(DSV4_LOGITS="plugin")
    with pytest.raises(UnmetError, match="V3.2 and GLM have no seam"):
        engine.dsa_step(torch.randn(2, 1536), engine.problem((1500, 3)))
