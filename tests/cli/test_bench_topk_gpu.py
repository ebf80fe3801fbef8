"""The benchmark of the top-k on a GPU: the bytes that its floor kernel reads, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv4_plugin.cli.bench import floor
from dsv4_plugin.cli.checks import topk_cases as cases
from dsv4_plugin.cli.checks.topk_cases import DTYPES, Case
from dsv4_plugin.cli.main import main

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("windows", ["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_kernel_reads_every_score(dtype: str, windows: str) -> None:
    suite = "decode" if windows == "full" else "prefill"
    problem = Case(suite, dtype, 512, 40, 65_536, windows=windows).make("cuda")
    at = torch.arange(65_536, device="cuda")
    starts = problem.starts // 16 * 16
    n = problem.lengths // 16 * 16
    inside = (at >= starts[:, None]) & (at < (starts + n)[:, None])
    want = problem.logits.float().masked_fill(~inside, -torch.inf).amax(1)
    for reader in floor._readers(problem):
        out = reader.args[3]
        reader()
        assert torch.equal(out.amax(1), want)


def test_the_roof_is_that_of_a_gpu() -> None:
    """Bytes a microsecond; one that comes out beyond any memory has read nothing."""
    for rate in (floor.read_rate("cuda"), floor.copy_rate("cuda")):
        assert 0.5e6 < rate < 20e6


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "topk.json"
    code = main(["bench", "topk", "--suite", "all", "--k", "512", "--rows", "8", "128",
                 "--columns", "8192", "131072", "--dtype", "bfloat16", "float32", "float16",
                 "--json", str(file), "--cold"])  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    document = json.loads(file.read_text())
    assert document["complete"] and document["machine"]["gpu"] in said
    rows = document["results"]
    assert {r["suite"] for r in rows} == set(cases.SUITES)
    wrong = [row for row in rows if not (row["exact"] and row["lowest_index"])]
    assert wrong == []
    for row in rows:
        # One pass over the scores cannot be beaten by much: only the plugin's launch may overlap.
        assert row["ratio"] > 0.4, row
        if row["suite"] == "served":  # a launch alone is more than a microsecond
            assert row["served_us"] > 1.0, row
        else:
            assert row["cold_us"] > 0.4 * row["floor_us"], row
    assert "triton" in document["floor"].lower()
