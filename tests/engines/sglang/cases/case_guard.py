"""The decision at the first call, its log lines, and settings that cannot be met."""

from __future__ import annotations

import logging
import types

import pytest
import torch
from case_calls import whose
from conftest import SINCE, expected, names
from kits.engine_parts import canonical
from kits.told import check_warned, empty_settings, odd_settings

import dsv4_plugin
from dsv4_plugin.engines.shared import aside
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.state import state


def lines(caplog, level=logging.INFO):
    return [
        r.getMessage() for r in caplog.records if r.name == "dsv4_plugin" and r.levelno == level
    ]


def decide(engine, k=512, device="cpu", fp4=False, backend=None):
    from dsv4_plugin.engines.sglang import policy

    layer = types.SimpleNamespace(index_topk=k, use_fp4_indexer=fp4)
    owner = types.SimpleNamespace(dsa_topk_backend=backend)
    return policy.for_v4(owner, layer, torch.device(device))


@whose
def test_one_active_line(engine, load, caplog, whose):
    load(DSV4_LOGITS=whose)
    problem = engine.problem()
    engine.step(problem, twice=True)
    engine.step(problem)
    (line,) = [line for line in lines(caplog) if "active" in line]
    assert line.startswith(f"dsv4 active in SGLang {engine.version}, DeepSeek-V4 indexer, k 512")
    assert f"bf16 by torch on the {'plugin' if whose == 'auto' else 'engine'}'s bf16 logits" in line
    seams = dsv4_plugin.status()["seams"]
    assert {name for name, seam in seams.items() if seam["engaged"]} == {
        "flag", "forward", "topk.paged", "logits", *(["budget"] if engine.version >= SINCE else []),
    }  # fmt: skip


def test_nothing_is_said_when_nobody_asked(engine, load, caplog):
    load(DSV4_PLUGIN="")
    engine.step(engine.problem())
    assert lines(caplog) == []


@odd_settings
def test_not_asked_for_is_inert_whatever_a_variable_holds(engine, load, caplog, variable, value):
    load(**{"DSV4_PLUGIN": "", variable: value})
    problem = engine.problem()
    out = engine.step(problem)
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert names(engine) & {"topk_v1", "topk_v2"}  # SGLang's own selected
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    check_warned(caplog, variable, value)


@empty_settings
def test_an_empty_variable_is_unset(engine, load, variable):
    load(**{variable: ""})
    engine.step(engine.problem())
    assert dsv4_plugin.status()["counters"]["topk.paged"] == 1


def test_without_bfloat16_in_deepgemm_the_engine_means_float32(engine, load, caplog):
    load(DSV4_LOGITS="engine")
    engine.install_deep_gemm(has_logits_dtype=False)
    problem = engine.problem()
    out = engine.step(problem)
    assert engine.logits_of().dtype == torch.float32
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert any("takes no logits_dtype" in line for line in lines(caplog))
    assert dsv4_plugin.status()["seams"]["logits"]["engaged"] is False


def test_without_bfloat16_in_deepgemm_bf16_is_one_error(engine, load):
    load(DSV4_TOPK="bf16", DSV4_LOGITS="engine")
    engine.install_deep_gemm(has_logits_dtype=False)
    with pytest.raises(UnmetError) as caught:
        engine.step(engine.problem(k=256))
    assert caught.value.wish == "DSV4_TOPK=bf16"
    text = str(caught.value)
    assert "index_topk is 256" in text and "takes no logits_dtype" in text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"DSV4_TOPK": "fp16", "DSV4_LOGITS": "engine"}, ["float32 or bfloat16 only"]),
        ({"DSV4_TOPK": "bf16", "DSV4_INDEXER_READ": "triton"}, ["DSV4_INDEXER_READ=triton"]),
        ({"DSV4_BACKEND": "cuda"}, ["backend cuda", "not on a CUDA device"]),
        ({"DSV4_BACKEND": "cuda", "DSV4_STRICT": "1"}, ["DSV4_STRICT=1", "backend cuda"]),
    ],
)
def test_a_wish_that_cannot_be_met(engine, load, settings, words):
    load(**settings)
    with pytest.raises(UnmetError) as caught:
        engine.step(engine.problem())
    assert all(word in str(caught.value) for word in words)


def test_a_wrong_setting_is_an_error_at_the_first_call(engine, load, caplog):
    load(DSV4_TOPK="bf61")  # register() has only said it
    assert any("DSV4_TOPK is 'bf61'" in line for line in lines(caplog, logging.WARNING))
    with pytest.raises(SettingError, match="DSV4_TOPK"):
        engine.step(engine.problem())


