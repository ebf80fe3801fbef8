"""``DSV4_LOG=debug`` tells everything, once, and ``info`` none of it."""

from __future__ import annotations

import pytest
import torch
from conftest import INDEXER
from kits.seams import moved
from kits.told import check_logits, check_no_plugin_logits, check_process, told


def test_everything_is_told(engine, load, caplog):
    from dsv4_plugin.engines.sglang import unregister

    load(DSV4_LOG="debug")
    check_process(told(caplog), "SGLang")
    text = "\n".join(told(caplog))
    for name in ("flag", "forward", "topk.paged", "logits", "topk.dsa"):
        assert f"seam {name} found: " in text
    for name in engine.topk_names():
        assert f"hook around {INDEXER}.{name}: registered; SGLang applies it" in text
    engine.step(engine.problem())
    text = "\n".join(told(caplog))
    assert (
        "DeepSeek-V4 indexer, k 512, cpu: DSV4_TOPK=auto, top-k in bf16: torch on the plugin's bf16"
        in text
    )
    check_logits(text)
    assert "patch deep_gemm.fp8_mqa_logits: applied, in place of " in text
    assert "first call of topk.paged" in text
    unregister()
    text = "\n".join(told(caplog))
    assert "patch deep_gemm.fp8_mqa_logits: reverted to " in text
    assert f"hook around {INDEXER}.{engine.topk_names()[0]}: taken back" in text


@pytest.mark.parametrize("can_bf16", [False, True])
def test_each_kind_of_call_is_told_with_its_reasons(
    engine, load, caplog, no_plugin_logits, can_bf16
):
    load(DSV4_LOG="debug")
    engine.dsa_step(torch.randn(2, 1536), engine.problem((1500, 3)))
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    engine.step(engine.problem())
    text = "\n".join(told(caplog))
    assert (
        "DSA top-k, k 512, cpu: DSV4_TOPK=auto, top-k in fp32: torch on the engine's float32"
        in text
    )
    check_no_plugin_logits(text, can_bf16)


def test_a_seam_that_is_missing_is_told_with_its_reason(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import probe

    other = moved(probe.SEAMS, "topk.paged", attribute="topk_of_tomorrow")
    monkeypatch.setattr(probe, "SEAMS", other)
    load(DSV4_LOG="debug")
    assert any("seam topk.paged missing: " in m and "tomorrow" in m for m in told(caplog))


def test_a_second_time_is_told(engine, load, caplog):
    from dsv4_plugin.engines.sglang import register

    load(DSV4_LOG="debug")
    register()
    assert any(line.endswith("add_cli_args: already there") for line in told(caplog))


def test_the_command_line_is_told_as_such(engine, load, caplog, monkeypatch):
    import argparse

    from dsv4_plugin import envs, facts
    from dsv4_plugin.engines.sglang.cli_option import OPTION, TopkAction

    load(DSV4_LOG="debug")
    monkeypatch.setattr(envs, "_put", set())
    parser = argparse.ArgumentParser()
    parser.add_argument(OPTION, action=TopkAction)
    parser.parse_args([OPTION, "fp32"])
    facts.process("SGLang")
    assert "setting DSV4_TOPK = fp32 (the command line)" in told(caplog)


def test_steps_add_no_line(engine, load, caplog):
    load(DSV4_LOG="debug")
    problem = engine.problem()
    engine.step(problem)
    before = told(caplog)
    for _ in range(3):
        engine.step(problem)
    assert told(caplog) == before


def test_info_tells_none_of_it(engine, load, caplog):
    load()
    engine.step(engine.problem())
    assert told(caplog) == []


def test_nobody_asked_is_told(engine, load, caplog):
    load(DSV4_PLUGIN="", DSV4_LOG="debug")
    assert any(m.startswith("the plugin is not switched on") for m in told(caplog))
