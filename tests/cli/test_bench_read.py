"""The benchmark of the reads: the parts that need no GPU, its options and its plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kits.bench_command import bench
from kits.packaging_tools import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "h200_read.json"


def test_the_plot_of_a_committed_file(tmp_path: Path) -> None:
    file = tmp_path / "read.svg"
    assert bench("plot", RESULTS, "--plot", file) == 0
    text = file.read_text()
    rows = [row for row in json.loads(RESULTS.read_text())["results"] if "us" in row]
    words = {row["case"] for row in rows} | {row["implementation"] for row in rows}
    words |= {f"{row['us']:.2f}" for row in rows} | {"bytes at the copy rate", "NVIDIA H200"}
    assert [word for word in sorted(words) if word not in text] == []
    assert text.count("stroke-dasharray: 3.7,1.6") >= len({row["case"] for row in rows})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "unrecognized arguments: --device cpu"),
        (["--against", "x.csv"], "--against must be of vllm, sglang, flashinfer, torch"),
        (["--against", "vlm"], "--against must be of vllm, sglang, flashinfer, torch"),
        ([], "there is no CUDA device here; nothing was measured"),
    ],
    ids=["cpu", "against", "a wrong engine", "no GPU"],
)
def test_what_cannot_be_measured_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench("read", *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"what": "read", "results": [{"case": "x", "equal": True}]}, "nothing to draw"),
        ({"what": "ab", "results": []}, "results of 'ab', which has no plot"),
    ],
)
def test_a_file_without_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], document: dict[str, object], said: str
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(document))
    assert bench("plot", file, "--plot", tmp_path / "x.svg") == 2
    assert said in capsys.readouterr().err