def test_off_is_upstream(engine, load, caplog):
    load(DSV4_TOPK="off")
    engine.step(engine.problem())
    assert "topk_v2" in names(engine)
    assert any("DSV4_TOPK=off" in line for line in lines(caplog))


def test_another_dsa_backend_keeps_its_hands(engine, load, caplog):
    mixin = engine.indexer.C4IndexerBackendMixin()
    if not hasattr(mixin, "dsa_topk_backend"):  # before 0.5.17 there is one backend only
        assert engine.version.startswith("0.5.16")
        return
    load()
    problem = engine.problem()
    out = engine.step(problem, backend=engine.dsa.DSATopKBackend.TORCH)
    assert engine.logits_of().dtype == torch.float32
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    counters = dsv4_plugin.status()["counters"]
    assert not {"topk.paged", "logits.bf16", "logits.plugin"} & set(counters)
    assert any("--dsa-topk-backend is torch" in line for line in lines(caplog))


def test_another_dsa_backend_and_an_explicit_wish_are_an_error(engine, load):
    load(DSV4_TOPK="bf16")
    with pytest.raises(UnmetError, match="--dsa-topk-backend is flashinfer"):
        decide(engine, backend=engine.dsa.DSATopKBackend.FLASHINFER)


def test_an_mxfp4_cache_is_upstreams(engine, load, caplog):
    load()
    assert decide(engine, fp4=True) is None
    assert any("MXFP4" in line for line in lines(caplog))
    plain = engine.pristine[engine.deep_gemm, "fp8_mqa_logits"]
    assert engine.deep_gemm.fp8_mqa_logits is plain  # nothing of DeepGEMM is wrapped for it


def test_a_draft_model_has_a_decision_of_its_own(engine, load):
    load()
    assert decide(engine, backend=engine.dsa.DSATopKBackend.TORCH) is None
    assert decide(engine, backend=engine.dsa.DSATopKBackend.SGL_KERNEL).dtype == "bf16"


@pytest.mark.parametrize(
    "switch", ["SGLANG_OPT_USE_TILELANG_INDEXER", "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH"]
)
def test_logits_made_elsewhere_are_float32(engine, load, switch, caplog):
    load()
    variable = getattr(engine.envs, switch)
    variable.set(True)
    try:
        assert decide(engine).dtype == "fp32"
    finally:
        variable.set(False)
    assert any(switch in line for line in lines(caplog))


def test_v32_is_never_bfloat16(engine, load):
    load(DSV4_TOPK="bf16")
    problem = engine.problem((1500, 3))
    with pytest.raises(UnmetError, match="select on float32 logits"):
        engine.dsa_step(torch.randn(2, 1536), problem)


# --- on a GPU, as far as the decision goes ---------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretends to be a CUDA device: its compute capability, and the reasons of backends and ops."""
    from dsv4_plugin.engines.sglang import policy

    answers = {"capability": (9, 0), "unmet": {}}
    monkeypatch.setattr(policy.backends, "capability", lambda device: answers["capability"])
    monkeypatch.setattr(
        policy.backends,
        "unmet",
        lambda call, backend: answers["unmet"].get(call.op) or answers["unmet"].get(backend, []),
    )
    return answers


@pytest.mark.parametrize(
    "whose,missing,want",
    [
        ("auto", {}, (False, "plugin")),
        ("engine", {}, (True, "engine")),
        ("auto", {"paged_logits": ["no such kernel"]}, (True, "engine")),
        ("auto", {"ragged_logits": ["no such kernel"]}, (True, "engine")),
    ],
)
def test_on_hopper_with_kernels(engine, load, on_gpu, whose, missing, want):
    """The plugin's logits if it has both, because decode and prefill share a decision."""
    on_gpu["unmet"] = missing
    load(DSV4_LOGITS=whose)
    topk = decide(engine, device="cuda:0")
    assert (topk.dtype, topk.backend, topk.request_bf16, topk.logits) == (
        "bf16",
        "cuda",
        *want,
    )


def test_on_hopper_without_kernels_auto_never_takes_torch(engine, load, on_gpu, caplog):
    on_gpu["unmet"] = {"cuda": ["the compiled library is not there"]}
    load()
    assert decide(engine, device="cuda:0") is None
    assert any("the compiled library is not there" in line for line in lines(caplog))


def test_on_hopper_torch_where_it_is_asked_for(engine, load, on_gpu):
    on_gpu["unmet"] = {"cuda": ["the compiled library is not there"]}
    load(DSV4_BACKEND="torch")
    assert decide(engine, device="cuda:0").backend == "torch"


