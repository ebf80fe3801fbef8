"""Shadow mode in vLLM's own indexer: the output does not change, the counters are right."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from case_calls import BATCHES, UPSTREAM_TOPK, batches, names
from kits import engine_parts, vllm_engine

import dsv4_plugin
from dsv4_plugin.engines.shared import adapter, shadow, shadow_report


@pytest.fixture(autouse=True)
def _no_thread(monkeypatch):
    monkeypatch.setattr(shadow_report, "start", lambda failed: None)
    shadow.kept.clear()


def enable(monkeypatch, **settings):
    for name, value in {"DSV4_PLUGIN": "1", "DSV4_SHADOW": "1", **settings}.items():
        monkeypatch.setenv(name, value)


def seen(problem, first, last):
    """Rows with a key, and the entries that they can have."""
    ends = [n for n in problem.lengths[first:last] if n > 0]
    return len(ends), sum(min(n, problem.k) for n in ends)


def test_the_output_is_the_same_without(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**BATCHES["mixed"])
    alone = run(problem)
    assert "shadow" not in dsv4_plugin.status() and not names(engine) & UPSTREAM_TOPK
    enable(monkeypatch)
    assert torch.equal(run(problem), alone)
    assert set(dsv4_plugin.status()["shadow"]) == {"decode", "prefill"}


@batches
@pytest.mark.parametrize(
    "settings",
    [{}, {"DSV4_LOGITS": "engine"}, {"DSV4_TOPK": "fp32"}],
    ids=["own bf16", "engine", "fp32"],
)
def test_the_output_stays_and_the_counters_are_right(engine, run, batch, monkeypatch, settings):
    """In bfloat16, on the plugin's and (on 0.26) DeepGEMM's logits, and in float32."""
    enable(monkeypatch, **settings)
    problem = engine.problem(**batch)
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    assert names(engine) & UPSTREAM_TOPK, "upstream's selection has to run"
    counters = dsv4_plugin.status()["counters"]
    assert not any(name.endswith(".upstream") for name in counters if name.startswith("topk"))
    decodes = len(batch.get("decode", ())) * batch.get("next_n", 1)
    spans = {"decode": (0, decodes), "prefill": (decodes, len(problem.lengths))}
    for seam, (first, last) in spans.items():
        rows, entries = seen(problem, first, last)
        found = dsv4_plugin.status()["shadow"][seam]
        assert (found["rows"], found["entries"]) == (rows, entries)
        assert found["agree"] + found["tied"] == entries, found
        assert found["lower"] == found["higher"] == 0
        wrote = {c.dtype for c in engine.calls if c.logits is not None}
        if wrote == {torch.float32}:
            assert found["agree"] == entries and found["equal"] == rows and found["worst"] == 1


def test_ties_are_told_from_errors(engine, run, monkeypatch):
    """Scores that tie at the threshold: upstream may choose others, and is right too."""
    enable(monkeypatch, DSV4_TOPK="fp32")

    def last_of_equals(logits, spans, out, k):
        for row, (start, end) in enumerate(spans):
            flipped = logits[row, start:end].flip(0)
            best = flipped.argsort(descending=True, stable=True)[:k]
            out[row] = -1
            out[row, : best.numel()] = (end - start - 1 - best).int()

    monkeypatch.setattr(vllm_engine, "upstream_rows", last_of_equals)
    problem = engine.problem(
        decode=(1500, 2000), prefill=((1800, 4),), heads=2, quantum=4.0, seed=3
    )
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    for found in dsv4_plugin.status()["shadow"].values():
        assert found["tied"] > 0 and found["agree"] + found["tied"] == found["entries"]
        assert found["equal"] == 0 and found["worst"] < 1


def test_an_inexact_upstream_is_counted(engine, run, monkeypatch):
    enable(monkeypatch, DSV4_TOPK="fp32")
    exact = engine_parts.upstream_rows

    def drops_the_best(logits, spans, out, k):
        exact(logits, [(a, b) for a, b in spans], out, k)
        for row, (start, end) in enumerate(spans):
            order = logits[row, start:end].argsort(descending=True)
            if order.numel() > k:
                out[row, out[row] == order[0].int()] = order[-1].int()

    monkeypatch.setattr(vllm_engine, "upstream_rows", drops_the_best)
    problem = engine.problem(decode=(1500, 2000, 40), prefill=((1800, 4),))
    assert torch.equal(run(problem), engine.expected(problem.k))
    found = dsv4_plugin.status()["shadow"]
    assert (found["decode"]["lower"], found["decode"]["equal"]) == (2, 1)
    assert (found["prefill"]["lower"], found["prefill"]["equal"]) == (4, 0)
    assert found["decode"]["worst"] == pytest.approx(511 / 512, abs=2e-6)


def test_a_shadow_that_fails_disturbs_nothing(engine, run, monkeypatch, caplog):
    enable(monkeypatch, DSV4_STRICT="1", DSV4_TOPK="fp32")

    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(vllm_engine, "upstream_rows", fails)
    problem = engine.problem(decode=(1500, 2000), prefill=((1800, 4),))
    for _ in range(2):
        assert torch.equal(run(problem), engine.expected(problem.k))
    assert adapter.current().decision.selection is not None
    assert sum("no such kernel" in r.message for r in caplog.records) == 1
    assert {r.levelno for r in caplog.records if "no such kernel" in r.message} == {logging.ERROR}


@pytest.mark.parametrize("logits", ["auto", "engine"])
def test_prefill_in_parts_counts_the_same(engine, run, monkeypatch, logits, can_bf16):
    enable(monkeypatch)
    monkeypatch.setenv("DSV4_LOGITS", logits)
    monkeypatch.setattr(shadow, "_SCRATCH_BYTES", 1)  # a row at a time where scores are widened
    problem = engine.problem(prefill=((1600, 5), (600, 3)))
    assert torch.equal(run(problem), engine.expected(problem.k))
    found = dsv4_plugin.status()["shadow"]["prefill"]
    assert (found["rows"], found["entries"]) == (8, 8 * 512)
    assert found["agree"] + found["tied"] == found["entries"]
    calls = [c for c in engine.calls if c.name == "top_k_per_row_prefill"]
    assert len(calls) == (8 if logits == "auto" or can_bf16 else 1)  # float32 is not widened


# --- memory ----------------------------------------------------------------------------------


def split(seq_lens, query_lens, workspace, budget):
    planner = sys.modules["vllm.v1.attention.backends.mla.indexer"]
    function = getattr(planner, "split_indexer_prefill_chunks", None)
    if function is None:
        function = planner.DeepseekV32IndexerMetadataBuilder._split_indexer_prefill_chunks
    return function(torch.tensor(seq_lens), torch.tensor(query_lens), workspace, budget)


@pytest.mark.parametrize("logits", ["auto", "engine"])
def test_the_prefill_budget_counts_two_bytes_for_bf16(engine, run, monkeypatch, can_bf16, logits):
    """``VLLM_SPARSE_INDEXER_MAX_LOGITS_MB`` holds twice the rows."""
    lens, queries, budget = [4096, 1024], [300, 100], 4096 * 100 * 4
    upstream = split(lens, queries, 1 << 20, budget)
    assert [q.stop - q.start for _, q in upstream] == [100, 100, 100, 100]

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    problem = engine.problem(prefill=((600, 2),))
    run(problem)
    assert split(lens, queries, 1 << 20, budget) == upstream
    seam = dsv4_plugin.status()["seams"]["budget"]
    assert seam["where"] and not seam["engaged"]

    monkeypatch.setenv("DSV4_TOPK", "auto")
    monkeypatch.setenv("DSV4_LOGITS", logits)
    run(problem)
    chunks = split(lens, queries, 1 << 20, budget)
    if logits == "engine" and not can_bf16:
        assert chunks == upstream and not dsv4_plugin.status()["seams"]["budget"]["engaged"]
        return
    assert dsv4_plugin.status()["seams"]["budget"]["engaged"]
    assert [q.stop - q.start for _, q in chunks] == [200, 100, 100]
    for requests, rows in chunks:
        columns = sum(lens[requests])
        assert (rows.stop - rows.start) * columns * 2 <= budget
    assert dsv4_plugin.status()["counters"]["budget.bf16"] == 1


def test_a_planner_that_counts_otherwise_is_left_alone(engine, monkeypatch):
    from dsv4_plugin.engines.vllm import register, unregister

    unregister()
    planner = sys.modules["vllm.v1.attention.backends.mla.indexer"]

    def counts_two(seq, query, workspace_size, max_logits_bytes, request_offset=0):
        return max_logits_bytes // 2

    if hasattr(planner, "split_indexer_prefill_chunks"):
        monkeypatch.setattr(planner, "split_indexer_prefill_chunks", counts_two)
    else:
        monkeypatch.setattr(
            planner.DeepseekV32IndexerMetadataBuilder, "_split_indexer_prefill_chunks",
            staticmethod(counts_two),
        )  # fmt: skip
    register()
    seam = dsv4_plugin.status()["seams"]["budget"]
    assert seam["where"] is None and "max_logits_bytes // 4" in seam["why"]


@pytest.mark.parametrize("logits", ["auto", "engine"])
def test_what_bf16_saves_is_in_the_status(engine, run, monkeypatch, can_bf16, logits):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", logits)
    problem = engine.problem(decode=(700, 40), max_model_len=4096)
    run(problem)
    peaks = dsv4_plugin.status().get("peaks", {})
    saved = {"logits.saved_mib": round(2 * 4096 * 2 / 2**20, 3)}
    assert peaks == (saved if logits == "auto" or can_bf16 else {})
