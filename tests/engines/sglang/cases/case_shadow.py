"""Shadow mode in SGLang's own forward: the output does not change, the counters are right."""

from __future__ import annotations

import pytest
import torch
from case_calls import UPSTREAM, batches, dsa_scores
from conftest import expected, names
from kits.engine_parts import canonical, oracle

import dsv4_plugin
from dsv4_plugin.engines.shared import adapter, shadow, shadow_report


@pytest.fixture(autouse=True)
def _no_thread(monkeypatch):
    monkeypatch.setattr(shadow_report, "start", lambda failed: None)
    shadow.kept.clear()


def found(seam="paged"):
    return dsv4_plugin.status()["shadow"][seam]


def entries(problem):
    return sum(min(max(n, 0), problem.k) for n in problem.lengths.tolist())


@batches
@pytest.mark.parametrize(
    ("v2", "raw", "logits"),
    [(False, True, "auto"), (False, True, "engine"), (True, False, "auto")],
    ids=["v1, slots and raw", "v1, slots and raw, DeepGEMM's logits", "v2, slots"],
)
def test_the_output_stays_and_the_counters_are_right(engine, load, batch, v2, raw, logits):
    """Slots are compared directly; the columns, if SGLang asks for them, also show ties."""
    load(DSV4_SHADOW="1", DSV4_TOPK="auto" if raw else "fp32", DSV4_LOGITS=logits)
    problem = engine.problem(**batch, raw=raw)
    out = engine.step(problem, v2=v2)
    want = expected(engine, problem)
    assert torch.equal(canonical(out), canonical(problem.slots(want)))
    if raw:
        assert torch.equal(canonical(problem.raw), want)
    assert names(engine) & UPSTREAM, "SGLang's selection has to run"
    assert "topk.paged.upstream" not in dsv4_plugin.status()["counters"]
    got = found()
    assert got["rows"] == int((problem.lengths > 0).sum())
    assert got["entries"] == entries(problem)
    assert got["lower"] == got["higher"] == 0
    if raw:
        assert got["agree"] + got["tied"] == got["entries"]
    elif not batch.get("ties"):
        assert got["agree"] == got["entries"] and got["worst"] == 1


def test_raw_indices_in_the_other_form(engine, load):
    load(DSV4_SHADOW="1")
    problem = engine.problem((1536, 700, 3, 0), raw=True)
    engine.step(problem, v2=True)
    assert torch.equal(canonical(problem.raw), expected(engine, problem))
    assert found()["agree"] + found()["tied"] == found()["entries"] == 2 * 512 + 3


def test_dsa(engine, load):
    load(DSV4_SHADOW="1")
    problem = engine.problem((1536, 700, 512, 3, 0), k=512)
    scores = dsa_scores(problem)
    got = engine.dsa_step(scores, problem)
    rows = zip(scores, problem.lengths.tolist(), strict=True)
    want = torch.stack([oracle(row[:n], 512) for row, n in rows])
    assert torch.equal(canonical(got), canonical(problem.slots(want)))
    assert "topk.dsa.upstream" not in dsv4_plugin.status()["counters"]
    assert (found("dsa")["rows"], found("dsa")["entries"]) == (4, 3 * 512 + 3)
    assert found("dsa")["agree"] == found("dsa")["entries"]


def test_a_shadow_that_fails_disturbs_nothing(engine, load, monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("kits.sglang_engine.upstream_rows", fails)
    load(DSV4_SHADOW="1", DSV4_STRICT="1", DSV4_TOPK="bf16")
    problem = engine.problem()
    for _ in range(2):
        out = engine.step(problem)
        want = canonical(problem.slots(expected(engine, problem)))
        assert torch.equal(canonical(out), want)
    assert adapter.current().decision.selection is not None
    assert sum("no such kernel" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("logits,row", [("auto", 16), ("engine", 1024)], ids=["auto", "engine"])
def test_what_bf16_saves_is_in_the_status(engine, load, logits, row):
    load(DSV4_LOGITS=logits)
    problem = engine.problem((1500, 3))
    engine.step(problem)
    call = engine.logits_of()
    assert call.dtype == torch.bfloat16
    columns = -(-2 * call.logits.shape[1] // row) * row // 2  # rows of whole 16 or 1,024 bytes
    saved = round(2 * columns * 2 / 2**20, 3)
    assert dsv4_plugin.status()["peaks"] == {"logits.saved_mib": saved}
