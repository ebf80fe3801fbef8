"""Installing, restoring, and the effect of a broken seam or a broken op of the plugin."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys

import pytest
import torch
from case_calls import BATCHES, UPSTREAM_TOPK, names
from conftest import INDEXER, another_reader

import dsv4_plugin
from dsv4_plugin.engines.vllm import register, unregister
from dsv4_plugin.errors import UnmetError

MIXED = BATCHES["mixed"]
whose = pytest.mark.parametrize("whose", ["auto", "engine"])


def places(engine):
    """Every attribute that the plugin may replace, as it is now."""
    ops = sys.modules["vllm._custom_ops"]
    topk = sys.modules.get("vllm.model_executor.layers.indexer_topk")
    found = {
        "init": vars(engine.indexer.SparseAttnIndexer)["__init__"],
        "prefill": ops.top_k_per_row_prefill,
        "gather": ops.cp_gather_indexer_k_quant_cache,
        "paged": engine.indexer.fp8_fp4_paged_mqa_logits,
        "dense": engine.indexer.fp8_fp4_mqa_logits,
        "as_fp32": getattr(engine.indexer, "as_fp32_logits", None),
        "impl paged": engine.deep_gemm_module._fp8_fp4_paged_mqa_logits_impl,
        "impl dense": engine.deep_gemm_module._fp8_fp4_mqa_logits_impl,
    }
    if topk is not None:
        found["forward"] = vars(topk.SparseIndexerTopk)["forward"]
    else:
        found["cooperative"] = torch.ops._C.cooperative_topk
        found["persistent"] = torch.ops._C.persistent_topk
    return found


def test_register_imports_nothing_of_vllm(start):
    assert not start.indexer_loaded
    assert not {name for name in start.imported if name.startswith("vllm.")}


def missing():
    """Seams that a release before DeepSeek-V4.1 does not have."""
    return set() if importlib.util.find_spec("vllm.models.deepseek_v41") else {"candidates"}


def test_the_import_hook_found_every_seam(_engine):
    seams = _engine.after_import["seams"]
    topk = {"topk.decode", "topk.prefill", "topk.slots", "topk.fill"}
    assert set(seams) == topk | {"guard", "logits", "candidates", "gather", "budget", "shard"}
    assert {name for name, seam in seams.items() if not seam["where"]} == missing(), seams
    assert _engine.after_import["engine"] == f"vLLM {_engine.version}"


def test_the_probe_of_the_source_finds_the_same(_engine):
    """The seams that ``dsv4-plugin doctor`` shows, without importing vLLM, are the patched ones."""
    from dsv4_plugin.engines.vllm import probe

    found = {name: vars(site) for name, site in probe.look().items()}
    assert set(found) == set(_engine.after_import["seams"])
    assert {name for name, seam in found.items() if not seam["where"]} == missing(), found
    assert all(bool(seam["where"]) is not bool(seam["why"]) for seam in found.values()), found


def test_the_module_keeps_its_loader_and_source(_engine):
    module = sys.modules[INDEXER]
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    assert module.__spec__.loader is module.__loader__
    assert "exec_module" not in vars(module.__loader__)
    assert "def sparse_attn_indexer" in inspect.getsource(module)
    assert "topk" in inspect.getsource(module.sparse_attn_indexer)


def test_twice_is_once(engine):
    first = places(engine)
    register()
    register()
    second = places(engine)
    assert all(first[name] is second[name] for name in first)


def test_unregister_restores_every_attribute(engine, run, monkeypatch):
    unregister()
    before = places(engine)
    register()
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    run(engine.problem(**MIXED))  # DeepGEMM is wrapped when the first layer is built
    patched = places(engine)
    changed = {name for name in before if patched[name] is not before[name]}
    assert {"init", "prefill", "gather", "paged", "dense"} <= changed
    unregister()
    after = places(engine)
    assert all(after[name] is before[name] for name in before), after
    problem = engine.problem(**MIXED)
    assert torch.equal(run(problem), engine.expected(problem.k))
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}


def test_the_kill_switch_installs_nothing(engine, monkeypatch):
    unregister()
    before = places(engine)
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    register()
    after = places(engine)
    assert all(after[name] is before[name] for name in before)
    assert dsv4_plugin.status()["seams"] == {}


# --- seams that are gone ---------------------------------------------------------------------


def remove(engine, monkeypatch, what):
    ops = sys.modules["vllm._custom_ops"]
    if what == "prefill signature":
        monkeypatch.setattr(ops, "top_k_per_row_prefill", lambda logits, lengths, k: None)
        return "topk.prefill"
    if what == "gather":
        monkeypatch.delattr(ops, "cp_gather_indexer_k_quant_cache")
        return "gather"
    if what == "logits":
        monkeypatch.setattr(engine.indexer, "fp8_fp4_paged_mqa_logits", lambda cache, q: None)
        return "logits"
    if what == "guard":
        monkeypatch.delattr(engine.indexer, "SparseAttnIndexer")
        return "guard"
    topk = sys.modules.get("vllm.model_executor.layers.indexer_topk")
    if topk is not None:
        monkeypatch.setattr(topk.SparseIndexerTopk, "forward", lambda self, logits, rows: None)
    else:
        monkeypatch.setattr(engine.indexer, "sparse_attn_indexer", lambda cache: None)
    return "topk.decode"


@pytest.mark.parametrize("what", ["decode", "prefill signature", "logits", "gather", "guard"])
def test_a_seam_that_is_gone_is_left_alone(engine, monkeypatch, what):
    unregister()
    seam = remove(engine, monkeypatch, what)
    register()
    status = dsv4_plugin.status()["seams"][seam]
    assert status["where"] is None
    assert not status["engaged"]
    assert status["why"]


def test_without_the_prefill_seam_the_topk_stays_upstream(engine, run, monkeypatch):
    ops = sys.modules["vllm._custom_ops"]
    original = ops.top_k_per_row_prefill
    unregister()
    original = ops.top_k_per_row_prefill
    monkeypatch.setattr(ops, "top_k_per_row_prefill", lambda *args: original(*args))
    register()
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**MIXED)
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    assert {"cooperative_topk", "top_k_per_row_prefill"} <= names(engine)
    assert {c.dtype for c in engine.calls if c.logits is not None} == {torch.float32}
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    with pytest.raises(UnmetError, match=r"seam topk\.prefill was not found"):
        run.build(problem)


def test_compiled_ops_of_another_form_are_left_alone(engine, run, monkeypatch):
    """Before 0.30 the compiled ops themselves are the seam; their schema is part of it."""
    if "vllm.model_executor.layers.indexer_topk" in sys.modules:
        forward = sys.modules["vllm.model_executor.layers.indexer_topk"].SparseIndexerTopk.forward
        assert list(inspect.signature(forward).parameters)[1] == "logits"
        return
    shim = vars(torch.ops._C)["persistent_topk"]

    class Packet:
        class default:
            class _schema:
                arguments = ()

    monkeypatch.setattr(shim, "resolved", Packet)
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    with pytest.raises(UnmetError, match=r"torch.ops._C.persistent_topk takes \(\)"):
        run.build(engine.problem(**MIXED))


# --- our own op fails ------------------------------------------------------------------------


def broken(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("model", ["deepseek_v4", "deepseek_v32"])
def test_a_topk_that_fails_costs_no_request(engine, run, monkeypatch, caplog, model):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem(**MIXED)
    got = run(problem, model=model)
    # the same logits, widened where they were bfloat16; ties may fall either way upstream
    want = engine.expected(problem.k)
    scores = [
        row[a:b].float()
        for name in ("paged_logits", "dense_logits")
        for c in engine.calls
        if c.name == name
        for row, (a, b) in zip(c.logits, c.spans, strict=True)
    ]
    for mine, exact, row in zip(got, want, scores, strict=True):
        mine, exact = mine[mine >= 0].long(), exact[exact >= 0].long()
        assert mine.unique().numel() == exact.numel()
        assert torch.equal(row[mine].sort().values, row[exact].sort().values)
    assert {"cooperative_topk", "top_k_per_row_prefill"} <= names(engine)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1 and "no kernel image" in errors[0]
    status = dsv4_plugin.status()
    assert "no kernel image" in status["seams"]["topk.decode"]["why"]
    assert status["counters"]["topk.decode.upstream"] == 1
    # and the next step does not try again, nor ask for bfloat16
    engine.calls.clear()
    with engine.gpu(), engine.config(model):
        pass
    assert "topk.decode" not in status["counters"]


@whose
def test_after_a_failure_logits_are_float32_again(engine, run, monkeypatch, whose):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", whose)
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        engine.step(layer, problem)
        engine.calls.clear()
        engine.step(layer, problem)
    wrote = {(c.dtype, c.by_plugin) for c in engine.calls if c.logits is not None}
    assert wrote == {(torch.float32, False)}


def test_under_strict_a_failure_is_raised(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_STRICT", "1")
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(engine.problem(**MIXED))


def test_a_gather_that_fails_costs_no_request(engine, run, monkeypatch, caplog):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setattr("dsv4_plugin.gather_indexer_cache", broken)
    problem = engine.problem(**MIXED)
    got = run(problem, model="deepseek_v32")
    assert torch.equal(got, engine.expected(problem.k))
    assert "cp_gather_indexer_k_quant_cache" in names(engine)
    counters = dsv4_plugin.status()["counters"]
    assert counters["gather.upstream"] == 1
    assert counters["topk.decode"] == 1  # one seam off is one seam off
    assert [r for r in caplog.records if r.levelno == logging.ERROR]


@whose
def test_a_deepgemm_that_cannot_write_bf16_costs_no_request(
    engine, run, monkeypatch, can_bf16, whose
):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", whose)
    engine.deep_gemm.fail_on_bf16 = True
    problem = engine.problem(**MIXED)
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    wrote = {(c.dtype, c.by_plugin) for c in engine.calls if c.logits is not None}
    if whose == "auto":  # the plugin's from the start: no code asks DeepGEMM
        assert wrote == {(torch.bfloat16, True)} and not names(engine) & UPSTREAM_TOPK
        return
    assert wrote == {(torch.float32, False)}
    assert bool(names(engine) & UPSTREAM_TOPK) is can_bf16  # asked, failed, switched off


# --- other people's patches ------------------------------------------------------------------


def test_a_later_patch_of_somebody_else_stays(engine, monkeypatch, caplog):
    ops = sys.modules["vllm._custom_ops"]
    unregister()
    original = ops.top_k_per_row_prefill
    register()

    def other(*args):
        return original(*args)

    ops.top_k_per_row_prefill = other
    try:
        unregister()
        assert ops.top_k_per_row_prefill is other
        assert "patched by other code" in caplog.text
    finally:
        ops.top_k_per_row_prefill = original


@whose
def test_bf16_is_not_written_once_its_reader_was_replaced(engine, run, monkeypatch, whose):
    """Upstream's kernels cannot read bfloat16, so no logits may be written that way then."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", whose)
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        with another_reader():
            engine.calls.clear()
            engine.step(layer, problem)
            assert {c.dtype for c in engine.calls if c.logits is not None} == {torch.float32}
            assert "top_k_per_row_prefill" in names(engine)
            # and the next layer says so
            engine.layer(problem)
            why = dsv4_plugin.status()["seams"]["topk.prefill"]["why"]
            assert "patched by other code" in why


