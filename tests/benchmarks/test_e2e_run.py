"""The end-to-end runner, against servers that answer like vLLM and have no model."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
from kits.e2e_servers import FAKE, free_ports, tiny_model

from benchmarks.server import client, command, measure, server, vllm_side
from dsv4_plugin.cli.shared import numbers
from dsv4_plugin.cli.shared.run import UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "results.json"
    code = command.main(
        ["--model", str(model), "--json", str(out), "--folder", str(tmp_path / "run"),
         "--vllm", FAKE, "--port", str(free_ports(2)), *arguments]
    )  # fmt: skip
    return code, json.loads(out.read_text())


def test_two_servers_are_measured_in_turn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK", 64)
    monkeypatch.setattr(measure, "TAIL", 16)
    code, found = run(
        model, tmp_path,
        "--server", "off:FAKE_MS=4", "--server", "on:FAKE_MS=12,FAKE_OTHER=3",
        "--contexts", "128", "--concurrent", "128:4", "--ttft", "256", "--profile", "128",
        "--outputs", "50", "60", "--tokens", "20", "--pairs", "3", "--max-num-seqs", "4",
    )  # fmt: skip
    assert (code, found["complete"], found["skipped"]) == (0, True, [])
    one, four = found["tpot_ms"]
    assert (one["context"], one["concurrency"], one["context_made"]) == (144, 1, "computed")
    assert four["concurrency"] == 4
    for entry in (one, four):
        assert {name: len(v) for name, v in entry["servers"].items()} == {"off": 3, "on": 3}
        # Not faster than the servers' clocks; a busy machine makes everything slower.
        assert min(entry["servers"]["off"]) > 3.9 and min(entry["servers"]["on"]) > 11.9
    outputs = found["outputs"]
    assert outputs["repeatable"] == {"off": [True, True], "on": [True, True]}
    assert [a["first_difference"] for a in outputs["as_baseline"]["on"]] == [3, 3]
    assert [(p["context"], p["concurrency"]) for p in found["profiles"]] == [(144, 1), (144, 4)]
    for profile in found["profiles"]:
        assert profile["servers"]["on"]["parts"]["topk"]["us_call"] == 12.0
    rows = {(row["figure"], row["concurrency"]): row for row in found["summary"]}
    assert 1 < rows["tpot_ms", 1]["ratio"] < 3.1 and rows["tpot_ms", 1]["pairs"] == 3
    low, high = rows["tpot_ms", 1]["interval95"]
    assert low < rows["tpot_ms", 1]["ratio"] < high
    for count in (1, 4):
        assert rows["chain_us_layer", count]["ratio"] == round((8 + 12) / (8 + 4), 4)
    about = found["servers"]["on"]
    assert about["environment"] == {"FAKE_MS": "12", "FAKE_OTHER": "3"}
    assert [s["host"] for s in about["status"]] == ["fake"]
    assert any("dsv4 stands in" in line and server.SIDE in line for line in about["log"])
    assert found["machine"]["plugin"] and found["command"][2] == "benchmarks.server"


def test_servers_with_arguments_of_their_own_are_compared_among_themselves(
    model: Path, tmp_path: Path
) -> None:
    code, found = run(
        model, tmp_path,
        "--server", "off", "--server", "on:FAKE_MS=2", "--server", "e_off", "--server", "e_on",
        "--arguments", "e_off=--enforce-eager", "--arguments", "e_on=--enforce-eager",
        "--contexts", "64", "--pairs", "1", "--tokens", "20", "--outputs", "50",
    )  # fmt: skip
    assert code == 0
    assert [set(row) & set(found["servers"]) for row in found["summary"]] == [
        {"off", "on"},
        {"e_off", "e_on"},
    ]
    assert set(found["outputs"]["as_baseline"]) == {"on", "e_on"}
    assert found["servers"]["e_on"]["arguments"][-1] == "--enforce-eager"
    assert "--enforce-eager" not in found["servers"]["on"]["arguments"]
    for wrong in ("on=--enforce-eager", "off"):
        assert run(model, tmp_path, "--server", "off", "--arguments", wrong)[0] == 2


def test_contexts_are_copied_or_else_computed_up_to_a_length(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK", 64)
    monkeypatch.setattr(command, "COMPUTABLE", 512)
    arguments = ("--contexts", "64", "256", "320", "1K", "--copy-contexts", "--pairs", "1")
    code, found = run(model, tmp_path, "--server", "off", *arguments)
    assert code == 0
    made = [entry["context_made"] for entry in found["tpot_ms"]]
    assert made == ["computed", "copied", "copied", "copied"]
    code, found = run(model, tmp_path, "--server", "off:FAKE_FAILS=1", *arguments)
    assert code == 1
    assert [entry["context_made"] for entry in found["tpot_ms"]] == ["computed"] * 3
    assert found["skipped"] == [
        "context 1024: RuntimeError: copying contexts failed before; too long to be computed"
    ]


def test_what_the_cache_does_not_hold_is_not_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TAIL", 16)
    code, found = run(
        model, tmp_path, "--server", "off:FAKE_CACHE=1000", "--contexts", "128",
        "--concurrent", "256:4", "--tokens", "20", "--pairs", "1",
    )  # fmt: skip
    assert code == 1 and len(found["tpot_ms"]) == 1
    assert found["skipped"] == [
        "context 256 x 4: RuntimeError: 1,168 tokens of cache are needed, off has 1,000 (--kv-gib)"
    ]


def test_a_server_that_ends_is_an_error_with_its_log(model: Path, tmp_path: Path) -> None:
    code, found = run(model, tmp_path, "--server", "off", "--server", "on:FAKE_DIES=no GPU here")
    assert code == 1 and found["complete"] is False
    assert found["error"].startswith("on ended while starting\n")
    assert "RuntimeError: no GPU here" in found["error"]


def test_steps_for_which_no_time_is_left_are_named(model: Path, tmp_path: Path) -> None:
    arguments = ("--server", "off", "--contexts", "4K", "--budget", "14")
    code, found = run(model, tmp_path, *arguments)
    assert code == 1 and found["tpot_ms"] == []
    assert [name.split(":")[0] for name in found["skipped"]] == ["warm-up", "context 4096"]


@pytest.mark.parametrize("text", [":A=1", "on:A", "on:=1"])
def test_a_server_is_a_name_and_variables(text: str) -> None:
    with pytest.raises(UsageError, match="NAME:VARIABLE=VALUE"):
        command.parse_server(text)


def test_numbers_and_prompts() -> None:
    assert [numbers.LENGTH(t) for t in ("512", "64K", "1m")] == [512, 65_536, 1_048_576]
    prompt = client.random_prompt(1000, 5)
    assert prompt == client.random_prompt(1000, 5) != client.random_prompt(1000, 6)
    assert min(prompt) >= client.FIRST_WORD and max(prompt) < client.WORDS


def answer(first: float, each: float, tokens: int) -> client.Answer:
    times = [first + i * each for i in range(tokens)]
    return client.Answer(0.0, times, [1] * tokens, list(range(tokens)))


def test_time_per_token_is_taken_where_all_decode() -> None:
    assert client.time_per_token([answer(1.0, 0.01, 11)]) == pytest.approx(10)
    # The first has a slow token before the second one has begun.
    early = answer(1.2, 0.01, 21)
    early.times[0] = 0.1
    assert client.time_per_token([early, answer(1.21, 0.01, 40)]) == pytest.approx(10)
    with pytest.raises(RuntimeError, match="did not decode at the same time"):
        client.time_per_token([answer(0.0, 0.01, 5), answer(1.0, 0.01, 5)])
    # Thirty tokens are made when the first one is sent; after that they come as they are made.
    burst = answer(1.0, 0.01, 60)
    burst.times[:30] = [burst.times[29] - 1e-5 * (30 - i) for i in range(30)]
    assert client.time_per_token([burst], 40) == pytest.approx(10)
    assert client.time_per_token([burst]) < 5.1


def test_the_first_answers_of_a_shape_need_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be computed and compiled for one after the other; what is timed must overlap."""
    sent = []

    def one_after_the_other(pairs: list[tuple[Any, list[int]]], tokens: int) -> list[client.Answer]:
        sent.append((pairs, tokens))
        return [answer(float(i), 0.01, tokens) for i in range(len(pairs))]

    monkeypatch.setattr(measure, "together", one_after_the_other)
    served = types.SimpleNamespace(name="a", client="client")
    assert measure.unseen([served], [[1], [2]], 16) == 1.0
    assert sent == [([("client", [1]), ("client", [2])], 16)] * 2
    assert measure.tokens_to_ask(96, 1.0, 512) == measure.LEAD + 96 + 250
    assert measure.tokens_to_ask(96, 0.0, 512) == measure.LEAD + 96
    assert measure.tokens_to_ask(96, 0.0, 1 << 20) == measure.LEAD + 256 + 96
    with pytest.raises(RuntimeError, match="did not decode at the same time"):
        measure.tpot([served], [[1], [2]], 16, 1)


