"""The shadow beside DeepSeek-V4.1's layers: what it compares, and that it finds wrong answers."""

from __future__ import annotations

import pytest
import torch
from case_candidates import BATCHES, DTYPES, Model, counters
from case_shadow import _no_thread, enable
from kits import engine_parts, vllm_engine

import dsv4_plugin
from dsv4_plugin.engines.vllm import candidates

__all__ = ["_no_thread"]

BATCH = {"decode": (3000, 700, 2055, 0, 9), "prefill": ((2500, 12), (900, 5))}


@pytest.fixture(params=[False, True], ids=["kept", "by candidates"])
def sparse(request, monkeypatch):
    """Whether a source keeps its logits, and a consumer's prefill chunk is scored whole."""
    if request.param:
        monkeypatch.setattr(candidates, "WHOLE_COLUMNS", 0)
        monkeypatch.setattr(candidates, "KEPT_BYTES", 0)
    return request.param


def shadow():
    return dsv4_plugin.status()["shadow"]


@pytest.mark.parametrize(
    "batch,dtype",
    [(BATCH, "bf16"), (BATCH, "fp32"), (BATCHES["two rows a request"], "bf16")],
    ids=["bf16", "fp32", "two rows a request"],
)
def test_every_selection_of_the_three_layers_is_compared(engine, monkeypatch, sparse, dtype, batch):
    """Rows and entries are those of three layers, and of the source's blocks once."""
    enable(monkeypatch, DSV4_TOPK=dtype, DSV4_STRICT="1")
    model = Model(engine, batch, blocks=513 if sparse else 128)
    got = model()
    want, blocks = model.expected(DTYPES[dtype])
    assert all(map(torch.equal, got, want))
    assert torch.equal(model.candidates[: len(blocks)], blocks)
    assert not {"topk.decode.upstream", "topk.prefill.upstream", "candidates.source.engine"} & set(
        counters()
    )
    decodes = len(batch["decode"]) * batch.get("next_n", 1)
    found = shadow()
    for seam, part in (("decode", slice(decodes)), ("prefill", slice(decodes, None))):
        chosen = torch.cat([layer[part] for layer in want])
        assert found[seam]["entries"] == int((chosen >= 0).sum())
        assert found[seam]["rows"] == int((chosen >= 0).any(1).sum())
    assert found["blocks"]["entries"] == int((blocks >= 0).sum())
    for one in found.values():
        assert one["agree"] + one["tied"] == one["entries"]
        assert one["lower"] == one["higher"] == 0


def test_an_inexact_upstream_is_seen_in_every_layer(engine, monkeypatch, sparse):
    enable(monkeypatch, DSV4_TOPK="fp32")
    exact = engine_parts.upstream_rows

    def drops_the_best(logits, spans, out, k):
        exact(logits, spans, out, k)
        for row, (start, end) in enumerate(spans):
            order = logits[row, start:end].argsort(descending=True)
            if order.numel() > k:
                out[row, out[row] == order[0].int()] = order[-1].int()

    monkeypatch.setattr(vllm_engine, "upstream_rows", drops_the_best)
    Model(engine, BATCH, blocks=513 if sparse else 128)()
    found = shadow()  # rows with more keys than k, each in three layers
    assert (found["decode"]["lower"], found["prefill"]["lower"]) == (3 * 3, 3 * 17)


def test_an_upstream_that_publishes_other_blocks_is_seen(engine, monkeypatch, sparse):
    enable(monkeypatch, DSV4_TOPK="fp32")
    original = engine.indexer._select_candidate_blocks.__wrapped__

    def loses_the_newest(out, **kwargs):
        original(out=out, **kwargs)
        out[out == out.amax(1, keepdim=True)] = 0

    model = Model(engine, BATCH)
    layers = model.build()
    real = candidates._watch_blocks
    monkeypatch.setattr(
        candidates, "_watch_blocks", lambda original, *rest: real(loses_the_newest, *rest)
    )
    model.step(layers)
    found = shadow()["blocks"]
    assert found["agree"] < found["entries"] and found["equal"] < found["rows"]


WRONG = {"select_blocks": "blocks", "candidate_select": "decode"}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_plugin_is_a_warning(engine, monkeypatch, op, caplog):
    """It omits the best column of each row, which the engine's selection contains."""
    from dsv4_plugin.engines.shared import shadow_report

    enable(monkeypatch, DSV4_TOPK="fp32")
    real = getattr(candidates.ops, op)

    def leaves_out_the_best(scores, *args, **kwargs):
        answer = real(scores, *args, **kwargs)
        out = kwargs["out"]
        at = out.clamp_min(0).long()
        if op == "candidate_select":  # its first argument are the queries
            cache, weights, _, lengths, table, _ = args
            scores = candidates.paged_logits(
                scores, cache, weights, lengths, table, block_size=kwargs["block_size"],
                dtype=torch.float32,
            )  # fmt: skip
        value = scores.gather(1, at.clamp(0, scores.shape[1] - 1)).masked_fill(out < 0, -torch.inf)
        if op == "select_blocks":  # infinity is the newest block's
            value = value.masked_fill(value == torch.inf, -torch.inf)
        out.scatter_(1, value.argmax(1, keepdim=True), -1)
        return answer

    monkeypatch.setattr(candidates.ops, op, leaves_out_the_best)
    Model(engine, {"decode": (3000, 2500)})()
    assert shadow()[WRONG[op]]["higher"] > 0
    shadow_report.log_what_changed()
    assert any(
        r.levelname == "WARNING" and WRONG[op] in r.message and "HIGHER" in r.message
        for r in caplog.records
    )


def test_a_shadow_that_fails_changes_no_answer(engine, monkeypatch, caplog):
    enable(monkeypatch, DSV4_STRICT="1")
    model = Model(engine, BATCH)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(candidates, "widen", fails)
    got = model()
    want, _ = model.expected(torch.bfloat16)
    assert all(map(torch.equal, got, want))
    assert sum("out of memory" in r.message for r in caplog.records) == 1
