"""``DSV4_STATUS_DIR``: what a process writes of itself, when, and that it never ends a server."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4_plugin
from dsv4_plugin import envs
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import INERT
from dsv4_plugin.state import Seam, state


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    state.reset()
    yield
    state.reset()
    adapter.current().decide(INERT)
    envs.override(None)


def written(folder: Path) -> dict[str, Any]:
    (file,) = folder.iterdir()
    assert file.suffix == ".json" and file.stem.endswith(f"-{os.getpid()}")
    return json.loads(file.read_text())


def test_nothing_is_written_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state.count("topk.decode")
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_status_process_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "there yet"
    monkeypatch.setenv("DSV4_STATUS_DIR", str(folder))
    state.engine = "vLLM 9.9"
    state.seams["topk.decode"] = Seam("topk.decode", "somewhere")
    assert not folder.exists(), "before a call there is nothing to say"
    state.count("topk.decode")
    data = written(folder)
    assert data["pid"] == os.getpid() and data["plugin"] == dsv4_plugin.__version__
    assert data["counters"] == {"topk.decode": 1} and data["failures"] == {}
    assert {name: data[name] for name in ("engine", "seams", "counters")} == dsv4_plugin.status()


def test_it_is_at_most_half_behind_and_seldom_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_STATUS_DIR", str(tmp_path))
    writes = 0
    replace = os.replace

    def counted(*args: Any) -> None:
        nonlocal writes
        writes += 1
        replace(*args)

    monkeypatch.setattr(os, "replace", counted)
    for n in range(1, 1001):
        state.count("topk.decode")
        assert written(tmp_path)["counters"]["topk.decode"] * 2 > n
    assert writes == 10


def test_a_part_that_was_switched_off_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_STATUS_DIR", str(tmp_path))
    for _ in range(3):
        state.count("topk.decode")
    adapter.current().switch_off("topk", RuntimeError("no kernel image"))
    data = written(tmp_path)
    assert data["counters"] == {"topk.decode": 3}
    assert "no kernel image" in data["failures"]["topk"]


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("DSV4_STATUS_DIR", str(blocked / "folder"))
    with caplog.at_level(logging.WARNING, "dsv4_plugin"):
        for _ in range(4):
            state.count("topk.decode")
    assert state.counters["topk.decode"] == 4
    assert [r for r in caplog.messages if "DSV4_STATUS_DIR" in r] == caplog.messages
    assert len(caplog.messages) == 1


def test_the_engines_configuration_can_name_the_folder(tmp_path: Path) -> None:
    envs.override({"status_dir": str(tmp_path / "Of Mine")})
    state.count("gather")
    assert written(tmp_path / "Of Mine")["counters"] == {"gather": 1}


def test_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do not all run in the folder that the server was started in."""
    monkeypatch.setenv("DSV4_STATUS_DIR", "status")
    with pytest.raises(envs.SettingError, match="DSV4_STATUS_DIR is 'status'.*an absolute path"):
        envs.settings()
