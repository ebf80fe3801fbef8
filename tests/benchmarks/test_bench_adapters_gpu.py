"""The benchmark of the adapters on a GPU: a small run of every call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines.command import main

pytestmark = pytest.mark.gpu


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapters.json"
    arguments = ["--rows", "1", "33", "--columns", "1000", "40000", "--k", "512", "2048"]
    limits = ["--launches", "4", "--replays", "3"]
    code = main(["--part", "kernels", *arguments, *limits, "--json", str(file)])
    said = capsys.readouterr().out
    assert code == 0, said
    document = json.loads(file.read_text())
    rows = document["results"]
    assert document["complete"] and {row["suite"] for row in rows} == {"sglang", "tokenspeed"}
    assert [row for row in rows if not row.get("exact") or row["us"] is None] == []
    assert all(row["lowest_index"] for row in rows if row["k"])
    assert all(row["graph"] for row in rows)
