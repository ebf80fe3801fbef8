"""Installing, restoring, other plugins, and missing seams."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from case_calls import whose
from conftest import BUDGET, FACTORIES, INDEXER, SINCE, expected, names, places
from kits.engine_parts import canonical
from kits.seams import moved

import dsv4_plugin
from dsv4_plugin.errors import UnmetError

COMPUTE = {"forward_c4_indexer", "topk_transform"}
LATE = {"budget", "topk.candidates", "topk.full"}  # seams that older releases do not have
SEAMS = {"flag", "forward", "topk.paged", "logits", "topk.dsa", *LATE}


def hooked(engine):
    """The targets that the registry hooks, if this release has them."""
    late = {*FACTORIES, *BUDGET} if engine.version >= SINCE else set()
    return {*COMPUTE, *engine.topk_names(), "add_cli_args", *late}


def all_there(engine, seams):
    """Whether each seam was found that this release has, and no other."""
    found = {name for name, seam in seams.items() if seam["where"]}
    return set(seams) == SEAMS and found == SEAMS - (LATE if engine.version < SINCE else set())


def changed(engine):
    now = places(engine)
    return {
        name for (owner, name), value in engine.pristine.items() if now[owner, name] is not value
    }


def messages(caplog, level):
    return [
        r.getMessage() for r in caplog.records if r.name == "dsv4_plugin" and r.levelno == level
    ]


def test_register_imports_nothing_of_the_indexer(start):
    assert not start.indexer_loaded
    assert not {n for n in start.imported if n.startswith("sglang") and "hook_registry" not in n}


def test_the_loader_applies_every_hook(engine, load):
    load()
    assert changed(engine) == hooked(engine)
    engine.step(engine.problem())  # DeepGEMM is wrapped when it is first needed
    assert {"fp8_paged_mqa_logits", "fp8_mqa_logits"} <= changed(engine)
    assert all_there(engine, dsv4_plugin.status()["seams"]), dsv4_plugin.status()


def test_the_doctor_shows_the_seams(engine):
    from dsv4_plugin.cli.doctor import report as doctor

    part = doctor.collect()["sglang"]
    assert part["installed"]
    assert all_there(engine, part["seams"]), part


@pytest.mark.parametrize("value", ["0", ""], ids=["DSV4_PLUGIN=0", "unset"])
def test_not_asked_for_nothing_is_patched(engine, load, caplog, value):
    """Only the option stays known, so that a command line with it still starts."""
    load(DSV4_PLUGIN=value, DSV4_TOPK="bf16")
    engine.step(engine.problem())
    assert changed(engine) == {"add_cli_args"}
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    said = any("DSV4_PLUGIN=0" in m for m in messages(caplog, logging.INFO))
    assert said is (value == "0")


def test_sglang_plugins_is_an_allow_list(engine, load, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "somebody_else")
    load()
    assert changed(engine) == set()
    monkeypatch.setenv("SGLANG_PLUGINS", "somebody_else,dsv4")
    load()
    assert "forward_c4_indexer" in changed(engine)


def test_twice_is_once(engine, load):
    load()
    first = places(engine)
    load()
    assert all(places(engine)[key] is value for key, value in first.items())
    engine.step(engine.problem())
    assert dsv4_plugin.status()["counters"]["topk.paged"] == 1


def test_unregister_restores_every_attribute(engine, load):
    from dsv4_plugin.engines.sglang import unregister

    load()
    engine.step(engine.problem())
    assert changed(engine)
    unregister()
    assert changed(engine) == set()
    assert dsv4_plugin.status() == {"engine": None, "seams": {}, "counters": {}}
    engine.calls.clear()
    engine.step(engine.problem())
    assert names(engine) == {"paged_logits", "topk_v2"}
    load()  # and again
    engine.step(engine.problem())
    assert dsv4_plugin.status()["counters"]["topk.paged"] == 1


# --- other plugins ---------------------------------------------------------------------------


def other_plugin(engine, kind, name=1):
    """Register a hook of a second plugin on a top-k of SGLang's; returns its record of calls."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    seen = []

    def around(original, scores, *args, **kwargs):
        seen.append(scores.dtype)
        return original(scores, *args, **kwargs)

    def replace(scores, lengths, table, out, page_size, *rest):
        seen.append(scores.dtype)
        out.fill_(5)

    hook = around if kind == "AROUND" else replace
    target = f"{INDEXER}.{engine.topk_names()[name]}"
    HookRegistry.register(target, hook, getattr(HookType, kind))
    return seen


def test_a_second_plugin_around_this_one_keeps_float32(engine, load, monkeypatch, caplog):
    """It would see bfloat16 scores that it may not know: no call is taken."""
    from dsv4_plugin.engines.sglang import register

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    register()
    seen = other_plugin(engine, "AROUND")  # registered after the plugin's hook: wraps it
    load()
    problem = engine.problem()
    out = engine.step(problem)
    assert seen == [torch.float32]
    assert names(engine) == {"paged_logits", "topk_v2"}
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert any("hooked by other code" in m for m in messages(caplog, logging.INFO))