def test_the_interval_of_pairs() -> None:
    found = measure.paired([2.0, 2.0, 2.0], [1.0, 1.1, 0.9])
    assert found["ratio"] == pytest.approx((0.5 * 0.55 * 0.45) ** (1 / 3), abs=1e-5)
    assert found["interval95"][0] < 0.5 < found["interval95"][1]
    assert measure.paired([2.0], [1.0]) == {"pairs": 1, "ratio": 0.5, "interval95": None}


def test_weights_are_of_a_useful_size_and_the_same_every_time() -> None:
    import torch

    def made(name: str, tensor: torch.Tensor, seed: int = 3) -> torch.Tensor:
        vllm_side.fill(name, tensor, experts=16, seed=seed)
        return tensor

    matrix = made("weight", torch.empty(64, 1024, dtype=torch.bfloat16))
    assert matrix.float().std() == pytest.approx(1 / 32, rel=0.05)
    assert torch.equal(matrix, made("weight", torch.empty(64, 1024, dtype=torch.bfloat16)))
    assert not torch.equal(matrix, made("weight", torch.empty_like(matrix), seed=4))
    fp8 = made("weight", torch.empty(3, 8, 512, dtype=torch.float8_e4m3fn)).float()
    scale = made("weight_scale_inv", torch.empty(8, dtype=torch.float8_e8m0fnu)).float()
    assert fp8.isfinite().all() and (fp8 * scale[0]).std() == pytest.approx(2**-6, rel=0.05)
    table = made("tid2eid", torch.empty(100, 6, dtype=torch.int32))
    assert table.min() == 0 and table.max() == 15
    assert all(len(set(row)) == 6 for row in table.tolist())
    assert made("attn_sink", torch.empty(4)).tolist() == [0] * 4
    assert made("norm.weight", torch.empty(4)).tolist() == [1] * 4
    packed = made("w13_weight", torch.empty(4, 64, dtype=torch.uint8))
    assert len(packed.unique()) > 100
    assert made("w13_weight_scale", torch.empty(4, dtype=torch.uint8)).tolist() == [120] * 4


def test_the_side_is_loaded_where_plugins_are_listed(model: Path, tmp_path: Path) -> None:
    arguments = ("--server", "on:VLLM_PLUGINS=dsv4", "--contexts", "64", "--budget", "60")
    code, found = run(model, tmp_path, *arguments)
    assert code == 0
    assert any("plugins allowed: dsv4,dsv4_e2e" in line for line in found["servers"]["on"]["log"])
