"""The fill with -1: omitted where the plugin's top-k writes every row, and nowhere else."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from case_calls import BATCHES
from conftest import canonical
from kits.seams import moved

import dsv4_plugin
import dsv4_plugin as ops
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.vllm import register, unregister, wrappers

OP = "sparse_attn_indexer"


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")


@contextlib.contextmanager
def built(engine, problem, mode="NONE", **values):
    """A layer of a model that is compiled in this mode."""
    modes = sys.modules["vllm.config"].CompilationMode
    with engine.gpu(90), engine.config() as config:
        config.compilation_config.mode = modes[mode]
        yield engine.layer(problem, **values)


@pytest.fixture
def found(monkeypatch):
    """What our top-k found in the rows it was to write."""
    seen: list[set[int]] = []
    real = ops.topk

    def watched(*args, out=None, out_raw=None, **kwargs):
        seen.append(set((out if out_raw is None else out_raw).unique().tolist()))
        return real(*args, out=out, out_raw=out_raw, **kwargs)

    monkeypatch.setattr(ops, "topk", watched)
    return seen


def counters():
    return dsv4_plugin.status()["counters"]


def seam():
    return dsv4_plugin.status()["seams"]["topk.fill"]


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_only_where_every_row_is_a_decode_row(engine, on, found, batch):
    problem = engine.problem(**batch)
    with built(engine, problem) as layer:
        got = canonical(engine.step(layer, problem))
    assert torch.equal(got, engine.expected(problem.k))
    unfilled = not batch.get("prefill") and not batch.get("wider_buffer")
    assert counters().get("topk.unfilled", 0) == unfilled
    assert all(({7} if unfilled else {-1}) == rows for rows in found) and found
    assert bool((problem.buffer[len(problem.lengths) :] == 7).all())


def ragged(problem, context):
    problem.metadata.decode.requires_padding = True


def padded(problem, context):
    problem.hidden = torch.zeros(len(problem.hidden) + 2, 16)


def pieces(problem, context):
    context.cudagraph_runtime_mode = types.SimpleNamespace(name="PIECEWISE")


def ranks(problem, context):
    problem.metadata.decode.global_seq_lens = torch.ones(2)


CHANGES = {"ragged": ragged, "padded": padded, "pieces": pieces, "context parallel": ranks}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_where_a_row_may_be_left_over_the_fill_stays(engine, on, change):
    """Only the check runs here, because vLLM needs Triton or ranks for such a batch."""
    from dsv4_plugin.engines.vllm import fill

    problem = engine.problem(decode=(700, 1500))
    with built(engine, problem), engine.forward(problem):
        context = sys.modules["vllm.forward_context"].get_forward_context()
        prefix = next(iter(context.attn_metadata))

        def asked():
            given = {"hidden_states": problem.hidden, "k_cache_prefix": prefix,
                     "topk_tokens": 512, "topk_indices_buffer": problem.buffer}  # fmt: skip
            batch = fill._batch(given.get)
            return fill._every_row_is_selected(adapter.current(), given.get, *batch)

        assert asked()
        change(problem, context)
        assert not asked()


def test_a_full_graph_is_captured_without_it(engine, on, found):
    problem = engine.problem(decode=(700, 1500))
    modes = sys.modules["vllm.config"].CUDAGraphMode
    with built(engine, problem) as layer, engine.forward(problem):
        context = sys.modules["vllm.forward_context"].get_forward_context()
        context.cudagraph_runtime_mode = modes.FULL
        problem.buffer.fill_(7)
        layer(problem.hidden, problem.query, None, problem.weights)
    assert found == [{7}] and counters()["topk.unfilled"] == 1


@pytest.mark.parametrize("part", ["top-k", "logits"])
def test_what_fails_is_filled_before_vllm_selects(engine, on, monkeypatch, part):
    """vLLM's kernels get the rows as they expect them, in the same call."""
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    monkeypatch.setenv("DSV4_LOGITS", "plugin")
    problem = engine.problem(decode=(700, 40, 1500))
    rows: list[torch.Tensor] = []

    def plain(scores):
        rows.append(problem.buffer[:3].clone())
        return widen(scores)

    widen = wrappers.plain
    monkeypatch.setattr(wrappers, "plain", plain)
    name = "dsv4_plugin.topk" if part == "top-k" else "dsv4_plugin.ops.logits.paged_logits"
    with built(engine, problem) as layer:
        monkeypatch.setattr(name, lambda *a, **k: 1 / 0)
        got = canonical(engine.step(layer, problem))
    assert torch.equal(got, engine.expected(problem.k)) and "topk" in adapter.current().off
    assert counters()["topk.unfilled"] == 1
    assert len(rows) == 1 and bool((rows[0] == -1).all())
    assert "switched off" in seam()["why"]


def test_a_call_that_leaves_it_out_itself(engine, on, found):
    """As V3.2's fused kernel does: the arguments go through as they are."""
    from dsv4_plugin.engines.vllm import fill

    heard = []
    at = {"hidden_states": 0, fill.SKIP_FILL: 1}
    fill.run_op(lambda *a, **k: heard.append((a, k)), at, (1,), {fill.SKIP_FILL: True})
    fill.run_op(lambda *a, **k: heard.append((a, k)), at, (1, 2, 3), {})
    assert heard == [((1,), {fill.SKIP_FILL: True}), ((1, 2, 3), {})]


def test_a_model_that_is_compiled_keeps_it(engine, on, found):
    problem = engine.problem(decode=(700, 1500))
    real = getattr(torch.ops.vllm, OP)
    with built(engine, problem, "VLLM_COMPILE") as layer:
        engine.step(layer, problem)
    assert getattr(torch.ops.vllm, OP) is real and "compiled" in seam()["why"]
    assert found == [{-1}] and "topk.unfilled" not in counters()


def test_the_patch_comes_and_goes(engine, on):
    problem = engine.problem(decode=(700, 1500))
    real = getattr(torch.ops.vllm, OP)
    with built(engine, problem):
        patched = getattr(torch.ops.vllm, OP)
        assert patched is not real and seam()["engaged"]
        assert patched.default is real.default and patched.overloads() == real.overloads()
        with built(engine, problem):
            assert getattr(torch.ops.vllm, OP) is patched
    unregister()
    assert getattr(torch.ops.vllm, OP) is real
    register()


def test_a_compiler_sees_the_op(engine, on, monkeypatch):
    problem = engine.problem(decode=(700, 1500))
    with built(engine, problem) as layer:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        from dsv4_plugin.engines.vllm import fill

        monkeypatch.setattr(fill, "run_op", lambda *a: 1 / 0)
        patched = getattr(torch.ops.vllm, OP)
        patched.resolved = lambda *a, **k: "the op"
        assert patched(1) == "the op"
    del layer


def test_the_op_without_the_argument(engine, monkeypatch):
    from dsv4_plugin.engines.vllm import install, probe

    unregister()
    other = moved(probe.SEAMS, "topk.fill", has=("an_argument_of_tomorrow",))
    monkeypatch.setattr(install, "SEAMS", other)
    register()
    assert seam()["where"] is None and "an_argument_of_tomorrow" in seam()["why"]
