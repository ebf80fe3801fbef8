"""``bench --against torch`` on a GPU: the peer inside CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kits.bench_command import bench

pytestmark = pytest.mark.gpu


def test_torch_is_exact_inside_graphs(tmp_path: Path) -> None:
    """Answers are judged after the replays too, in an output that was dirty."""
    file = tmp_path / "x.json"
    assert bench("topk", "--suite", "decode", "served", "narrow", "prefill", "paged", "--k", 512,
                 "--rows", 8, "--columns", 32_768, "--against", "torch",
                 "--json", file) == 0  # fmt: skip
    rows = [r for r in json.loads(file.read_text())["results"] if r["implementation"] == "torch"]
    assert {row["suite"] for row in rows} == {"decode", "served", "narrow", "prefill", "paged"}
    assert [row for row in rows if not row["exact"]] == []


@pytest.mark.parametrize(("what", "name"), [("logits", "torch"), ("chain", "torch + torch")])
def test_torchs_logits_are_right_inside_graphs(tmp_path: Path, what: str, name: str) -> None:
    file = tmp_path / "x.json"
    assert bench(what, "--rows", 4, "--columns", 8192, "--against", "torch", "--json", file) == 0
    rows = [r for r in json.loads(file.read_text())["results"] if r["implementation"] == name]
    assert rows and [row for row in rows if not row["right"]] == []
