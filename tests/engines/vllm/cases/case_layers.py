"""Several kinds of layers in one process: each has its own decision and its own line in the log."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import types

import pytest
import torch
from case_calls import BATCHES, UPSTREAM_TOPK, names
from conftest import canonical

import dsv4_plugin
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.vllm import layers
from dsv4_plugin.errors import UnmetError

MIXED = BATCHES["mixed"]
PLAIN, SOURCE, CONSUMER = (f"DeepSeek-V4.1 {kind}" for kind in ("plain", "source", "consumer"))


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")


@contextlib.contextmanager
def model(engine, family, mode="NONE"):
    """The configuration of a model that is compiled in this mode."""
    with engine.gpu(90), engine.config(family) as config:
        config.compilation_config.mode = sys.modules["vllm.config"].CompilationMode[mode]
        yield


def layer(engine, problem, name, candidates=None, writes=False):
    """A layer of this name. A release without candidates has them as attributes of the class.

    Its candidate blocks have 16 keys, which the plugin does not serve.
    """
    cls = engine.indexer.SparseAttnIndexer
    of = {"candidate_blocks": candidates, "candidate_block_size": 16, "candidate_write": writes}
    if candidates is None:
        of = {}
    takes = inspect.signature(inspect.unwrap(cls.__init__)).parameters
    late = {} if "candidate_write" in takes else of
    for attribute, value in late.items():
        setattr(cls, attribute, value)
    try:
        cache = types.SimpleNamespace(prefix=name, kv_cache=problem.cache)
        return engine.layer(problem, k_cache=cache, **({} if late else of))
    finally:
        for attribute in late:
            delattr(cls, attribute)


def step(engine, built, problem):
    """Run one layer in a forward pass that knows it by its name."""
    problem.buffer.fill_(7)
    engine.calls.clear()
    with engine.forward(problem):
        context = sys.modules["vllm.forward_context"].get_forward_context()
        context.attn_metadata = {built.k_cache.prefix: problem.metadata}
        built(problem.hidden, problem.query, None, problem.weights)
    return canonical(problem.buffer[: len(problem.lengths), : problem.k].clone())


def served(engine):
    return not names(engine) & UPSTREAM_TOPK


def dtypes(engine):
    return {call.dtype for call in engine.calls if call.logits is not None}


def active_lines(caplog):
    said = [r.getMessage() for r in caplog.records if r.name == "dsv4_plugin"]
    return [line for line in said if line.startswith(("dsv4 active in", "dsv4 inactive in"))]


def v41(engine, problem):
    """The three kinds of DeepSeek-V4.1; source and consumer share one cache and its name."""
    blocks = torch.full((len(problem.buffer), 64), -1, dtype=torch.int32)
    return (
        layer(engine, problem, "model.layers.2.indexer"),
        layer(engine, problem, "model.layers.20.indexer", blocks, True),
        layer(engine, problem, "model.layers.20.indexer", blocks, False),
    )


def test_each_kind_is_decided_for_itself(engine, on, caplog):
    """The plugin serves the plain layers; the log says why it does not serve the others."""
    problem = engine.problem(**MIXED)
    with model(engine, "deepseek_v41"):
        plain, source, consumer = v41(engine, problem)
        assert [layers.kind_of(seen).name for seen in adapter.current().layers.values()] == [
            PLAIN, SOURCE, CONSUMER,
        ]  # fmt: skip
        for built, kind in ((plain, PLAIN), (source, SOURCE), (consumer, CONSUMER), (plain, PLAIN)):
            got = step(engine, built, problem)
            assert served(engine) is (kind == PLAIN), kind
            assert dtypes(engine) == {torch.bfloat16 if kind == PLAIN else torch.float32}
            if kind == PLAIN:
                assert torch.equal(got, engine.expected(problem.k))
    counters = dsv4_plugin.status()["counters"]
    assert counters["topk.decode"] == counters["topk.prefill"] == 2
    assert counters["topk.decode.upstream"] == counters["topk.prefill.upstream"] == 2
    last = last_lines(engine, caplog)
    assert set(last) == {PLAIN, SOURCE, CONSUMER}
    assert "top-k: bf16 by torch on the plugin's bf16 logits" in last[PLAIN]
    for kind in (SOURCE, CONSUMER):
        assert "top-k: the engine's (" in last[kind] and "blocks have 16 keys" in last[kind]
    assert dsv4_plugin.status()["seams"]["topk.decode"]["engaged"]


def last_lines(engine, caplog):
    """The last line about each kind; no line appears twice."""
    said = active_lines(caplog)
    assert len(said) == len(set(said))
    found = {}
    for line in said:
        what = line.partition(f"in vLLM {engine.version}, ")[2].partition(" layers: ")[0]
        found[what] = line
    return found


def test_calls_that_look_the_same_have_one_decision(engine, on, caplog):
    """In a compiled model a call does not show its layer, so the plugin serves no kind."""
    problem = engine.problem(**MIXED)
    with model(engine, "deepseek_v41", "VLLM_COMPILE"):
        for built in v41(engine, problem):
            step(engine, built, problem)
            assert not served(engine) and dtypes(engine) == {torch.float32}
    line = active_lines(caplog)[-1]
    assert all(kind in line for kind in (PLAIN, SOURCE, CONSUMER))
    assert "top-k: the engine's (" in line and "blocks have 16 keys" in line
    assert "calls of these kinds look the same: the model is compiled" in line
    assert not dsv4_plugin.status()["seams"]["topk.decode"]["engaged"]


@pytest.mark.parametrize("setting", ["DSV4_TOPK=fp32", "DSV4_STRICT=1", "DSV4_LOGITS=plugin"])
def test_an_explicit_setting_is_for_every_kind(engine, on, monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    problem = engine.problem(**MIXED)
    with model(engine, "deepseek_v41"):
        with pytest.raises(UnmetError, match="candidate blocks have 16 keys"):
            v41(engine, problem)
        adapter.current().layers.clear()
        alone = layer(engine, problem, "model.layers.2.indexer")
        step(engine, alone, problem)
        assert served(engine)


def two_kinds(engine, problem, names=("model.layers.0.indexer", "draft.layers.0.indexer")):
    """A DeepSeek-V4 and a layer of another family in one process."""
    with model(engine, "deepseek_v4"):
        first = layer(engine, problem, names[0])
    with model(engine, "deepseek_v32"):
        return first, layer(engine, problem, names[1])


def test_each_kind_has_its_dtype(engine, on, caplog):
    problem = engine.problem(**MIXED)
    first, second = two_kinds(engine, problem)
    for _ in range(2):
        for built, dtype in ((first, torch.bfloat16), (second, torch.float32)):
            with engine.gpu(90):
                got = step(engine, built, problem)
            assert torch.equal(got, engine.expected(problem.k))
            assert served(engine) and dtypes(engine) == {dtype}
    last = last_lines(engine, caplog)
    assert set(last) == {"DeepSeek-V4", "DeepSeek-V3.2-like"}
    assert "top-k: bf16" in last["DeepSeek-V4"] and "top-k: fp32" in last["DeepSeek-V3.2-like"]


def test_two_kinds_that_a_call_cannot_tell_are_the_engines(engine, on):
    """Two kinds with one name: a call does not show its kind, so no dtype is right for both."""
    problem = engine.problem(**MIXED)
    for built in two_kinds(engine, problem, ("model.layers.0.indexer",) * 2):
        with engine.gpu(90):
            got = step(engine, built, problem)
        assert torch.equal(got, engine.expected(problem.k))
        assert not served(engine) and dtypes(engine) == {torch.float32}


def test_a_call_past_the_op_is_the_engines_where_kinds_differ(engine, on):
    """As V3.2 calls the Python function; with one kind in the process it is served."""
    problem = engine.problem(**MIXED)
    both = two_kinds(engine, problem)
    with engine.gpu(90):
        engine.calls.clear()
        got = canonical(engine.step_direct(both[0], problem))
    assert torch.equal(got, engine.expected(problem.k)) and not served(engine)


def test_a_failure_ends_every_kind(engine, on, monkeypatch):
    problem = engine.problem(**MIXED)
    both = two_kinds(engine, problem)
    monkeypatch.setattr("dsv4_plugin.topk", lambda *a, **k: 1 / 0)
    with engine.gpu(90):
        for built in both:
            step(engine, built, problem)
            assert not served(engine)
    now = adapter.current()
    assert "topk" in now.off and len(now.decisions) == 2
    assert all(decision.selection is None for decision in now.decisions.values())


def test_the_call_leaves_no_kind_behind(engine, on, monkeypatch):
    problem = engine.problem(**MIXED)
    first, _ = two_kinds(engine, problem)
    monkeypatch.setattr("dsv4_plugin.state.state.count", lambda *counted: 1 / 0)
    with engine.gpu(90), pytest.raises(ZeroDivisionError):
        step(engine, first, problem)
    assert adapter.current().call.kind is None
    assert adapter.current().call.fill_skipped is False


@pytest.mark.parametrize(
    "name,family",
    [
        ("deepseek_v4", "DeepSeek-V4"), ("DeepseekV4ForCausalLM", "DeepSeek-V4"),
        ("deepseek_v41", "DeepSeek-V4.1"), ("DeepseekV41ForCausalLM", "DeepSeek-V4.1"),
        ("deepseek_v32", ""), ("glm_moe_dsa", ""), ("deepseek_v42", ""), ("", ""),
    ],
)  # fmt: skip
def test_families(name, family):
    hf = types.SimpleNamespace(model_type=name, architectures=None)
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=hf))
    assert layers._family(config) == family
    architecture = types.SimpleNamespace(model_type=None, architectures=[name])
    config.model_config.hf_config = architecture
    assert layers._family(config) == family


def test_every_kind_is_reached_and_the_last_takes_all():
    assert len({kind.name for kind in layers.KINDS}) == len(layers.KINDS)
    last = layers.KINDS[-1]
    unknown = layers.Layer((), "layer", 512, torch.device("cpu"), "", "", (), ())
    assert layers.kind_of(unknown) is last and not last.candidates
    assert all(kind.dtypes[-1] == "fp32" for kind in layers.KINDS)


def test_the_lines_are_said_once(engine, on, caplog):
    problem = engine.problem(**MIXED)
    with model(engine, "deepseek_v41"):
        keep = [v41(engine, problem) for _ in range(3)]
        said = active_lines(caplog)
        keep += [v41(engine, problem) for _ in range(3)]
    assert active_lines(caplog) == said and len(keep) == 6
    assert set(last_lines(engine, caplog)) == {PLAIN, SOURCE, CONSUMER}
    assert not [r for r in caplog.records if r.name == "dsv4_plugin" and r.levelno > logging.INFO]
