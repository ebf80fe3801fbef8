"""The load test itself, on a CPU: it passes, and what drifts is found."""

import json

import torch

from benchmarks.soak import command
from benchmarks.soak.load import SMALL, soak
from dsv4_plugin import topk


def test_a_short_run_is_clean(tmp_path, capsys):
    file = tmp_path / "soak.json"
    assert command.main(["--device", "cpu", "--minutes", "0.02", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert data["faults"] == [] and data["replays"] > 0 and data["looks"] >= 2
    assert data["rows"] == data["replays"] * SMALL.layers * SMALL.rows
    said = capsys.readouterr().out
    assert "0 faults" in said and said.splitlines()[0].endswith(" left]")


def test_an_answer_that_drifts_is_found():
    calls = 0

    def drifts(logits, lengths, k, *, out):
        nonlocal calls
        calls += 1
        topk(logits, lengths, k, out=out)
        if calls > 60:
            out[:, 0] = 1
        return out

    result = soak(device="cpu", seconds=30, look_every=0.2, function=drifts)
    assert result.seconds < 30
    assert any("the indices of step" in fault for fault in result.faults)
    assert any("twice" in fault or "0 ... n - 1" in fault for fault in result.faults)


def test_an_answer_that_is_wrong_from_the_start_is_found():
    def wrong(logits, lengths, k, *, out):
        return out.copy_(torch.arange(k, dtype=torch.int32))

    result = soak(device="cpu", seconds=30, function=wrong)
    assert result.faults and result.replays == 0
