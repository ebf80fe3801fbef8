"""``auto`` for V3.2 and GLM: the calls in which SGLang's own top-k is faster are SGLang's."""

from __future__ import annotations

import pytest
import torch
from case_calls import counters, dsa_scores
from conftest import expected, names
from kits.engine_parts import canonical, oracle

from dsv4_plugin.engines.sglang import policy
from dsv4_plugin.engines.shared import aside
from dsv4_plugin.engines.shared import aside_table as table


@pytest.fixture(autouse=True)
def measured(engine, monkeypatch):
    monkeypatch.setattr(table, "LONGEST", {("sglang.dsa", 512): ((2, 2048, 0),)})
    monkeypatch.setattr(table, "WIDEST", {"sglang.dsa": 4096})
    monkeypatch.setattr(table, "SINCE", {"sglang": (0, 5)})
    monkeypatch.setattr(aside, "BACKENDS", ("torch",))


@pytest.mark.parametrize(
    "lengths,settings,v2,left",
    [
        ((1500, 700), {}, True, True),
        ((1500,), {}, True, False),  # one row
        ((2500, 3), {}, True, False),  # the table has pages for longer rows
        ((1500, 700), {"DSV4_TOPK": "fp32"}, True, False),
        ((1500, 700), {}, False, False),  # SGLang's older kernel, which is slower
    ],
)
def test_the_calls_that_are_left(engine, load, lengths, settings, v2, left):
    load(**settings)
    problem = engine.problem(lengths)
    if v2 and not hasattr(engine.dsa.DSATopKBackend, "should_use_topk_v2"):
        left = False  # up to 0.5.16, and never there: it was not measured
    scores = dsa_scores(problem)
    got = engine.dsa_step(scores, problem, v2=v2)
    want = torch.stack([oracle(row[:n], 512) for row, n in zip(scores, lengths, strict=True)])
    assert torch.equal(canonical(got), canonical(problem.slots(want)))
    assert counters() == (
        {"topk.dsa.aside": 1} if left else {"topk.dsa": 1, "topk.dsa.fp32.torch": 1}
    )
    assert ("topk_v2" in names(engine)) is left


def test_the_line_names_the_shapes(engine, load, caplog):
    load()
    engine.dsa_step(dsa_scores(problem := engine.problem((700,))), problem)
    lines = [r.getMessage() for r in caplog.records if r.name == "dsv4_plugin"]
    (line,) = [text for text in lines if " active in " in text]
    assert line.endswith("faster: dsa by rows and the longest row: from 2 on up to 2048")


def test_v4_in_float32_is_the_plugins(engine, load):
    load(DSV4_TOPK="fp32")
    engine.step(engine.problem((1500, 700)))
    assert counters() == {"topk.paged": 1, "topk.paged.fp32.torch": 1}


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("whose", ["auto", "plugin", "engine"])
def test_the_bfloat16_logits_of_prefill_are_deep_gemms(engine, load, caplog, prefill, whose):
    """It is faster there; a wish gets what it says, and the plugin selects in every case."""
    load(DSV4_LOGITS=whose)
    problem = engine.problem((3, 512, 700, 1100) if prefill else (1500, 700), prefill=prefill)
    out = engine.step(problem)
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    wrote = engine.logits_of()
    plugin = whose == "plugin" or (whose == "auto" and not prefill)
    assert (wrote.dtype, wrote.by_plugin) == (torch.bfloat16, plugin)
    by = {"logits.plugin": 1, "logits.plugin.bf16.torch": 1} if plugin else {"logits.bf16": 1}
    assert counters() == {**by, "topk.paged": 1, "topk.paged.bf16.torch": 1}
    said = "the plugin's bf16 logits (prefill: the engine's)" in caplog.text
    assert said is (whose == "auto")


def test_prefill_logits_stay_the_plugins_where_deep_gemm_writes_float32(engine, load, monkeypatch):
    monkeypatch.setattr(policy, "_engine_logits", lambda *a: ["it writes float32 only"])
    load()
    engine.step(engine.problem((3, 512, 700, 1100), prefill=True))
    assert engine.logits_of().by_plugin