def test_on_another_gpu_every_reason_is_listed(engine, load, on_gpu):
    on_gpu.update(capability=(8, 0), unmet={"cuda": ["compute capability 8.0"]})
    load(DSV4_TOPK="bf16")
    with pytest.raises(UnmetError) as caught:
        decide(engine, k=256, device="cuda:0")
    assert len(caught.value.unmet) == 4
    assert "plugin's logits by cuda: compute capability 8.0" in caught.value.unmet


# --- our own op or DeepGEMM fails ------------------------------------------------------------


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("topk,logits", [("bf16", "auto"), ("bf16", "engine"), ("fp32", "auto")])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_an_op_that_raises(engine, load, monkeypatch, caplog, topk, logits, v2, prefill):
    """SGLang serves the same call, on its existing logits; the next call has float32 again."""
    load(DSV4_TOPK=topk, DSV4_LOGITS=logits)
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem((600, 1100, 1500), raw=True, prefill=prefill)
    out = engine.step(problem, v2=v2)
    # Upstream's kernels promise no order among equals, and rounded scores have many.
    scores = engine.logits_of().logits.float().nan_to_num(-1e9)
    got, want = (scores.gather(1, i.long()) for i in (problem.raw, expected(engine, problem)))
    assert torch.equal(got.sort(1).values, want.sort(1).values)
    assert torch.equal(problem.slots(problem.raw), out)
    assert [c.dtype for c in engine.calls if c.name.startswith("topk")] == [torch.float32]
    engine.calls.clear()
    engine.step(problem, v2=v2)
    assert (engine.logits_of().dtype, engine.logits_of().by_plugin) == (torch.float32, False)
    errors = lines(caplog, logging.ERROR)
    assert len(errors) == 1 and "no such kernel image" in errors[0]
    assert "SGLang" in errors[0]
    assert "no such kernel image" in dsv4_plugin.status()["seams"]["topk.paged"]["why"]
    assert dsv4_plugin.status()["counters"]["topk.paged.upstream"] == 2


def broken(*args, **kwargs):
    raise RuntimeError("no such kernel image")


def test_an_op_that_raises_in_dsa(engine, load, monkeypatch, caplog):
    load()
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem((1500, 3))
    got = engine.dsa_step(torch.randn(2, 1536), problem)
    assert [(row >= 0).sum().item() for row in got] == [512, 3]
    assert names(engine) == {"topk_v2"}
    assert len(lines(caplog, logging.ERROR)) == 1


def test_strict_raises_instead(engine, load, monkeypatch):
    load(DSV4_STRICT="1")
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    with pytest.raises(RuntimeError, match="no such kernel image"):
        engine.step(engine.problem())


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@whose
def test_a_deepgemm_that_fails_on_bfloat16(engine, load, caplog, monkeypatch, whose, prefill):
    """It is asked once. The plugin's kernel or DeepGEMM's float32 follow; the top-k stays on."""
    monkeypatch.setattr(aside, "BACKENDS", ("torch",))  # `auto` leaves prefill to DeepGEMM
    load(DSV4_LOGITS=whose)
    engine.maths.fail_on_bf16 = True
    problem = engine.problem((600, 1100, 1500), prefill=prefill)
    for _ in range(2):
        engine.calls.clear()
        out = engine.step(problem)
        assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
        wrote = engine.logits_of()
        auto = whose == "auto"
        assert (wrote.dtype, wrote.by_plugin) == (torch.bfloat16 if auto else torch.float32, auto)
        assert not names(engine) & {"topk_v1", "topk_v2"}
    asked = whose == "engine" or prefill  # at decode `auto` is the plugin's from the start
    said = lines(caplog, logging.ERROR)
    assert len(said) == asked and all("bf16 logits failed at a call" in line for line in said)
    assert list(state.report()["failures"]) == ["logits.bf16"] * asked
    assert state.report()["counters"]["topk.paged"] == 2


def test_a_deepgemm_that_fails_on_bfloat16_strictly(engine, load):
    load(DSV4_STRICT="1", DSV4_LOGITS="engine")
    engine.maths.fail_on_bf16 = True
    with pytest.raises(RuntimeError, match="cannot compile"):
        engine.step(engine.problem())


def test_a_call_the_plugin_does_not_read_is_the_engines(engine, load, caplog):
    """Other strides than we take: one call upstream, and nothing is switched off."""
    load(DSV4_TOPK="fp32")
    problem = engine.problem((700, 40))
    problem.table = problem.table.to(torch.int64)
    out = engine.step(problem)
    assert "topk_v2" in names(engine)
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert lines(caplog, logging.ERROR) == []
