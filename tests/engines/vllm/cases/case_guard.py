"""The meaning of the settings, the layers left to vLLM, and the errors of explicit settings."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from case_calls import BATCHES, UPSTREAM_TOPK, names
from kits.told import check_warned, empty_settings, odd_settings

import dsv4_plugin
from dsv4_plugin.errors import SettingError, UnmetError

MIXED = BATCHES["mixed"]


def stayed_upstream(engine, problem, got):
    assert torch.equal(got, engine.expected(problem.k))
    assert names(engine) & UPSTREAM_TOPK
    assert all(c.dtype in (None, torch.float32) for c in engine.calls)
    counters = dsv4_plugin.status()["counters"]
    assert not {"topk.decode", "topk.prefill", "logits.bf16", "logits.plugin"} & set(counters)


def why(seam="topk.decode"):
    return dsv4_plugin.status()["seams"][seam]["why"]


def test_k_outside_the_set(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(decode=(700, 40), prefill=((600, 4),), k=256)
    stayed_upstream(engine, problem, run(problem))
    assert "index_topk is 256" in why()


def test_candidate_blocks_of_v41(engine, run, monkeypatch):
    import inspect

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**MIXED)
    blocks = torch.full((len(problem.lengths), 64), -1, dtype=torch.int32)
    if "candidate_blocks" in inspect.signature(engine.indexer.SparseAttnIndexer).parameters:
        masked = []
        monkeypatch.setattr(  # a Triton kernel; what matters is what it is given
            engine.indexer, "_apply_candidate_mask", lambda logits, *a: masked.append(logits.dtype)
        )
        layer = {"candidate_blocks": blocks, "candidate_block_size": 64}
        got = run(problem, layer=layer)
        assert masked == [torch.float32] * 2
    else:  # a release without them: the attribute is what the guard looks at
        original = engine.indexer.SparseAttnIndexer.__init__.__wrapped__
        from dsv4_plugin.engines.vllm import register, unregister

        unregister()

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.candidate_blocks = blocks

        # Inside the plugin's patch, where vLLM's own wrapper would be.
        init.__signature__ = inspect.signature(original)
        monkeypatch.setattr(engine.indexer.SparseAttnIndexer, "__init__", init)
        register()
        got = run(problem)
    stayed_upstream(engine, problem, got)
    assert "candidate blocks have" in why() and why("gather") is None


def test_decode_context_parallelism(engine, run, monkeypatch):
    import types

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    group = types.SimpleNamespace(rank_in_group=0, world_size=2)
    monkeypatch.setattr(engine.indexer, "get_dcp_group", lambda: group)
    problem = engine.problem(**MIXED)
    built = run.build(problem, decode_context_parallel_size=2)
    assert built.dcp_world_size == 2
    assert "decode context parallelism over 2 ranks" in why()
    assert "decode context parallelism" in why("gather")
    # The merge across ranks is CuteDSL on a GPU; the same layer on one rank shows the way taken.
    built.dcp_world_size = 1
    with engine.gpu():
        from conftest import canonical

        got = canonical(engine.step(built, problem))
    stayed_upstream(engine, problem, got)
    assert "cp_gather_indexer_k_quant_cache" in names(engine)


def test_mxfp4_cache(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    run.build(engine.problem(**MIXED), layer={"use_fp4_cache": True})
    assert "the indexer cache is MXFP4" in why()
    assert "the indexer cache is MXFP4" in why("gather")


def test_a_topk_backend_the_user_chose_in_vllm(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config() as config:
        kernels = getattr(config, "kernel_config", None)
        if hasattr(kernels, "sparse_indexer_topk_backend"):
            kernels.sparse_indexer_topk_backend = "persistent"
            built = engine.layer(problem)
            from conftest import canonical

            stayed_upstream(engine, problem, canonical(engine.step(built, problem)))
            assert "sparse_indexer_topk_backend is 'persistent'" in why()
        else:  # nothing to choose there
            engine.layer(problem)
            assert why() is None


def test_one_layer_that_is_not_eligible_keeps_the_process_upstream(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    good = engine.problem(**MIXED)
    with engine.gpu(), engine.config():
        built = engine.layer(good)
        assert why() is None
        other = engine.layer(engine.problem(decode=(700,), k=256))
        assert "index_topk is 256" in why()
        from conftest import canonical

        stayed_upstream(engine, good, canonical(engine.step(built, good)))
        # A model that was deleted has no effect.
        del other
        gc.collect()  # vLLM's layers hold themselves in a cycle
        again = engine.layer(good)
        assert why() is None
        engine.calls.clear()
        got = canonical(engine.step(again, good))
        assert torch.equal(got, engine.expected(good.k))
        assert not names(engine) & UPSTREAM_TOPK
    assert dsv4_plugin.status()["counters"]["topk.decode"] == 1


def test_a_platform_that_takes_another_way(engine, monkeypatch):
    """Without the replacement the platform is no CUDA device, and vLLM would not call the seams."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    with engine.config():
        engine.layer(engine.problem(**MIXED))
    assert "its indexer takes another way" in why()


