"""The benchmarks of the logits and of the chain on a GPU: a small run of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4_plugin.cli.main import main

pytestmark = pytest.mark.gpu


def test_a_small_run_of_the_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "logits.json"
    code = main(["bench", "logits", "--suite", "all", "--rows", "8", "130", "--columns", "1000",
                 "32768", "--dtype", "bfloat16", "float32", "float16", "--launches", "8",
                 "--replays", "3", "--json", str(file)])  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    document = json.loads(file.read_text())
    assert document["complete"] and document["machine"]["gpu"] in said
    assert [row for row in document["results"] if not row["right"]] == []
    assert len(document["results"]) == 12 + 36 + 12 + 12
    large = [r for r in document["results"] if r["suite"] == "decode" and r["rows"] == 130
             and r["columns"] == 32_768]  # fmt: skip
    assert len(large) == 3
    for row in large:  # 562 MB: no faster than the memory is
        assert row["ratio"] > 0.9 and row["cold_us"] == row["warm_us"], row


def test_a_small_run_of_the_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chain.json"
    code = main(["bench", "chain", "--rows", "1", "64", "--columns", "8192", "65536", "--launches",
                 "8", "--replays", "3", "--json", str(file)])  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    document = json.loads(file.read_text())
    rows = document["results"]
    assert document["complete"] and len(rows) == 24
    assert [
        row for row in rows if not (row["exact"] and row["lowest_index"] and row["right"])
    ] == []
    assert all(row["warm_us"] > 0 and row["cold_us"] > 0 for row in rows)
