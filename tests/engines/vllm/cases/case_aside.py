"""``auto`` for V3.2: the calls in which vLLM's own top-k is faster are vLLM's, and no others."""

from __future__ import annotations

import pytest
import torch

import dsv4_plugin
from dsv4_plugin.engines.shared import aside
from dsv4_plugin.engines.shared import aside_table as table

OWN = {"cooperative_topk", "persistent_topk", "top_k_per_row_decode", "top_k_per_row_prefill"}
# At decode from three rows on, none longer than 2,048; at prefill from four rows on.
MEASURED = {("vllm.decode", 512): ((3, 2048, 0),), ("vllm.prefill", 512): ((4, 1024, 0),)}


@pytest.fixture(autouse=True)
def measured(engine, monkeypatch):
    monkeypatch.setattr(table, "LONGEST", MEASURED)
    monkeypatch.setattr(table, "WIDEST", {"vllm.decode": 4096, "vllm.prefill": 4096})
    monkeypatch.setattr(table, "SINCE", {"vllm": (0, 26)})
    monkeypatch.setattr(aside, "BACKENDS", ("torch",))
    monkeypatch.setenv("DSV4_PLUGIN", "1")


def counted():
    counters = dsv4_plugin.status()["counters"]
    return {n: c for n, c in counters.items() if n.startswith("topk") and n.count(".") < 3}


@pytest.mark.parametrize(
    "batch,left",
    [
        ({"decode": (700, 40, 1500)}, True),
        ({"decode": (700, 40)}, False),  # two rows
        ({"decode": (700, 40), "next_n": 2}, True),  # four rows of two requests
        ({"decode": (700, 40, 2500)}, False),  # longer by what vLLM tells its kernels
        ({"decode": (700, 40, 900), "max_model_len": 1024}, True),
        ({"decode": (700, 40, 900), "max_model_len": 8192}, False),  # wider than was measured
    ],
    ids=str,
)
def test_decode_by_rows_and_the_longest_row(engine, run, batch, left):
    problem = engine.problem(**batch)
    got = run(problem, model="deepseek_v32")
    assert torch.equal(got, engine.expected(problem.k))
    assert bool({call.name for call in engine.calls} & OWN) is left
    assert counted() == {"topk.decode.aside" if left else "topk.decode": 1}


@pytest.mark.parametrize("rows,left", [(5, True), (3, False)])
def test_prefill_by_rows(engine, run, rows, left):
    problem = engine.problem(prefill=((900, rows),))
    got = run(problem, model="deepseek_v32")
    assert torch.equal(got, engine.expected(problem.k))
    assert ("top_k_per_row_prefill" in {call.name for call in engine.calls}) is left
    assert counted() == {"topk.prefill.aside" if left else "topk.prefill": 1}


@pytest.mark.parametrize("name,value", [("DSV4_TOPK", "fp32"), ("DSV4_STRICT", "1")])
def test_a_wish_gets_the_plugin_in_every_call(engine, run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("DSV4_INDEXER_READ", "off")  # its ops are not the subject
    if name == "DSV4_STRICT":
        monkeypatch.setenv("DSV4_BACKEND", "torch")
    run(engine.problem(decode=(700, 40, 1500)), model="deepseek_v32")
    assert not {call.name for call in engine.calls} & OWN
    assert counted() == {"topk.decode": 1}


def test_v4_selects_on_logits_that_vllms_kernel_does_not_read(engine, run):
    run(engine.problem(decode=(700, 40, 1500)))
    assert not {call.name for call in engine.calls} & OWN
    assert "topk.decode.aside" not in counted()


def test_a_release_before_the_measured_one_keeps_nothing(engine, run, monkeypatch):
    monkeypatch.setattr(table, "SINCE", {"vllm": (99,)})
    run(engine.problem(decode=(700, 40, 1500)), model="deepseek_v32")
    assert counted() == {"topk.decode": 1}


def test_the_line_names_the_shapes(engine, run, caplog):
    run.build(engine.problem(decode=(700,)), model="deepseek_v32")
    lines = [r.getMessage() for r in caplog.records if r.name == "dsv4_plugin"]
    (line,) = [text for text in lines if " active in " in text]
    assert "left to vLLM " in line
    by = "by rows and the longest row:"
    assert f"faster: decode {by} from 3 on up to 2048; prefill {by} from 4 on up to 1024" in line
