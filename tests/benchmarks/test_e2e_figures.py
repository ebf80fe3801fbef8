"""The tables of whole servers are those of the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kits.marked import between
from kits.packaging_tools import ROOT

from benchmarks.server.drills import DRILLS
from benchmarks.tables import readme as figures
from benchmarks.tables import server as tables

DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("page", "mark", "text"),
    [
        ("development/vllm.md", "modes", tables.modes),
        ("development/vllm.md", "drills", tables.drills),
        ("development/sglang.md", "sglang-drills", tables.sglang_drills),
        ("results.md", "sglang-server", tables.sglang),
        ("results.md", "tokenspeed-server", tables.tokenspeed),
        ("ab.md", "ab", tables.ab),
    ],
)
def test_the_tables_are_those_of_the_results(page: str, mark: str, text: Callable[[], str]) -> None:
    assert between(DOCS / page, mark).strip() == text()


@pytest.mark.parametrize(
    ("engine", "files", "names"),
    [
        ("vllm", tables.DRILLS[:3],
         {"candidate_seam", "candidates", "block_maxima", "topk", "seam", "gather"}),
        ("sglang", (tables.SGLANG_DRILLS,), {"off", "on", "seam", "library", "topk", "shadow"}),
    ],
)  # fmt: skip
def test_the_drills_look_for_what_the_log_says(
    engine: str, files: Sequence[str], names: set[str]
) -> None:
    """The lines of the servers that were broken, in the committed files, of this release."""
    says = {drill.name: drill.says for drill in DRILLS[engine]}
    seen = set()
    for name in files:
        for drill in figures.load(name)["drills"]:
            clear = [line for line in drill["said"] if re.search(says[drill["name"]], line)]
            kinds = {line.partition(":")[0] for line in clear}
            if drill["name"] == "deep_gemm":  # its fault was not reached
                assert not clear and not drill["passed"]
                continue
            assert clear and len(clear) == len(kinds), (name, drill["name"])
            seen.add(drill["name"])
    assert names <= seen


def test_what_sglang_gains_follows_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = changed(tmp_path, monkeypatch, tables.SGLANG)
    rows = [row for row in document["summary"] if row["figure"] == "tpot_ms"]
    rows[0] |= {"on": 98.765, "ratio": 1.25, "interval95": [1.2, 1.3]}
    document["profiles"][0]["servers"]["on"]["logits_to_topk_us"] = 43.21
    (tmp_path / tables.SGLANG).write_text(json.dumps(document))
    (line,) = (line for line in tables.sglang().splitlines() if line.startswith("| 1 x 66,048 |"))
    assert "/ 98.77 | 1.250 (1.200 – 1.300) |" in line and "/ 43.2 |" in line


def test_a_tokenspeed_run_with_times_has_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed run ended before it timed a request, and its text says so."""
    assert "**No time was measured" in tables.tokenspeed()
    document = changed(tmp_path, monkeypatch, tables.TOKENSPEED)
    document["tpot_ms"] = [{}]
    side = {"busy_us": 9876.0, "chain_us_layer": 43.21}
    document["profiles"] = [
        {"context": 8704, "concurrency": 1, "servers": {"off": side, "on": side}}
    ]
    document["summary"] = [
        {"figure": "tpot_ms", "context": context, "concurrency": 1, "off": 12.3, "on": 9.87,
         "ratio": 0.802, "interval95": [0.8, 0.804]}
        for context in (8704, 66_048)
    ]  # fmt: skip
    (tmp_path / tables.TOKENSPEED).write_text(json.dumps(document))
    text = tables.tokenspeed()
    assert (
        "| 1 x 8,704 | 12.30 / 9.87 | 0.802 (0.800 – 0.804) | 9.88 / 9.88 | 43.2 / 43.2 |" in text
    )
    assert "| 1 x 66,048 | 12.30 / 9.87 | 0.802 (0.800 – 0.804) | – | – |" in text


def test_the_report_of_ab_is_whole_and_proven() -> None:
    document = figures.load(tables.AB)
    assert document["complete"] and not document["refused"] and document["error"] is None
    assert [run["completed"] for run in document["runs"]] == [2] * 6
    assert not any("UNVERIFIED" in warning for warning in document["warnings"])


def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict:
    document = json.loads((figures.RESULTS / name).read_text())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return document


def test_a_drill_that_did_not_pass_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tables.DRILLS[2]
    monkeypatch.setattr(tables, "DRILLS", (name,))
    document = changed(tmp_path, monkeypatch, name)
    document["drills"][1] |= {"passed": False, "wrong": ["a request of 40 tokens: lost"]}
    (tmp_path / name).write_text(json.dumps(document))
    (line,) = (line for line in tables.drills().splitlines() if line.startswith("| on |"))
    assert line.endswith("| no: a request of 40 tokens: lost |")


def test_answers_that_are_alike_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PAIRS", ())
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


def test_the_table_of_a_mode_follows_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tables.PAIRS[1]
    document = changed(tmp_path, monkeypatch, name)
    server = document["drills"][1]
    server["counters"] = {"topk.decode": 7, "topk.decode.aside": 20, "topk.decode.upstream": 3}
    server["compared"] |= {"repeats_itself": [True] * 3, "answers": [None] * 3}
    server |= {"passed": False, "wrong": ["lost"], "arguments": ["--x", "1"]}
    (tmp_path / name).write_text(json.dumps(document))
    line = tables._pairs(name).splitlines()[-1]
    assert line == (
        "| default | `--x 1` | 22 of 22 | 7 / 23 | 0 / 0 | 3 of 3 | 0 of 3 | no: lost |"
    )


def test_several_requests_have_their_kernels_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "SERVERS", {figures.SERVER: "bf16"})
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
