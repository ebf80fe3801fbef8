"""Shadow mode in TokenSpeed: none, because its kernels score and select in one call."""

from __future__ import annotations

import torch
from case_calls import best, decode
from kits.engine_parts import canonical

import dsv4_plugin


def test_it_is_said_once_and_nothing_else_changes(engine, load, caplog):
    load(DSV4_SHADOW="1", DSV4_TOPK="fp32")
    lengths = (1536, 700, 3)
    for _ in range(2):
        got, _ = decode(engine, engine.batch(lengths))
        assert torch.equal(canonical(got), best(engine, lengths, 512))
    said = [r.message for r in caplog.records if "shadow" in r.message]
    assert len(said) == 1 and "not available for dsa_decode_topk" in said[0]
    assert "shadow" not in dsv4_plugin.status()
    assert dsv4_plugin.status()["counters"] == {
        "topk.dsa_decode_topk": 2, "topk.dsa_decode_topk.fp32.torch": 2,
    }  # fmt: skip


def test_nothing_is_said_without_it(engine, load, caplog):
    load()
    decode(engine, engine.batch((700,)))
    assert "shadow" not in caplog.text
