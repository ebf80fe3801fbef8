"""The failure drills, against servers that answer like vLLM and have no model."""

from __future__ import annotations

import importlib
import json
import logging
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kits.e2e_servers import FAKE, free_ports, tiny_model
from kits.packaging_tools import ROOT

from benchmarks.server import drills, sglang_side, side, vllm_side
from benchmarks.server.engines import ENGINES
from dsv4_plugin.engines.shared import adapter, import_hooks, source
from dsv4_plugin.engines.shared.decision import INERT
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype

VLLM, SGLANG = drills.DRILLS["vllm"], drills.DRILLS["sglang"]
ALL = [drill.name for drill in VLLM]
NAMES = [drill.name for drill in VLLM if not drill.kinds]  # every model's


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drills, "STATUS_S", 0)
    monkeypatch.setattr(drills, "CROWD", (40, 50, 60))
    monkeypatch.setattr(drills, "ALONE", (70,))


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "drills.json"
    code = drills.main(
        ["--model", str(model), "--json", str(out), "--folder", str(tmp_path / "run"),
         "--server-command", FAKE, "--port", str(free_ports(20)), *arguments]
    )  # fmt: skip
    return code, json.loads(out.read_text())


def wrong(found: dict[str, Any]) -> dict[str, str]:
    return {d["name"]: "; ".join(d["wrong"]) for d in found["drills"] if not d["passed"]}


def test_servers_that_do_as_they_should_pass_every_drill(model: Path, tmp_path: Path) -> None:
    code, found = run(model, tmp_path, "--at-once", "4", "--commit", "abc")
    assert (code, found["complete"], wrong(found)) == (0, True, {})
    by_name = {d["name"]: d for d in found["drills"]}
    assert list(by_name) == NAMES
    for each in by_name.values():
        assert each["requests"] == {"sent": 8, "answered": 8}
        assert each["compared"]["upstream_repeats_itself"] == [True]
        assert [a["identical"] for a in each["compared"]["answers"]] == [True]
    assert by_name["topk"]["environment"] == {"DSV4_PLUGIN": "1", "E2E_FAULT": "topk"}
    assert by_name["topk"]["said"] == [
        "topk failed at a call and was switched off (RuntimeError: drill: topk); upstream serves"
    ]
    assert not (tmp_path / "run" / "library" / "path" / "dsv4_plugin" / "_C.so").exists()
    assert (tmp_path / "run" / "library" / "path" / "dsv4_plugin" / "ops" / "__init__.py").exists()
    assert found["machine"]["commit"] == "abc" and found["command"][2].endswith("server.drills")


def test_a_v41_model_has_drills_of_its_own(tmp_path: Path) -> None:
    own = [name for name in ALL if name not in NAMES]
    code, found = run(tiny_model(tmp_path / "model", "v41"), tmp_path, "--only", *own)
    assert (code, wrong(found)) == (0, {})
    assert found["model"]["model_type"] == "deepseek_v41"
    by_name = {d["name"]: d for d in found["drills"]}
    assert list(by_name) == ["off", *own]
    assert by_name["candidate_select"]["environment"]["E2E_FAULT"] == "candidate_select"
    assert by_name["candidate_select"]["said"] == [
        "topk failed at a call and was switched off (RuntimeError: drill: "
        "candidate_select); the engine serves"
    ]
    assert len(own) == 5


def test_sglang_has_the_same_drills_and_its_modes(model: Path, tmp_path: Path) -> None:
    code, found = run(model, tmp_path, "--engine", "sglang", "--at-once", "5")
    assert (code, wrong(found)) == (0, {})
    by_name = {d["name"]: d for d in found["drills"]}
    assert list(by_name) == [drill.name for drill in SGLANG]
    assert {"topk", "logits", "deep_gemm", "seam", "library", "shadow", "sleep", "off"} <= {
        *by_name
    }
    assert by_name["eager"]["arguments"] == ["--cuda-graph-backend-decode", "disabled"]
    assert by_name["deep_gemm"]["counters"]["topk.paged"] == 4
    assert by_name["shadow"]["shadow"]["paged"] == {"rows": 9, "higher": 0}


def test_a_radix_cache_that_holds_nothing_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FORGETS", "1")
    code, found = run(model, tmp_path, "--engine", "sglang", "--only", "radix")
    assert code == 1
    assert wrong(found) == {"radix": "RuntimeError: the radix cache held 0 of 5000 tokens"}


