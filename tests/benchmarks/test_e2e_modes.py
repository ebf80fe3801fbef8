"""vLLM's modes, on servers that answer like vLLM and have no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kits.e2e_servers import FAKE, free_ports, tiny_model

from benchmarks.server import drills, modes


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drills, "STATUS_S", 0)
    monkeypatch.setattr(drills, "CROWD", (40, 50))
    monkeypatch.setattr(drills, "ALONE", (70,))


def run(kind: str, folder: Path, *only: str) -> tuple[int, dict[str, Any]]:
    out = folder / "modes.json"
    code = modes.main(
        ["--model", str(tiny_model(folder / "model", kind)), "--json", str(out),
         "--folder", str(folder / "run"), "--server-command", FAKE,
         "--port", str(free_ports(len(modes.SERVERS))), "--only", *only]
    )  # fmt: skip
    return code, json.loads(out.read_text())


def test_every_mode_of_a_model_is_a_pair(tmp_path: Path) -> None:
    names = [server.name for server in modes.SERVERS if server.kinds != ("deepseek_v41",)]
    code, found = run("v4", tmp_path, *(name for name in names if not name.endswith("_off")))
    assert (code, found["complete"]) == (0, True)
    assert found["command"][:3] == ["python", "-m", "benchmarks.server.modes"]
    by_name = {d["name"]: d for d in found["drills"]}
    assert list(by_name) == names and "dspark" not in by_name
    for name, each in by_name.items():
        assert each["requests"] == {"sent": 6, "answered": 6}
        assert each["compared"]["repeats_itself"] == [True]
        on = each["environment"]["DSV4_PLUGIN"] == "1"
        assert on == (not name.endswith("_off")) == bool(each["counters"])
        assert each["arguments"] == by_name[each["base"]]["arguments"] or name == "fp32"
    assert by_name["mtp"]["base"] == "mtp_off" and by_name["fp32"]["base"] == "default_off"
    given = by_name["mtp3"]["arguments"]
    assert json.loads(given[1]) == {"method": "mtp", "num_speculative_tokens": 3}
    assert given[2:] == ["--cudagraph-capture-sizes", "4", "8", "16", "32", "64"]


def test_the_drafter_is_v41s(tmp_path: Path) -> None:
    code, found = run("v41", tmp_path, "dspark")
    assert (code, [d["name"] for d in found["drills"]]) == (0, ["dspark_off", "dspark"])


def test_a_prefix_that_was_not_cached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HITS", "0.0")
    code, found = run("v32", tmp_path, "prefix")
    assert code == 1
    for each in found["drills"]:
        assert each["wrong"] == ["RuntimeError: the prefix cache had ['0.0'] hits"]
