"""``dsv4-plugin doctor``: an answer on every machine, in text and in JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsv4_plugin
from dsv4_plugin import envs
from dsv4_plugin.cli import main as cli
from dsv4_plugin.cli.doctor import report as doctor
from dsv4_plugin.cli.shared import screen
from dsv4_plugin.engines.sglang import probe as sglang_probe
from dsv4_plugin.engines.shared.source import Site
from dsv4_plugin.engines.tokenspeed import probe as tokenspeed_probe
from dsv4_plugin.engines.vllm import probe as vllm_probe
from dsv4_plugin.kernels import cuda
from dsv4_plugin.ops import dispatch as backends

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "versions",
    "gpu",
    "library",
    "settings",
    "unknown_variables",
    "ops",
    "aside",
    "entry_points",
    "vllm",
    "sglang",
    "tokenspeed",
    "check",
    "status_dir",
    "exit_code",
    "verdict",
    "next",
}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


PROBES = {"vllm": vllm_probe, "sglang": sglang_probe, "tokenspeed": tokenspeed_probe}
engines = pytest.mark.parametrize("engine", PROBES)


@pytest.fixture
def engines_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda distribution: "0.99.0")


def test_json_has_every_part(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert set(data) == PARTS
    assert code == data["exit_code"] == 1
    assert data["versions"]["python"].count(".") == 2
    assert set(data["settings"]) == {v.name for v in envs.VARIABLES}
    assert {name.split()[0] for name in data["ops"]} == set(backends._FORMS)  # no op is forgotten
    topk = data["ops"]["topk bfloat16 k=512"]
    assert topk["auto"] == "torch"
    assert any("not on a CUDA device" in reason for reason in topk["unmet"]["cuda"])
    assert set(data["entry_points"]) == set(doctor.GROUPS)


def test_it_fits_a_screen_and_ends_with_what_to_do_next(
    no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(len(line) for line in lines[:-2]) <= 100
    assert lines[-2].startswith("note: ") and lines[-1].startswith("next: run doctor on the ")


def test_all_has_every_setting(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines[:-2]) <= 100
    for variable in envs.VARIABLES:
        assert any(line.strip().startswith(variable.name) for line in lines)


@pytest.mark.parametrize("form", ["short", "all"])
@pytest.mark.parametrize("columns", [60, 80, 160])
def test_on_a_terminal_every_line_fits(
    columns: int, form: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "columns", lambda: columns)
    monkeypatch.setenv("DSV4_TOPKK", "bf16")
    data = doctor.collect()
    text = doctor.render(data, form == "all")
    assert max(map(len, text.splitlines())) <= columns
    assert " ".join(text.split()).endswith(f"{data['verdict']} next: {data['next']}")


def test_a_full_report_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three engines, eight GPUs, every setting given, seams that moved."""
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, variable.default)
    data = doctor.collect()
    card = {"name": "NVIDIA H20", "capability": "9.0", "multiprocessors": 78, "memory_gib": 96.0}
    data["gpu"] = {"devices": [card] * 8, "why": None, "cuda": "13.0", "driver": "580"}
    for engine in doctor.ENGINES:
        seams = {f"s{i}": {"where": "a.b" if i else None, "why": "it is gone"} for i in range(9)}
        data[engine] = {"installed": True, "seams": seams, "why": None}
    text = doctor.render(data)
    assert len(text.splitlines()) <= 30
    assert "8 of 9 seams found; s0: not found: it is gone" in text