def test_sglangs_source_looks_changed_to_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / side.OPTIONS).write_text("{}")
    monkeypatch.setenv("E2E_DIR", str(tmp_path))
    monkeypatch.setenv("E2E_FAULT", "seam")
    monkeypatch.setattr(source, "_parse", source._parse)
    monkeypatch.setattr(sglang_side, "after_import", lambda *args: None)
    file = tmp_path / "indexer.py"
    file.write_text(f"from topk import {sglang_side.SEAM}_v2, other\n")
    assert source.Module("indexer", file).binds(f"{sglang_side.SEAM}_v2")
    sglang_side.register()
    read = source.Module("indexer", file)
    assert read.binds("other") and not read.binds(f"{sglang_side.SEAM}_v2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[2026-12-01 06:28:52] DSV4_PLUGIN=0: nothing is patched in SGLang", True),
        (
            "[2026-12-01 06:22:01 TP0] dsv4 active in SGLang 0.5.23, DeepSeek-V4 indexer, k 512",
            True,
        ),
        ("[2026-12-01 06:22:01] topk failed at a call and was switched off (x)", True),
        ("[2026-12-01 06:22:01] SGLang 0.5.23: the engine's own code stays at topk.paged", True),
        ("[2026-12-01 06:28:56] Use dsv4 attention backend for DeepseekV4ForCausalLM", False),
        ("[2026-12-01 06:29:00] server_args={'model_path': 'dsv4 '}", False),
    ],
)
def test_the_plugins_lines_in_sglangs_log(line: str, message: bool) -> None:
    found = ENGINES["sglang"].said.search(line)
    assert (found is not None) is message
    if found:
        assert found[1] == line.partition("] ")[2]


def test_only_bfloat16_breaks_in_deep_gemm() -> None:
    def logits(q: int, logits_dtype: str = "torch.float32") -> tuple[int, str]:
        return q, logits_dtype

    module = types.SimpleNamespace(**{sglang_side.DEEP_GEMM: logits})
    sglang_side._no_bf16(module)
    broken = getattr(module, sglang_side.DEEP_GEMM)
    assert has_logits_dtype(broken)
    assert broken(1) == (1, "torch.float32") and broken(1, logits_dtype="x") == (1, "x")
    with pytest.raises(RuntimeError, match="drill: deep_gemm"):
        broken(1, logits_dtype="torch.bfloat16")


def test_a_result_is_written_before_slower_servers_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run is then ended. A result waits for the base's, because it is compared."""
    out, seen, run_one = tmp_path / "drills.json", [], drills._run

    def names() -> list[str]:
        return [d["name"] for d in json.loads(out.read_text())["drills"]]

    def slow(result: drills.Result, ready: float, timeout: float) -> None:
        run_one(result, ready, timeout)
        until = {"off": [], "topk": ["off", "on"]}.get(result.drill.name)
        end = time.monotonic() + 20
        while until and names() != until and time.monotonic() < end:
            time.sleep(0.02)
        seen.append((result.drill.name, names()))

    monkeypatch.setattr(drills, "_run", slow)
    assert run(model, tmp_path, "--only", "on", "topk")[0] == 0
    assert dict(seen)["topk"] == ["off", "on"]
    assert names() == ["off", "on", "topk"]


