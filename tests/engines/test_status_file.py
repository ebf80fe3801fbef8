"""``DSV4_STATUS_DIR``: the content of a process's file, its time; it never ends a server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4_plugin
from dsv4_plugin import envs, metrics, processes
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
    assert data["started"] == processes.started(os.getpid()) and processes.alive(data)
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


def odd_places(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "nothing")
    return {
        "a file": folder / "file",
        "below a file": folder / "file" / "folder",
        "a link to nothing": folder / "link",
        "a device": Path("/dev/null"),
        "not to be made": Path("/proc/nowhere"),
        "too long a name": folder / ("x" * 300),
        "too long a path": folder / ("x/" * 3000),
        "of bytes": folder / "\udcff" / "\0",
    }


@pytest.mark.parametrize("place", odd_places(Path(tempfile.mkdtemp())))
def test_no_place_breaks_an_engine(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the worker that writes nor the front end that reads."""
    envs.override({"status_dir": str(odd_places(tmp_path)[place])})
    with caplog.at_level(logging.WARNING, "dsv4_plugin"):
        for _ in range(4):
            state.count("topk.decode")
        state.fail("topk", "at a call")
    assert state.counters["topk.decode"] == 4
    assert len(caplog.messages) == 1 and "DSV4_STATUS_DIR: no status is" in caplog.messages[0]
    assert metrics._Files(Path(envs.value("status_dir"))).samples() == []


def test_a_folder_that_goes_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "status"
    monkeypatch.setenv("DSV4_STATUS_DIR", str(folder))
    state.count("topk.decode")
    shutil.rmtree(folder)
    state.count("topk.decode")
    assert written(folder)["counters"] == {"topk.decode": 2}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """A server that reads a named pipe for its metrics would wait for it."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    assert metrics._Files(tmp_path).samples() == []


def test_the_engines_configuration_can_name_the_folder(tmp_path: Path) -> None:
    envs.override({"status_dir": str(tmp_path / "Of Mine")})
    state.count("gather")
    assert written(tmp_path / "Of Mine")["counters"] == {"gather": 1}


def test_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do not all run in the folder that the server was started in."""
    monkeypatch.setenv("DSV4_STATUS_DIR", "status")
    with pytest.raises(envs.SettingError, match="DSV4_STATUS_DIR is 'status'.*an absolute path"):
        envs.settings()