def test_a_status_folder_that_cannot_be_used_is_said(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for good in ("", str(tmp_path), str(tmp_path / "new" / "folder")):
        monkeypatch.setenv("DSV4_STATUS_DIR", good)
        assert doctor.collect()["status_dir"] is None
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("DSV4_STATUS_DIR", str(file))
    data = doctor.collect()
    said = f"DSV4_STATUS_DIR {file} cannot be used: {file} is no folder"
    assert data["verdict"].endswith(f"; no status can be written: {said}")
    assert said in " ".join(doctor.render(data).split())


def test_the_check_compares_with_torch(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._check() == {"ran": False, "exact": None, "why": "there is no GPU"}
    assert doctor._check("cpu", "torch") == {"ran": True, "exact": True, "why": None}
    right = dsv4_plugin.topk

    def topk(*args: Any, backend: str) -> torch.Tensor:
        found = right(*args, backend="torch")
        return found if backend == "torch" else found.roll(1, 0)

    monkeypatch.setattr(dsv4_plugin, "topk", topk)
    monkeypatch.setitem(backends._UNMET, "cuda", lambda call: [])
    data = doctor.collect() | {"check": doctor._check("cpu", "cuda")}
    assert data["check"]["exact"] is False
    code, verdict, then = doctor._verdict(data)
    assert code == 1 and "failed: its answer is not exact" in verdict
    assert then.startswith("report this") and "ANOTHER answer" in doctor.render(data)


def test_a_check_that_raises_is_no_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(backends._UNMET, "cuda", lambda call: [])
    monkeypatch.setattr(doctor, "_check", broken)
    data = doctor.collect()
    assert data["exit_code"] == 1 and "no kernel image is available" in data["verdict"]
    assert "FAILED: RuntimeError" in doctor.render(data)


H20 = {"name": "NVIDIA H20", "capability": "9.0", "multiprocessors": 78, "memory_gib": 96.0}
REPAIRS = {
    "no GPU": (
        {"library": {"present": True, "loads": True}},
        "run doctor on the machine of the engine: the kernels need compute capabil",
    ),
    "no GPU, no library": (
        {"library": {"present": False, "loads": False}},
        f"in a checkout, with nvcc on PATH: `{cuda.REPAIR}`; then run doctor on the machine",
    ),
    "an older GPU": ({"gpu": {"devices": [H20 | {"capability": "8.0"}]}}, "run doctor on the mach"),
    "no library": (
        {"gpu": {"devices": [H20]}, "library": {"present": False, "loads": False}},
        f"in a checkout, with nvcc on PATH: `{cuda.REPAIR}`",
    ),
    "a broken one": (
        {"gpu": {"devices": [H20]}, "library": {"present": True, "loads": False}},
        "`pip install --force-reinstall apache-tvm-ffi`",
    ),
}


@pytest.mark.parametrize(("parts", "said"), REPAIRS.values(), ids=REPAIRS)
def test_what_to_do_next(parts: dict[str, Any], said: str, no_gpu: None) -> None:
    data = doctor.collect() | parts
    _, verdict, then = doctor._verdict(data)
    assert then.startswith(said)
    bare = not data["gpu"].get("devices") and not data["library"]["present"]
    assert ("no kernels in this installation" in verdict) == bare


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
def test_a_wrong_setting_is_shown_and_is_exit_code_2(
    variable: envs.Variable,
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable.name, "nonsense")
    assert doctor.run(as_json=False) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"error: a setting is wrong: {variable.name} is 'nonsense'")
    assert lines[-1] == f"next: correct {variable.name}, or unset it"
    wrong = [line for line in lines if "WRONG" in line]
    assert len(wrong) == 1 and variable.name in wrong[0]
    assert not any("REFUSED" in line for line in lines)


def test_an_empty_setting_is_the_default(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "")
    settings = doctor.collect()["settings"]
    for variable in envs.VARIABLES:
        row = {"value": variable.default, "set": False, "error": None}
        assert settings[variable.name] == row


def test_every_wrong_setting_is_shown(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "nonsense")
    settings = doctor.collect()["settings"]
    assert all(name in row["error"] for name, row in settings.items())


def test_a_mistyped_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_TOPKK", "bf16")
    monkeypatch.setenv("DSV4_CUDA_ARCHS", "90a")
    data = doctor.collect()
    assert data["unknown_variables"]["DSV4_TOPKK"] == "DSV4_TOPK"
    assert "DSV4_CUDA_ARCHS" not in data["unknown_variables"]
    assert "DSV4_TOPKK" in doctor.render(data)
    assert data["verdict"].endswith("; nothing reads DSV4_TOPKK (did you mean DSV4_TOPK?)")


def test_the_kill_switch_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    data = doctor.collect()
    assert data["exit_code"] == 1 and "DSV4_PLUGIN=0" in data["verdict"]


def test_a_wish_that_cannot_be_met_is_shown(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKEND", "cuda")
    data = doctor.collect()
    assert data["exit_code"] == 1
    assert "backend 'cuda' for topk" in data["verdict"]
    assert data["ops"]["read_mxfp4 float32"]["error"] is None, "it has no CUDA form"


def test_exit_code_0_where_the_kernels_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._UNMET, "cuda", lambda call: [])
    monkeypatch.setattr(cuda, "missing", lambda: None)
    data = doctor.collect()
    assert data["exit_code"] == 0
    assert data["library"]["loads"] is True
    assert data["library"]["present"] is cuda.LIBRARY.is_file()
    assert doctor.render(data).splitlines()[-2].startswith("ok: ")
    assert data["next"].startswith("`vllm serve --plugin dsv4`")


@engines
@pytest.mark.parametrize("error", [RuntimeError("seam moved"), SystemExit(3)])
def test_a_probe_that_raises_is_shown(
    error: BaseException, engine: str, engines_are_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> Any:
        raise error

    monkeypatch.setattr(PROBES[engine], "look", look)
    data = doctor.collect()
    assert data[engine]["installed"] and not data[engine]["seams"]
    assert type(error).__name__ in data[engine]["why"]
    assert type(error).__name__ in doctor.render(data)


@engines
def test_what_the_probe_finds_is_shown(
    engine: str,
    engines_are_there: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def look() -> dict[str, Site]:
        print("an engine that logs to stdout")
        return {
            "topk.decode": Site("SparseIndexerTopk.forward"),
            "gather": Site(None, "it is gone"),
        }

    monkeypatch.setattr(PROBES[engine], "look", look)
    doctor.run(as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data[engine]["seams"]["topk.decode"]["where"] == "SparseIndexerTopk.forward"
    text = doctor.render(data)
    assert "0.99.0: 1 of 2 seams found; gather: not found: it is gone" in text
    assert "SparseIndexerTopk.forward" in doctor.render(data, everything=True)


@pytest.mark.parametrize("part", sorted(PARTS - {"exit_code", "verdict", "next"}))
def test_a_part_that_breaks_does_not_break_the_report(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise OSError("broken on purpose")

    if part in doctor.ENGINES:
        monkeypatch.setattr(doctor, "_engine", lambda name: broken())
    else:
        monkeypatch.setattr(doctor, f"_{part}", broken)
    data = doctor.collect()
    assert data[part] == {"error": "OSError: broken on purpose"}
    assert "broken on purpose" in doctor.render(data)
    json.dumps(data)


WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "tvm_ffi", "vllm", "sglang"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from dsv4_plugin.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_without_torch_and_without_an_engine(form: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "doctor", *form],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "torch cannot be imported" in done.stdout
    if form:
        assert "torch" in json.loads(done.stdout)["ops"]["error"]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        name="NVIDIA H20", major=9, minor=0, multi_processor_count=78, total_memory=96 << 30
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "missing", lambda: "the compiled library cannot be loaded")
    data = doctor.collect()
    assert data["gpu"]["devices"] == [
        {
            "name": "NVIDIA H20",
            "capability": "9.0",
            "multiprocessors": 78,
            "memory_gib": 96.0,
        }
    ]
    assert data["exit_code"] == 1
    assert data["ops"]["topk bfloat16 k=512"]["auto"] == "torch"
    assert data["ops"]["gather uint8"]["auto"] == "triton"
    text = doctor.render(data)
    assert "NVIDIA H20, compute capability 9.0, 78 SMs, 96.0 GiB" in text
    assert "_C.so         the compiled library cannot be loaded" in text
    assert "not cuda: the compiled library cannot be loaded" in doctor.render(data, True)


def test_the_verdict_without_a_gpu_says_why(no_gpu: None) -> None:
    verdict = doctor.collect()["verdict"]
    assert re.match(
        r"no GPU here \((this torch is built without CUDA|torch sees no GPU)\): ", verdict
    )


def test_the_verdict_on_a_gpu_says_what_the_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._UNMET, "cuda", lambda call: ["this GPU is an older one"])
    data = doctor.collect() | {"gpu": {"devices": [{"name": "NVIDIA A100"}]}}
    assert doctor._verdict(data)[1].startswith("this GPU is an older one: the ops run here on ")


def test_all_is_not_for_releases(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--all", "--engines", "vllm@/"]) == 2
    assert "--all is for what is installed here" in capsys.readouterr().err
