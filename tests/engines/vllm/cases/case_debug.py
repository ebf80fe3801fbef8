"""``DSV4_LOG=debug`` tells everything, once, and ``info`` none of it."""

from __future__ import annotations

import pytest
from case_calls import BATCHES
from kits.told import check_logits, check_process, forget, told

from dsv4_plugin.engines.vllm import register, unregister

MIXED = BATCHES["mixed"]
TOPKS = ("topk.decode", "topk.prefill", "topk.slots", "topk.fill")
SEAMS = ("guard", *TOPKS, "logits", "gather", "budget")


@pytest.fixture
def said(caplog):
    return lambda: told(caplog)


@pytest.fixture
def anew(engine, monkeypatch, caplog):
    """Register again, as a process that was started with these settings."""

    def start(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        unregister()
        forget()
        caplog.clear()
        register()

    return start


def test_everything_is_told(engine, run, anew, said):
    anew(DSV4_PLUGIN="1", DSV4_LOG="debug", DSV4_TOPKK="bf16")
    check_process(said(), "vLLM")
    text = "\n".join(said())
    assert "nothing reads DSV4_TOPKK; did you mean DSV4_TOPK?" in text
    for name in SEAMS:
        assert f"seam {name} found: " in text
    assert "patch SparseAttnIndexer.__init__: applied, in place of vllm." in text
    run(engine.problem(**MIXED))
    text = "\n".join(said())
    assert "k 512, cpu, DeepSeek-V4; eligible" in text
    assert "the first of the DeepSeek-V4 layers: DSV4_TOPK=auto, top-k in bf16: torch on " in text
    check_logits(text)
    assert "DSV4_INDEXER_READ=auto, key gather by torch: yes" in text
    assert "gather on cpu (uint8): torch" in text
    assert "first call of topk.decode" in text and "first call of gather" in text
    unregister()
    assert "patch SparseAttnIndexer.__init__: reverted to vllm." in "\n".join(said())


def test_the_reasons_against_a_dtype_are_told(engine, run, anew, said):
    anew(DSV4_PLUGIN="1", DSV4_LOG="debug")
    run.build(engine.problem(**MIXED), model="deepseek_v32")
    run.build(engine.problem(decode=(700, 40), prefill=((600, 4),), k=256))
    text = "\n".join(said())
    assert "k 512, cpu, DeepSeek-V3.2-like; eligible" in text
    assert "vLLM keeps it: index_topk is 256" in text
    assert "top-k in fp32: no: index_topk is 256" in text


@pytest.mark.parametrize("whose", ["auto", "engine"])
def test_who_was_asked_for_logits_is_told_in_order(
    engine, run, anew, said, no_plugin_logits, can_bf16, whose
):
    anew(DSV4_PLUGIN="1", DSV4_LOG="debug", DSV4_LOGITS=whose)
    run.build(engine.problem(**MIXED))
    told = [line for line in said() if f"DSV4_LOGITS={whose}, bf16 logits by" in line]
    if whose == "auto":
        assert (
            "bf16 logits by plugin: no: plugin's logits by torch: the library is not" in told.pop(0)
        )
    (line,) = told
    assert f"bf16 logits by engine: {'yes' if can_bf16 else 'no: vLLM'}" in line


def test_a_seam_that_is_missing_is_told_with_its_reason(engine, anew, said, monkeypatch):
    unregister()
    monkeypatch.delattr(engine.indexer, "SparseAttnIndexer")
    anew(DSV4_PLUGIN="1", DSV4_LOG="debug")
    assert f"vLLM {engine.version}: seam guard missing: SparseAttnIndexer is gone" in said()


def test_a_setting_of_the_engines_configuration_is_told(engine, run, anew, said):
    anew(DSV4_LOG="info")
    assert said() == []
    run.build(engine.problem(**MIXED), config={"dsv4": {"log": "debug", "topk": "fp32"}})
    lines = said()
    assert "setting DSV4_TOPK = fp32 (additional_config['dsv4'])" in lines
    assert "setting DSV4_PLUGIN = 1 (additional_config['dsv4'])" in lines
    assert "setting DSV4_STRICT = 0 (the default)" in lines


def test_a_second_time_is_told(engine, anew, said):
    from dsv4_plugin.engines.vllm import install

    anew(DSV4_PLUGIN="1", DSV4_LOG="debug")
    install.install(engine.indexer)
    assert any(line.endswith("sparse_attn_indexer is patched already") for line in said())


def test_steps_add_no_line(engine, anew, said):
    """Each line once: code that runs at every step logs nothing from the second time on."""
    anew(DSV4_PLUGIN="1", DSV4_LOG="debug")
    problem = engine.problem(**MIXED)
    with engine.gpu(), engine.config():
        layer = engine.layer(problem)
        engine.step(layer, problem)
        before = said()
        assert len(before) == len(set(before))
        for _ in range(3):
            engine.step(layer, problem)
    assert said() == before


def test_info_tells_none_of_it(engine, run, anew, said):
    anew(DSV4_PLUGIN="1")
    run(engine.problem(**MIXED))
    assert said() == []
