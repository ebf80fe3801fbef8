"""``DSV4_LOG=debug`` tells everything, once, and ``info`` none of it."""

from __future__ import annotations

import pytest
import torch
from case_calls import decode
from conftest import MODES
from kits.told import check_logits, check_no_plugin_logits, check_process, told

NAME = "read_deepseek_v4_indexer_fp8_cache"


def test_everything_is_told(engine, load, caplog):
    from dsv4_plugin.engines.tokenspeed import unregister

    load(DSV4_LOG="debug")
    check_process(told(caplog), "TokenSpeed")
    text = "\n".join(told(caplog))
    for mode in MODES:
        assert f"seam topk.{mode} found: " in text
        assert f"kernel dsv4_plugin_{mode}: registered for {mode}" in text
    assert "seam read.fp8 found: " in text and "seam read.fp8: engaged" in text
    assert f".{NAME}: applied, in place of " in text
    decode(engine, engine.batch((1500, 3)))
    text = "\n".join(told(caplog))
    assert (
        "dsa_decode_topk, k 512, cpu: DSV4_TOPK=auto, top-k in bf16: torch on the plugin's bf16"
        in text
    )
    check_logits(text)
    assert "first call of topk.dsa_decode_topk" in text
    unregister()
    text = "\n".join(told(caplog))
    assert f".{NAME}: reverted to " in text
    assert "kernel dsv4_plugin_dsa_decode_topk: taken out" in text


@pytest.mark.parametrize("can_bf16", [False, True])
def test_the_reasons_against_logits_are_told(engine, load, caplog, no_plugin_logits, can_bf16):
    load(DSV4_LOG="debug")
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    decode(engine, engine.batch((1500, 3)))
    text = "\n".join(told(caplog))
    check_no_plugin_logits(text, can_bf16)


def test_the_reader_tells_what_serves_it(engine, load, caplog):
    load(DSV4_LOG="debug")
    cache, slots = torch.zeros(2, 64 * 132, dtype=torch.uint8), torch.tensor([3, 70])
    read = vars(engine.runtime())[NAME]
    read(cache, slots, 64)
    before = told(caplog)
    assert "read on cpu (float32): torch" in "\n".join(before)
    assert any(m.endswith("first call of read.fp8") for m in before)
    read(cache, slots, 64)
    assert told(caplog) == before


def test_a_second_time_is_told(engine, load, caplog):
    from dsv4_plugin.engines.tokenspeed import register_kernels

    load(DSV4_LOG="debug")
    register_kernels()
    assert any(m.endswith("the plugin's kernels are registered already") for m in told(caplog))


def test_steps_add_no_line(engine, load, caplog):
    load(DSV4_LOG="debug")
    batch = engine.batch((1500, 3))
    decode(engine, batch)
    before = told(caplog)
    for _ in range(3):
        decode(engine, batch)
    assert told(caplog) == before


def test_info_tells_none_of_it(engine, load, caplog):
    load()
    decode(engine, engine.batch((1500, 3)))
    assert told(caplog) == []