def test_a_second_plugin_around_this_one_and_an_explicit_wish(engine, load, monkeypatch):
    from dsv4_plugin.engines.sglang import register

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    register()
    other_plugin(engine, "AROUND")
    load(DSV4_TOPK="bf16")
    with pytest.raises(UnmetError, match="other_plugin.<locals>.around"):
        engine.step(engine.problem())


def test_a_second_plugin_inside_this_one_is_what_the_fallback_calls(engine, load, monkeypatch):
    seen = other_plugin(engine, "AROUND")  # registered before the plugin's hook, which wraps it
    load()
    engine.step(engine.problem())
    assert seen == [] and dsv4_plugin.status()["counters"]["topk.paged"] == 1
    monkeypatch.setattr("dsv4_plugin.topk", lambda *a, **k: 1 / 0)
    engine.step(engine.problem())
    assert seen == [torch.float32]


def test_a_second_plugin_that_replaces_upstream_stays_below_this_one(engine, load):
    seen = other_plugin(engine, "REPLACE")
    load()
    problem = engine.problem((1500,))
    out = engine.step(problem)
    assert seen == []
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))


@whose
def test_an_attribute_replaced_later_is_noticed(engine, load, caplog, whose):
    """bfloat16 is not written once its reader has been replaced."""
    from dsv4_plugin.engines.sglang import unregister

    load(DSV4_LOGITS=whose)
    engine.step(engine.problem())
    seen = []

    def other(scores, *args):
        seen.append(scores.dtype)

    name = engine.topk_names()[1]
    setattr(engine.indexer, name, other)
    engine.step(engine.problem())
    assert seen == [torch.float32]
    unregister()
    assert vars(engine.indexer)[name] is other
    assert any("patched by other code" in m for m in messages(caplog, logging.WARNING))


def test_a_deepgemm_patched_later_is_left_alone(engine, load, caplog):
    from dsv4_plugin.engines.sglang import unregister

    load()
    engine.step(engine.problem())

    def other(*args, **kwargs):
        raise AssertionError("not called")

    engine.deep_gemm.fp8_mqa_logits = other
    unregister()
    assert engine.deep_gemm.fp8_mqa_logits is other
    assert any("deep_gemm.fp8_mqa_logits" in m for m in messages(caplog, logging.WARNING))


# --- seams that are gone ---------------------------------------------------------------------


def test_topk_functions_of_another_name(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import probe

    other = moved(probe.SEAMS, "topk.paged", attribute="topk_of_tomorrow")
    monkeypatch.setattr(probe, "SEAMS", other)
    load()
    problem = engine.problem()
    out = engine.step(problem)
    assert names(engine) == {"paged_logits", "topk_v2"}
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert any("topk_of_tomorrow" in m for m in messages(caplog, logging.INFO))
    assert dsv4_plugin.status()["seams"]["topk.paged"]["where"] is None


def test_topk_functions_of_another_name_and_a_wish(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import probe

    other = moved(probe.SEAMS, "topk.paged", attribute="topk_of_tomorrow")
    monkeypatch.setattr(probe, "SEAMS", other)
    load(DSV4_TOPK="bf16")
    assert any("topk_of_tomorrow" in m for m in messages(caplog, logging.ERROR))
    with pytest.raises(UnmetError, match="topk.paged was not found"):
        engine.step(engine.problem())


def test_a_forward_of_another_shape(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import probe

    attribute = "C4IndexerBackendMixin.forward_c5_indexer"
    monkeypatch.setattr(probe, "SEAMS", moved(probe.SEAMS, "forward", attribute=attribute))
    load()
    engine.step(engine.problem())
    assert names(engine) == {"paged_logits", "topk_v2"}
    assert "forward_c4_indexer" not in changed(engine)
    assert dsv4_plugin.status()["seams"]["forward"]["where"] is None


def test_a_topk_that_takes_something_else(engine, load, monkeypatch, caplog):
    """The name exists with a new meaning, so the plugin does not use it."""
    name = engine.topk_names()[1]
    real = engine.pristine[engine.indexer, name]

    def tomorrow(scores, seq_lens, page_tables, out, size, *rest, policy=None):
        return real(scores, seq_lens, page_tables, out, size, *rest)

    monkeypatch.setattr(engine.indexer, name, tomorrow)
    load()
    engine.step(engine.problem())
    assert names(engine) == {"paged_logits", "topk_v2"}
    assert engine.logits_of().dtype == torch.float32
    assert any("policy" in m for m in messages(caplog, logging.INFO))


def test_no_hook_registry(engine, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import register

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    register()
    (line,) = messages(caplog, logging.WARNING)
    assert "no hook registry" in line
    assert changed(engine) == set()


def test_the_adapter_itself_is_broken(engine, load, monkeypatch, caplog):
    from dsv4_plugin.engines.sglang import install as seams

    monkeypatch.setattr(seams, "install", lambda: 1 / 0)
    load()
    assert any("could not be registered" in m for m in messages(caplog, logging.ERROR))
    engine.step(engine.problem())
    assert names(engine) == {"paged_logits", "topk_v2"}
