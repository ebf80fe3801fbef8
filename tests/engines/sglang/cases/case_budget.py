"""SGLang's division of a long prefill by bytes, from 0.5.22 on: it counts four for each logit."""

from __future__ import annotations

import pytest
import torch
from kits.sglang_engine import Layer

import dsv4_plugin

ROWS, COLUMNS, BUDGET = 8192, 131_072, 1 << 30


def paged_rows(engine):
    return engine.metadata.plan_indexer_row_chunks(
        num_rows=ROWS, num_cols=COLUMNS, budget_bytes=BUDGET, sm120_row_cap=None
    )


def parts_of_one_request(engine):
    """Prefill eight queries in a budget for two float32 rows; returns the rows of each part."""
    problem = engine.problem((601, 602, 603, 604, 605, 606, 607, 608), prefill=True)
    layer = Layer(engine, problem, None)
    metadata = layer.backend.forward_metadata.indexer_metadata
    metadata.mqa_logits_budget_bytes = 2 * 768 * 4  # rows of 640 columns, aligned
    before = len(engine.calls)
    layer.run()
    assert metadata.mqa_logits_budget_bytes == 2 * 768 * 4
    parts = [call for call in engine.calls[before:] if call.name == "dense_logits"]
    return problem, [part.rows for part in parts], parts


@pytest.mark.parametrize(
    ("settings", "times"),
    [({}, 2), ({"DSV4_LOGITS": "engine"}, 2), ({"DSV4_TOPK": "fp32"}, 1), ({"DSV4_PLUGIN": ""}, 1)],
    ids=["auto", "DeepGEMM's", "float32", "not asked"],
)
def test_bfloat16_logits_are_cut_by_what_they_take(engine, load, settings, times):
    load(**settings)
    plain = BUDGET // (COLUMNS * 4)
    assert paged_rows(engine) == plain  # nothing is decided yet
    parts_of_one_request(engine)  # the first forward decides
    problem, rows, parts = parts_of_one_request(engine)
    assert rows == [2 * times] * (4 // times)
    assert paged_rows(engine) == times * plain
    scores = torch.cat([part.logits for part in parts]).float()
    keys = torch.arange(608, dtype=torch.int32).expand(8, 608).contiguous()
    where = problem.slots(keys)
    for row, n in enumerate(problem.lengths.tolist()):
        at = torch.isin(where[row], problem.out[row]).nonzero()[:, 0]
        assert len(at) == problem.k and int(at.max()) < n
        best = scores[row, :n].topk(problem.k).values
        assert torch.equal(scores[row, at].sort().values, best.sort().values)


def test_what_the_seam_says(engine, load):
    load()
    engine.step(engine.problem())
    assert dsv4_plugin.status()["seams"]["budget"]["engaged"]


def test_float32_says_why(engine, load):
    load(DSV4_TOPK="fp32")
    engine.step(engine.problem())
    assert dsv4_plugin.status()["seams"]["budget"]["why"] == "logits are float32"


def test_a_top_k_that_was_switched_off(engine, load, monkeypatch):
    load()
    engine.step(engine.problem())
    from dsv4_plugin.engines.shared import adapter

    adapter.current().switch_off("topk", RuntimeError("broken"))
    assert paged_rows(engine) == BUDGET // (COLUMNS * 4)