def test_a_deepgemm_that_vllm_resolved_anew_is_asked_again(engine, run, monkeypatch, can_bf16):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    run(engine.problem(**MIXED))
    engine.install_deep_gemm()
    run(engine.problem(**MIXED))
    wrote = {(c.dtype, c.by_plugin) for c in engine.calls if c.logits is not None}
    assert wrote == {(torch.bfloat16 if can_bf16 else torch.float32, False)}


def test_a_call_the_kernel_does_not_take_is_one_call_upstream(engine, run, monkeypatch, caplog):
    """As for a cache with unaligned rows: an error of one call; the plugin serves the next."""
    import dsv4_plugin as ops

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    real = ops.gather_indexer_cache
    answers = [UnmetError("backend 'cuda' for gather", ["rows are aligned to 4 bytes"])]

    def gather(*args, **kwargs):
        if answers:
            raise answers.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr("dsv4_plugin.gather_indexer_cache", gather)
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config("deepseek_v32"):
        layer = engine.layer(problem)
        for _ in range(2):
            engine.step(layer, problem)
    counters = dsv4_plugin.status()["counters"]
    assert (counters["gather.upstream"], counters["gather"]) == (1, 1)
    assert not [
        r for r in caplog.records if r.name == "dsv4_plugin" and r.levelno >= logging.WARNING
    ]
