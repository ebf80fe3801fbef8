"""The tables of docs/vllm.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kits.marked import between
from kits.packaging_tools import ROOT

from benchmarks.tables import readme as figures
from benchmarks.tables import server as tables

PAGE = ROOT / "docs" / "vllm.md"


@pytest.mark.parametrize("mark", ["modes", "drills"])
def test_the_tables_are_those_of_the_results(mark: str) -> None:
    assert between(PAGE, mark).strip() == getattr(tables, mark)()


def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict:
    document = json.loads((figures.RESULTS / name).read_text())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return document


def test_a_drill_that_did_not_pass_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tables.DRILLS[0]
    monkeypatch.setattr(tables, "DRILLS", (name,))
    document = changed(tmp_path, monkeypatch, name)
    document["drills"][1] |= {"passed": False, "wrong": ["a request of 40 tokens: lost"]}
    (tmp_path / name).write_text(json.dumps(document))
    (line,) = (line for line in tables.drills().splitlines() if line.startswith("| on |"))
    assert line.endswith("| no: a request of 40 tokens: lost |")


def test_answers_that_are_alike_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = changed(tmp_path, monkeypatch, tables.MODES)
    runs = document["outputs"]["token_ids"]["off"]
    runs[1] = runs[0]
    document["outputs"]["repeatable"]["off"] = [True] * len(runs[0])
    document["outputs"]["as_baseline"]["fp32"][0]["identical"] = True
    (tmp_path / tables.MODES).write_text(json.dumps(document))
    table = tables.modes()
    assert f"| off | default graphs | no plugin | {len(runs[0])} |  |" in table
    (line,) = (line for line in table.splitlines() if line.startswith("| fp32 |"))
    assert line.endswith(" | 0 | 1 |")


def test_several_requests_have_their_kernels_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = changed(tmp_path, monkeypatch, figures.SERVER)
    chosen = [p for p in document["profiles"] if p["concurrency"] > 1]
    chosen[0]["servers"]["off"]["chain_us_layer"] = 987.65
    (tmp_path / figures.SERVER).write_text(json.dumps(document))
    row = f"| {chosen[0]['concurrency']} x {chosen[0]['context']:,} | "
    (line,) = (line for line in figures.server().splitlines() if line.startswith(row))
    assert "| 987.6 / " in line or "| 987.7 / " in line
    for entry in document["summary"]:
        if entry["figure"] == "ttft_s":
            assert f"{entry['context']:,} tokens {entry['off']:.2f} / " in figures.server()