# --- explicit wishes -------------------------------------------------------------------------


def refused(run, problem, **kwargs):
    with pytest.raises(UnmetError) as caught:
        run.build(problem, **kwargs)
    return caught.value


def test_fp16_is_refused_where_the_engine_shall_write_it(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp16")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    error = refused(run, engine.problem(**MIXED))
    assert error.wish == "DSV4_TOPK=fp16"
    assert any("float32 or bfloat16 only" in reason for reason in error.unmet)


def test_bf16_is_met_or_refused(engine, run, monkeypatch, can_bf16):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    problem = engine.problem(**MIXED)
    if can_bf16:  # explicit: for V3.2 as well
        got = run(problem, model="deepseek_v32")
        assert {c.dtype for c in engine.calls if c.logits is not None} == {torch.bfloat16}
        assert torch.equal(got, engine.expected(problem.k))
    else:
        error = refused(run, problem)
        assert any("takes no logits_dtype and writes float32" in r for r in error.unmet)


def test_fp32_is_met_for_v4(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    problem = engine.problem(**MIXED)
    got = run(problem)
    assert {c.dtype for c in engine.calls if c.logits is not None} == {torch.float32}
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK


def test_bf16_on_an_a100_names_every_reason_at_once(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    problem = engine.problem(decode=(700, 40), k=256)
    error = refused(run, problem, gpu=80, layer={"use_fp4_cache": True})
    text = str(error)
    for part in (
        "compute capability 9.0",
        "index_topk is 256",
        "the indexer cache is MXFP4",
        "not on a CUDA device",
    ):
        assert part in text
    assert len(set(error.unmet)) == len(error.unmet) >= 4


def test_after_a_refusal_nothing_is_changed(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp16")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    problem = engine.problem(**MIXED)
    refused(run, problem)
    with engine.gpu(), engine.config():
        monkeypatch.setenv("DSV4_TOPK", "off")
        monkeypatch.setenv("DSV4_INDEXER_READ", "off")
        built = engine.layer(problem)
        from conftest import canonical

        stayed_upstream(engine, problem, canonical(engine.step(built, problem)))


def test_an_explicit_backend_is_this_or_an_error(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    error = refused(run, engine.problem(**MIXED))
    assert "DSV4_BACKEND=cuda" in error.wish
    assert any("not on a CUDA device" in reason for reason in error.unmet)


def test_an_explicit_gather_is_this_or_an_error(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_INDEXER_READ", "triton")
    error = refused(run, engine.problem(**MIXED))
    assert error.wish == "DSV4_INDEXER_READ=triton"


def test_strict_turns_a_fallback_into_an_error(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(decode=(700, 40), k=256)
    stayed_upstream(engine, problem, run(problem))
    monkeypatch.setenv("DSV4_STRICT", "1")
    error = refused(run, problem)
    assert "DSV4_STRICT=1" in error.wish
    assert any("index_topk is 256" in reason for reason in error.unmet)


# --- where settings come from ----------------------------------------------------------------


def test_additional_config_wins_over_the_environment(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp16")  # would be refused
    problem = engine.problem(**MIXED)
    got = run(problem, config={"dsv4": {"topk": "fp32"}})
    assert torch.equal(got, engine.expected(problem.k))
    assert dsv4_plugin.settings().topk == "fp32"
    assert dsv4_plugin.status()["counters"]["topk.decode.fp32.torch"] == 1


def test_additional_config_alone_switches_on(engine, run):
    problem = engine.problem(**MIXED)
    run(problem, config={"dsv4": {"topk": "fp32"}})
    assert dsv4_plugin.status()["counters"]["topk.decode"] == 1
    # and the next engine in this process, which says nothing, is not changed
    run(problem)
    assert dsv4_plugin.status()["counters"]["topk.decode"] == 1
    assert names(engine) & UPSTREAM_TOPK


def test_the_kill_switch_is_strongest(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    problem = engine.problem(**MIXED)
    for given in ({"plugin": 1, "topk": "fp16"}, {"plugin": 1, "topk": "int8"}, "bf16"):
        stayed_upstream(engine, problem, run(problem, config={"dsv4": given}))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"topk": "int8"}, "additional_config['dsv4']['topk'] is 'int8'"),
        ({"top_k": "bf16"}, "unknown name 'top_k'"),
        ({"topk": "int8", "log": True}, "['topk'] is 'int8'; it can be"),
        ({"topk": "int8", "log": True}, "additional_config['dsv4']['log'] is 'True'"),
        ("bf16", "must map names to values"),
    ],
)
def test_a_bad_additional_config_is_an_error_at_the_layer(engine, run, given, part):
    with pytest.raises(SettingError, match=part.replace("[", r"\[").replace("]", r"\]")):
        run.build(engine.problem(**MIXED), config={"dsv4": given})


def test_a_bad_variable_is_an_error_at_the_layer_and_none_in_register(engine, run, monkeypatch):
    from dsv4_plugin.engines.vllm import register

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "half")
    register()
    with pytest.raises(SettingError, match="DSV4_TOPK is 'half'"):
        run.build(engine.problem(**MIXED))


@odd_settings
def test_not_asked_for_is_inert_whatever_a_variable_holds(
    engine, run, monkeypatch, caplog, variable, value
):
    from dsv4_plugin.engines.vllm import register

    monkeypatch.setenv(variable, value)
    register()
    problem = engine.problem(**MIXED)
    stayed_upstream(engine, problem, run(problem))
    assert not dsv4_plugin.status()["counters"]
    check_warned(caplog, variable, value)


@empty_settings
def test_an_empty_variable_is_unset(engine, run, monkeypatch, variable):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv(variable, "")
    run(engine.problem(**MIXED))
    assert dsv4_plugin.status()["counters"]["topk.decode"] == 1


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        (None, ""),
        ("", ""),
        ({}, ""),
        ({"topk": "", "plugin": " "}, ""),
        (False, ""),  # YAML: `dsv4: off`
        ({"plugin": "0", "topk": "int8"}, "['topk'] is 'int8'"),
    ],
)
def test_a_configuration_that_asks_for_nothing(engine, run, caplog, given, warned):
    problem = engine.problem(**MIXED)
    stayed_upstream(engine, problem, run(problem, config={"dsv4": given}))
    plugin = [r for r in caplog.records if r.name == "dsv4_plugin"]
    loud = [r.getMessage() for r in plugin if r.levelno >= logging.WARNING]
    assert len(loud) == bool(warned) and warned in "".join(loud)


def test_the_words_that_yaml_reads_as_booleans(engine, run):
    """``additional-config: {dsv4: {topk: off, indexer_read: no}}`` arrives as two times False."""
    problem = engine.problem(**MIXED)
    given = {"topk": False, "indexer_read": False}
    stayed_upstream(engine, problem, run(problem, config={"dsv4": given}))
    assert why() == "DSV4_TOPK=off" and why("gather") == "DSV4_INDEXER_READ=off"


# --- what is said ----------------------------------------------------------------------------


def test_one_info_line_a_process(engine, run, monkeypatch, caplog):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config():
        layers = [engine.layer(problem) for _ in range(3)]
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == 1, lines
    (line,) = lines
    assert engine.version in line
    assert "top-k:" in line
    assert "key gather: torch at vllm._custom_ops.cp_gather_indexer_k_quant_cache" in line
    assert dsv4_plugin.status()["seams"]["topk.decode"]["where"] in line
    assert len(layers) == 3


def test_the_reason_for_upstream_is_said_once(engine, run, monkeypatch, caplog):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(decode=(700,), k=256)
    with engine.gpu(), engine.config():
        keep = [engine.layer(problem) for _ in range(3)]
    lines = [r.getMessage() for r in caplog.records if "index_topk is 256" in r.getMessage()]
    assert len(lines) == 1, lines
    assert len(keep) == 3


def test_the_line_is_not_said_when_nobody_asked(engine, run, caplog):
    run.build(engine.problem(**MIXED))
    assert not [r for r in caplog.records if r.name == "dsv4_plugin" and r.levelno >= logging.INFO]


# --- on a GPU, as far as the decision goes ---------------------------------------------------


class Cuda:
    """A layer's view of a Hopper GPU: the decision looks at devices, never at data."""

    def __init__(self, monkeypatch, unmet):
        from dsv4_plugin.engines.vllm import policy

        self.asked = []
        real = policy.see

        def seen(layer, config, platform):
            import dataclasses

            return dataclasses.replace(
                real(layer, config, platform), device=torch.device("cuda", 0)
            )

        def answer(call, backend):
            self.asked.append((call.op, backend))
            return unmet.get((call.op, backend), [])

        monkeypatch.setattr(policy, "see", seen)
        monkeypatch.setattr(policy.backends, "unmet", answer)


def decided():
    from dsv4_plugin.engines.shared import adapter

    now = adapter.current().decision
    return now.selection and now.selection.backend, now.gather


def test_on_cuda_auto_takes_kernels_only(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    cuda = Cuda(monkeypatch, {})
    run.build(engine.problem(**MIXED))
    assert decided() == ("cuda", "cuda")
    assert "torch" not in {backend for _, backend in cuda.asked}


@pytest.mark.parametrize("op", [None, "paged_logits", "ragged_logits"])
def test_on_cuda_auto_takes_the_plugins_logits_and_else_deepgemms(
    engine, run, monkeypatch, can_bf16, op
):
    """The plugin needs both: decode and prefill select on logits of one dtype."""
    from dsv4_plugin.engines.shared import adapter

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    Cuda(monkeypatch, {(op, "cuda"): ["no such kernel"]})
    run.build(engine.problem(**MIXED))
    topk = adapter.current().decision.selection
    if op is None:
        want = ("bf16", "cuda", False, "plugin")
    else:
        want = ("bf16", "cuda", True, "engine") if can_bf16 else ("fp32", "cuda", False, "engine")
        assert can_bf16 or "plugin's logits by cuda: no such kernel" in why("logits")
    assert (topk.dtype, topk.backend, topk.request_bf16, topk.logits) == want


def test_on_cuda_without_the_library_upstream_is_before_torch(engine, run, monkeypatch, caplog):
    from dsv4_plugin.kernels import cuda as kernels

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setattr(kernels, "missing", lambda: "_C.so was not built")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    missing = ["the compiled library _C.so is not in this installation"]
    cuda = Cuda(monkeypatch, {("topk", "cuda"): missing, ("gather", "cuda"): missing})
    run.build(engine.problem(**MIXED))
    assert decided() == (None, "triton")
    said = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "dsv4_plugin"]
    seen = [what for what in said if "_C.so" in what[1]]
    assert seen[0] == (
        "WARNING",
        "the plugin runs without its compiled kernels: _C.so was not built",
    )
    assert "_C.so is not in this installation" in why()
    assert "torch" not in {backend for _, backend in cuda.asked}
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    error = refused(run, engine.problem(**MIXED))
    assert any("_C.so" in reason for reason in error.unmet)


def test_on_cuda_torch_is_there_for_who_asks_for_it(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_BACKEND", "torch")
    Cuda(monkeypatch, {})
    run.build(engine.problem(**MIXED))
    assert decided() == ("torch", "torch")