@pytest.mark.parametrize(
    ("fault", "names", "says"),
    [
        ({"FAKE_SILENT": "1"}, ["topk"], "0 lines of the log say 'topk failed at a call"),
        ({"FAKE_LOSES": "50"}, ["topk"], "a request of 50 tokens: RuntimeError: completion: 1 to"),
        ({"FAKE_HANGS": "40"}, ["topk"], "a request of 40 tokens: TimeoutError"),
        ({"FAKE_DIES": "no GPU"}, ["topk"], "RuntimeError: no GPU"),
        ({"FAKE_HIGHER": "2"}, ["shadow"], "the shadow of decode saw {'rows': 9, 'higher': 2}"),
        ({"FAKE_FORGETS": "1"}, ["sleep"], "the answers of the two rounds differ"),
    ],
)
def test_what_goes_wrong_is_named(
    fault: dict[str, str],
    names: list[str],
    says: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in fault.items():
        monkeypatch.setenv(name, value)
    code, found = run(model, tmp_path, "--only", *names, "--timeout", "2")
    assert code == 1 and found["complete"] is False
    for name in names:
        assert says in wrong(found)[name]


def test_a_small_model_can_have_a_small_vocabulary(tmp_path: Path) -> None:
    make = [sys.executable, ROOT / "examples" / "make_tiny_v4.py", tmp_path, "--vocabulary"]
    subprocess.run([*make, "20480"], check=True)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 20_480
    refused = subprocess.run([*make, "100"], capture_output=True, text=True)
    assert refused.returncode == 2 and "the tokenizer has 20000 words" in refused.stderr


def result(name: str, alone: list[list[list[int]]], **counters: int) -> drills.Result:
    (drill,) = (d for d in VLLM if d.name == name)
    found = types.SimpleNamespace(processes=[{"counters": counters}])
    server = types.SimpleNamespace(
        name=name, lines=lambda *args: [], workers=lambda: found, engine=ENGINES["vllm"]
    )
    return drills.Result(drill, server, alone=alone)  # type: ignore[arg-type]


def test_calls_of_the_wrong_one_are_an_error() -> None:
    served = result("topk", [], **{"topk.decode": 3, "gather": 1})
    drills._look(served)
    assert "no call was counted as topk.decode.upstream" in served.wrong
    assert "calls were counted as topk.decode" in served.wrong


def test_a_consumer_that_was_served_by_the_engine_is_an_error() -> None:
    calls = dict.fromkeys(("topk.decode", "topk.prefill", "logits.plugin", "gather"), 1)
    served = result("candidates", [], **calls, **{"candidates.source.engine": 1})
    drills._look(served)
    assert "no call was counted as candidates.source, candidates.consumer" in served.wrong
    assert "calls were counted as candidates.source.engine" in served.wrong


def test_answers_other_than_upstreams_are_an_error_where_upstream_repeats_itself() -> None:
    base, other = result("off", [[[1, 2]], [[1, 2]]]), result("topk", [[[1, 2]], [[1, 3]]])
    found = drills._compare(other, base)
    assert other.wrong == ["the answers are not the engine's: prompts of 70 tokens"]
    assert found["answers"][0]["first_difference"] == 1
    unsteady = result("off", [[[1, 2]], [[2, 2]]])
    other.wrong.clear()
    assert drills._compare(other, unsteady)["upstream_repeats_itself"] == [False]
    assert other.wrong == []
    plugin, lost = result("on", [[[1, 2]], [[1, 3]]]), result("topk", [[[]], [[]]])
    for each in (plugin, lost):
        drills._compare(each, base)
        assert each.wrong == []
    slept = result("sleep", [[[1, 2]], [[1, 3]]])
    drills._compare(slept, base)
    assert slept.wrong == ["the answers of the two rounds differ: prompts of 70 tokens"]
    slept.wrong.clear()
    drills._compare(slept, unsteady)
    assert slept.wrong == []


@pytest.mark.parametrize("name", ["topk", "gather"])
def test_the_drills_look_for_what_the_plugin_says(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (drill,) = (d for d in VLLM if d.name == name)
    try:
        with caplog.at_level(logging.INFO, "dsv4_plugin"):
            adapter.current().switch_off(name, RuntimeError(f"drill: {name}"))
    finally:
        adapter.current().decide(INERT)
    assert [bool(re.search(drill.says, record.message)) for record in caplog.records] == [True]


@pytest.mark.parametrize("fault", side.FAULTS)
def test_a_fault_breaks_what_the_adapter_calls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name = side.FAULTS[fault]
    module = importlib.import_module(place)
    monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    side.break_op(fault)
    if fault == "capability":
        assert getattr(module, name)(None) == (7, 5)
    else:
        with pytest.raises(RuntimeError, match=f"drill: {fault}"):
            getattr(module, name)()


@pytest.mark.parametrize("fault", vllm_side.SEAMS)
def test_a_seam_under_other_parameters_does_the_same(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / side.OPTIONS).write_text("{}")
    monkeypatch.setenv("E2E_DIR", str(tmp_path))
    monkeypatch.setenv("E2E_FAULT", fault)
    waiting: dict[str, Any] = {}
    monkeypatch.setattr(vllm_side, "after_import", waiting.__setitem__)
    place, name = vllm_side.SEAMS[fault]
    vllm_side.register()
    module = types.SimpleNamespace(**{name: lambda logits, starts: (logits, starts)})
    waiting[place](module)
    assert getattr(module, name)(1, 2) == (1, 2)
    with pytest.raises(TypeError):
        getattr(module, name)(logits=1, starts=2)


def test_a_seam_is_broken_before_the_plugin_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / side.OPTIONS).write_text("{}")
    monkeypatch.setenv("E2E_DIR", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(vllm_side, "after_import", lambda name, callback: asked.append(name))
    for fault in vllm_side.SEAMS:
        monkeypatch.setenv("E2E_FAULT", fault)
        vllm_side.register()
        assert vllm_side.SEAMS[fault][0] in asked
    assert import_hooks.after_import is not vllm_side.after_import


@pytest.mark.parametrize("register", [vllm_side.register, sglang_side.register])
def test_an_unknown_fault_is_an_error(
    register: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / side.OPTIONS).write_text("{}")
    monkeypatch.setenv("E2E_DIR", str(tmp_path))
    monkeypatch.setenv("E2E_FAULT", "x")
    with pytest.raises(ValueError, match="E2E_FAULT is 'x'; it can be 'topk', 'logits', 'gather'"):
        register()
