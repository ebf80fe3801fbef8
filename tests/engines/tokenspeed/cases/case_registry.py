"""Registration: when a kernel is selected and when not, unmet settings, and what serves instead."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from case_calls import decode, prefill
from conftest import MODES
from kits.seams import moved
from kits.told import check_warned, empty_settings, odd_settings

import dsv4_plugin
from dsv4_plugin.errors import SettingError, UnmetError

PLUGIN_KERNELS = [f"dsv4_plugin_{mode}" for mode in MODES]


def lines(caplog, level=logging.INFO):
    return [
        r.getMessage() for r in caplog.records if r.name == "dsv4_plugin" and r.levelno == level
    ]


def chosen(engine):
    return {mode: engine.chosen(mode) for mode in MODES}


def test_the_plugins_kernels_are_selected_on_hopper(engine, load, caplog):
    assert load() == PLUGIN_KERNELS
    assert chosen(engine) == dict(zip(MODES, PLUGIN_KERNELS, strict=True))
    seams = dsv4_plugin.status()["seams"]
    assert {f"topk.{mode}" for mode in MODES} <= set(seams)
    assert dsv4_plugin.status()["engine"].startswith("TokenSpeed 0.1")


def test_the_doctor_shows_the_seams(engine):
    from dsv4_plugin.cli.doctor import report as doctor

    part = doctor.collect()["tokenspeed"]
    assert part["installed"]
    found = {name for name, seam in part["seams"].items() if seam["where"]}
    assert found >= {f"topk.{mode}" for mode in MODES} | {"read.fp8"}, part


@pytest.mark.parametrize("value", ["0", ""], ids=["DSV4_PLUGIN=0", "unset"])
def test_not_asked_for_nothing_is_registered(engine, load, value, caplog):
    assert load(DSV4_PLUGIN=value) == []
    assert chosen(engine) == engine.without_plugin
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    runtime = vars(engine.runtime())
    assert all(runtime[name] is function for name, function in engine.readers.items())
    assert any("DSV4_PLUGIN=0" in line for line in lines(caplog)) is (value == "0")


@odd_settings
def test_not_asked_for_is_inert_whatever_a_variable_holds(engine, load, caplog, variable, value):
    assert load(**{"DSV4_PLUGIN": "", "DSV4_BACKEND": "", variable: value}) == []
    assert chosen(engine) == engine.without_plugin
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    runtime = vars(engine.runtime())
    assert all(runtime[name] is function for name, function in engine.readers.items())
    check_warned(caplog, variable, value)


@empty_settings
def test_an_empty_variable_is_unset(engine, load, variable):
    load(**{variable: ""})
    if variable != "DSV4_BACKEND":  # nothing is compiled here
        decode(engine, engine.batch((1500,)))
        assert dsv4_plugin.status()["counters"]["topk.dsa_decode_topk"] == 1


def test_the_kernel_plugins_can_be_disabled(engine, load, monkeypatch):
    monkeypatch.setenv("TOKENSPEED_KERNEL_DISABLE_PLUGINS", "other,dsv4")
    assert load() == []
    assert chosen(engine) == engine.without_plugin
    assert dsv4_plugin.status()["seams"]["read.fp8"]["engaged"]  # the other entry point's


def test_the_runtime_plugins_can_be_disabled(engine, load, monkeypatch):
    monkeypatch.setenv("TOKENSPEED_DISABLE_PLUGINS", "dsv4")
    assert load() == PLUGIN_KERNELS
    assert "read.fp8" not in dsv4_plugin.status()["seams"]
    name = "read_deepseek_v4_indexer_fp8_cache"
    assert vars(engine.runtime())[name] is engine.readers[name]


def test_one_kernel_can_be_overridden(engine, load, monkeypatch):
    load()
    variable = "TOKENSPEED_KERNEL_OVERRIDE_ATTENTION_DSA_DECODE_TOPK"
    monkeypatch.setenv(variable, engine.without_plugin["dsa_decode_topk"])
    assert engine.chosen("dsa_decode_topk") == engine.without_plugin["dsa_decode_topk"]
    monkeypatch.setenv(variable, "dsv4_plugin")
    assert engine.chosen("dsa_decode_topk") == "dsv4_plugin_dsa_decode_topk"


@pytest.mark.parametrize(
    "mode, traits",
    [
        ("dsa_decode_topk", {"index_k_layout": "packed"}),
        ("dsa_decode_topk", {"q_len": 2}),
        ("dsa_prefill_topk", {"index_k_layout": "packed"}),
    ],
)
def test_other_traits_keep_tokenspeeds(engine, load, mode, traits):
    load()
    assert engine.chosen(mode, **traits) not in PLUGIN_KERNELS


def test_another_gpu_keeps_tokenspeeds(engine, load, caplog):
    """Without an explicit setting the plugin registers nothing there; the line says why."""
    engine.pose(10)
    assert load(DSV4_BACKEND="auto") == []
    (line,) = [line for line in lines(caplog) if "inactive" in line]
    assert "10.0), not Hopper" in line
    assert "not Hopper" in dsv4_plugin.status()["seams"]["topk.dsa_decode_topk"]["why"]


def test_without_the_compiled_kernels_nothing_is_registered(engine, load, caplog, monkeypatch):
    from dsv4_plugin.engines.tokenspeed import registration

    monkeypatch.setattr(registration.cuda, "missing", lambda: "the library is not there")
    assert load(DSV4_BACKEND="auto") == []
    assert chosen(engine) == engine.without_plugin
    said = "the plugin runs without its compiled kernels: the library is not there"
    assert lines(caplog, logging.WARNING) == [said]
    assert any("dsv4 inactive in" in line for line in lines(caplog))


def test_with_the_compiled_kernels_only_hopper_selects_the_plugins(engine, load, monkeypatch):
    from dsv4_plugin.engines.tokenspeed import registration

    monkeypatch.setattr(registration.cuda, "missing", lambda: None)
    assert load(DSV4_BACKEND="auto") == PLUGIN_KERNELS
    assert engine.chosen("dsa_decode_topk") in PLUGIN_KERNELS
    for gpu in (8, 10):
        engine.pose(gpu)
        assert engine.chosen("dsa_decode_topk") not in PLUGIN_KERNELS


def test_off_registers_nothing(engine, load, caplog):
    assert load(DSV4_TOPK="off") == []
    assert chosen(engine) == engine.without_plugin
    assert any("DSV4_TOPK=off" in line for line in lines(caplog))


def test_without_the_plugins_read_the_prefill_is_tokenspeeds(engine, load):
    load(DSV4_INDEXER_READ="off")
    assert engine.chosen("dsa_prefill_topk") == engine.without_plugin["dsa_prefill_topk"]
    assert engine.chosen("dsa_decode_topk") in PLUGIN_KERNELS


@pytest.mark.parametrize("logits,writer", [("auto", "the plugin's"), ("engine", "the engine's")])
def test_one_active_line_a_mode(engine, load, caplog, logits, writer):
    load(DSV4_LOGITS=logits)
    batch = engine.batch((1500, 3))
    decode(engine, batch)
    decode(engine, batch)
    (line,) = [line for line in lines(caplog) if "active" in line]
    assert line.startswith("dsv4 active in TokenSpeed 0.1")
    assert "dsa_decode_topk, k 512" in line and f"bf16 by torch on {writer} bf16 logits" in line
    assert dsv4_plugin.status()["seams"]["topk.dsa_decode_topk"]["engaged"]


def test_twice_is_once(engine, load):
    load()
    load()
    specs = [s.name for s in engine.registry.list_kernels("attention", "dsa_decode_topk")]
    assert specs.count("dsv4_plugin_dsa_decode_topk") == 1


def test_unregister_gives_the_registry_back(engine, load):
    from dsv4_plugin.engines.tokenspeed import unregister

    before = set(engine.registry._by_name)
    load()
    decode(engine, engine.batch((1500,)))
    unregister()
    assert set(engine.registry._by_name) == before
    assert chosen(engine) == engine.without_plugin
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    assert load() == PLUGIN_KERNELS  # and again


# --- wishes ----------------------------------------------------------------------------------


def test_without_bfloat16_in_deepgemm_the_engine_means_float32(engine, load, caplog):
    load(DSV4_LOGITS="engine")
    engine.install_deep_gemm(has_logits_dtype=False)
    batch = engine.batch((1500, 3))
    decode(engine, batch)
    assert engine.calls[-1].dtype == torch.float32
    prefill(engine, [(700, 3)])
    assert engine.calls[-1].dtype == torch.float32
    assert any("takes no logits_dtype" in line for line in lines(caplog))


def test_a_wish_that_cannot_be_met_is_one_error(engine, load):
    load(DSV4_TOPK="bf16", DSV4_BACKEND="auto", DSV4_LOGITS="engine")  # nothing is compiled here
    engine.install_deep_gemm(has_logits_dtype=False)
    with pytest.raises(UnmetError, match="DSV4_TOPK=bf16") as caught:
        decode(engine, engine.batch((1500,)))
    assert len(caught.value.unmet) == 1  # on a CPU `auto` means torch, and only DeepGEMM is missing
    assert "takes no logits_dtype" in str(caught.value)


def test_every_unmet_condition_is_listed(engine, load, monkeypatch):
    from dsv4_plugin.kernels import cuda

    monkeypatch.setattr(cuda, "missing", lambda: "the library is not there")
    engine.pose(8)  # an explicit setting registers the kernel anywhere; its first call raises
    load(DSV4_TOPK="bf16", DSV4_BACKEND="cuda")
    engine.install_deep_gemm(has_logits_dtype=False)
    with pytest.raises(UnmetError) as caught:
        decode(engine, engine.batch((1500,)))
    text = str(caught.value)
    assert (
        "not on a CUDA device" in text
        and "the library is not there" in text
        and "logits_dtype" in text
    )


def test_a_wrong_setting_is_an_error_at_the_first_call(engine, load, caplog):
    load(DSV4_TOPK="bf61")
    assert any("DSV4_TOPK is 'bf61'" in line for line in lines(caplog, logging.WARNING))
    with pytest.raises(SettingError, match="DSV4_TOPK"):
        decode(engine, engine.batch((1500,)))


# --- our op fails ----------------------------------------------------------------------------


def broken(*args, **kwargs):
    raise RuntimeError("no such kernel image")


def test_an_op_that_raises_is_tokenspeeds_call(engine, load, monkeypatch, caplog, upstream):
    load()
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    batch = engine.batch((1500, 3))
    assert decode(engine, batch) == ("upstream", engine.without_plugin["dsa_decode_topk"])
    (_, kwargs) = upstream[-1]
    assert kwargs["q"] is batch["q"] and kwargs["index_k_cache"] is batch["plane"]
    assert kwargs["topk_layout"] == "logical_offsets"
    engine.calls.clear()
    assert decode(engine, batch)[0] == "upstream"
    assert not engine.calls  # the plugin is off and computes no logits any more
    assert len(lines(caplog, logging.ERROR)) == 1
    assert dsv4_plugin.status()["counters"]["topk.dsa_decode_topk.upstream"] == 2
    assert "no such kernel image" in dsv4_plugin.status()["seams"]["topk.dsa_decode_topk"]["why"]


def test_every_mode_falls_back(engine, load, monkeypatch, upstream):
    load()
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    batch = engine.batch((1500, 3))
    q = (batch["q"].to(torch.float8_e4m3fn), torch.empty(0))
    cu = torch.tensor([0, 1500, 1503], dtype=torch.int32)
    assert prefill(engine, [(700, 3)])[0] == "upstream"
    engine.dsv4.dsv4_decode_topk(
        q, batch["weights"], batch["plane"], batch["lengths"][:, None], batch["table"],
        page_size=64, topk=512, max_context_len=1536, plan=None, index_k_format="fp8_scaled",
    )  # fmt: skip
    engine.dsv4.dsv4_prefill_topk(
        q, batch["weights"], batch["plane"], batch["table"], cu, cu[:-1], cu[1:],
        batch["lengths"], page_size=64, topk=512, max_seqlen_k=1536, index_k_format="fp8_scaled",
    )  # fmt: skip
    names = [name for name, _ in upstream]
    assert names == [
        engine.without_plugin[m] for m in MODES if m not in ("dsa_decode_topk", "dsv41_index_topk")
    ]


def test_deepgemm_that_raises(engine, load, upstream, caplog):
    load(DSV4_LOGITS="engine")
    engine.maths.fail_on_bf16 = True
    assert decode(engine, engine.batch((1500,)))[0] == "upstream"
    assert len(lines(caplog, logging.ERROR)) == 1


def test_deepgemm_is_not_asked_where_the_plugin_can(engine, load, upstream, caplog):
    load()
    engine.maths.fail_on_bf16 = True
    engine.deep_gemm.get_paged_mqa_logits_metadata = broken
    decode(engine, engine.batch((1500,)))
    assert not upstream and engine.calls[-1].by_plugin
    assert lines(caplog, logging.ERROR) == []


def test_strict_raises_instead(engine, load, monkeypatch, upstream):
    load(DSV4_STRICT="1")
    monkeypatch.setattr("dsv4_plugin.topk", broken)
    with pytest.raises(RuntimeError, match="no such kernel image"):
        decode(engine, engine.batch((1500,)))
    assert not upstream


# --- seams that are gone ---------------------------------------------------------------------


def test_a_facade_of_another_shape(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.tokenspeed import probe

    other = moved(probe.SEAMS, "topk.dsa_decode_topk", takes=("queries", "weights"))
    monkeypatch.setattr(probe, "SEAMS", other)
    assert "dsv4_plugin_dsa_decode_topk" not in load()
    assert engine.chosen("dsa_decode_topk") == engine.without_plugin["dsa_decode_topk"]
    assert dsv4_plugin.status()["seams"]["topk.dsa_decode_topk"]["where"] is None
    assert any("dsa_decode_topk takes" in line for line in lines(caplog, logging.ERROR))


def test_a_registry_of_another_shape(engine, load, monkeypatch, caplog):
    monkeypatch.setattr(engine.registry_module, "register_kernel", lambda *a, **k: 1 / 0)
    assert load() == []
    assert chosen(engine) == engine.without_plugin
    assert any("ZeroDivisionError" in line for line in lines(caplog, logging.WARNING))


def test_the_adapter_itself_is_broken(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.tokenspeed import readers, registration

    monkeypatch.setattr(registration, "install", lambda: 1 / 0)
    monkeypatch.setattr(readers, "look", lambda: 1 / 0)
    assert load() == []
    assert len(lines(caplog, logging.ERROR)) == 2
    assert chosen(engine) == engine.without_plugin


def test_the_flags_of_the_example_are_accepted(engine):
    """The options in examples/serve_tokenspeed.sh are known to TokenSpeed's own parser."""
    import re
    from pathlib import Path

    root = Path(__file__).resolve().parents[4]
    text = (root / "examples" / "serve_tokenspeed.sh").read_text()
    (command,) = re.findall(r"^exec tokenspeed serve (.*?)(?<!\\)$", text, re.M | re.S)
    options = set(re.findall(r"--[a-z][a-z-]*", command))
    assert options
    runtime = os.environ["PYTHONPATH"].split(os.pathsep)[0]
    source = Path(runtime, "tokenspeed", "runtime", "utils", "server_args.py").read_text()
    known = set(re.findall(r"[\"'](--[a-z][a-z-]*)[\"']", source))
    assert options <= known, options - known
