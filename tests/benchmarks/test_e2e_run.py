"""The end-to-end runner, against servers that answer like vLLM and have no model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from kits.e2e_servers import FAKE, free_ports, tiny_model
from kits.packaging_tools import ROOT

from benchmarks.server import client, command, engines, measure, side
from benchmarks.server.model import V4, V41, Model, read
from dsv4_plugin.cli.shared import numbers
from dsv4_plugin.cli.shared.run import UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "results.json"
    code = command.main(
        ["--model", str(model), "--json", str(out), "--folder", str(tmp_path / "run"),
         "--server-command", FAKE, "--port", str(free_ports(2)), *arguments]
    )  # fmt: skip
    return code, json.loads(out.read_text())


def refused(model: Path, tmp_path: Path, *arguments: str) -> int | str | None:
    """The exit code of a command line that is not begun."""
    given = ["--model", str(model), "--json", str(tmp_path / "none.json"), *arguments]
    try:
        return command.main(given)
    except SystemExit as end:
        return end.code
    finally:
        assert not (tmp_path / "none.json").exists()


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
    assert [s["engine"] for s in about["status"]] == ["fake"]
    assert any(
        "dsv4 stands in" in line and engines.ENGINES["vllm"].side in line for line in about["log"]
    )
    assert found["machine"]["plugin"] and found["command"][2] == "benchmarks.server"


def test_an_sglang_server_on_two_gpus(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TAIL", 16)
    code, found = run(
        model, tmp_path, "--engine", "sglang", "--tp-size", "2", "--kv-tokens", "4K",
        "--server", "off:DSV4_PLUGIN=0", "--server", "on:FAKE_MS=6,SGLANG_PLUGINS=dsv4",
        "--contexts", "128", "--ttft", "256", "--profile", "128", "--outputs", "50",
        "--copy-contexts", "--tokens", "20", "--pairs", "3", "--", "--disable-radix-cache",
    )  # fmt: skip
    assert (code, found["complete"], found["skipped"]) == (0, True, [])
    assert found["tpot_ms"][0]["context_made"] == "computed"
    assert {row["figure"] for row in found["summary"]} == {"tpot_ms", "ttft_s", "chain_us_layer"}
    outputs = found["outputs"]
    assert outputs["as_baseline"]["on"] == [
        {"identical": True, "first_difference": None, "share": 1.0}
    ]
    off, on = found["servers"]["off"], found["servers"]["on"]
    arguments = " ".join(on["arguments"])
    for part in ("--max-total-tokens 4096 ", "--tp-size 2 ", "--disable-radix-cache"):
        assert part in arguments
    assert "--kv-cache-memory-bytes" not in arguments and found["gpus"] == 2
    # Counters, memory and rows of both ranks.
    assert len(off["status"]) == len(on["status"]) == len(on["memory"]["end"]) == 2
    assert len({status["pid"] for status in on["status"]}) == 2
    assert all(status["counters"]["topk.paged"] == 4 for status in on["status"])
    assert sorted(map(str, on["rows"])) == [f"{{'prefill of rank {rank}': 5}}" for rank in (0, 1)]
    assert any(engines.ENGINES["sglang"].side in line for line in on["log"])


def test_a_rank_in_which_the_plugin_does_nothing_is_an_error(model: Path, tmp_path: Path) -> None:
    code, found = run(
        model, tmp_path, "--tensor-parallel-size", "2", "--server", "off:DSV4_PLUGIN=0",
        "--server", "on:FAKE_LAZY=1", "--contexts", "64", "--pairs", "1", "--tokens", "20",
    )  # fmt: skip
    assert code == 1 and found["complete"] is False
    assert found["skipped"] == ["on: at work in 1 of 2 processes"]


def test_a_v41_model_is_served_and_its_chain_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TAIL", 16)
    code, found = run(
        tiny_model(tmp_path / "model", "v41"), tmp_path,
        "--server", "off", "--server", "on:FAKE_MS=12", "--contexts", "128", "--profile", "128",
        "--tokens", "20", "--pairs", "1",
    )  # fmt: skip
    assert (code, found["skipped"]) == (0, [])
    assert found["model"]["index_source_layer_ids"] == [2, 3, 4]
    arguments = found["servers"]["off"]["arguments"]
    assert arguments[arguments.index("--limit-mm-per-prompt") + 1] == '{"image": 0}'
    assert not {"--block-size", "--engram-config"} & set(arguments)
    (profile,) = (entry["servers"]["on"] for entry in found["profiles"])
    assert {name: part["us"] for name, part in profile["parts"].items() if part["us"]} == {
        "k_write": 6, "fill": 3, "logits": 12, "maxima": 5, "blocks": 7, "candidates": 9, "topk": 36
    }  # fmt: skip
    assert profile["chain_us_layer"] == 26
    assert found["servers"]["off"]["memory"] == {
        "graphs_gib": 1.25,
        "serving": [{"allocated_gib": 9.0, "reserved_gib": 10.5}],
        "end": [{"allocated_gib": 9.0, "reserved_gib": 10.5}],
    }


def told_to_vllm(model: Model) -> list[str]:
    """What is said of this model alone."""
    a = argparse.Namespace(max_model_len=1, kv_gib=1)
    given = engines.ENGINES["vllm"].arguments(model, Path(), a, 1, 0.5)
    return given[4 : given.index("--max-model-len")]


def test_what_a_model_needs_of_vllm(tmp_path: Path) -> None:
    v4 = read(tiny_model(tmp_path / "v4"))
    assert (v4.kind, v4.indexers, v4.writers) == (V4, 3, 3)
    assert told_to_vllm(v4) == ["--block-size", "256"]
    folder = tiny_model(tmp_path / "v41", "v41")
    v41 = read(folder)
    assert (v41.kind, v41.indexers, v41.writers) == (V41, 3, 2)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["engram_layer_ids"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    images = ["--limit-mm-per-prompt", '{"image": 0}']
    assert told_to_vllm(v41) == images
    assert told_to_vllm(read(folder)) == [*images, "--engram-config", '{"cpu_offload": false}']
    (folder / "config.json").write_text('{"model_type": "deepseek_v32", "num_hidden_layers": 5}')
    other = read(folder)
    assert (other.indexers, other.writers, told_to_vllm(other)) == (5, 5, [])


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no config.json there"):
        read(tmp_path)
    for text, why in (("[]", "is no configuration"), ("{}", "it has no 'model_type'")):
        (tmp_path / "config.json").write_text(text)
        assert refused(tmp_path, tmp_path) == 2
        assert why in capsys.readouterr().err


def test_the_full_v41_has_the_layers_of_the_published_one(tmp_path: Path) -> None:
    maker = ROOT / "examples" / "make_tiny_v41.py"
    done = subprocess.run(
        [sys.executable, maker, tmp_path, "--full"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("40 layers, 8 with the indexer\n")
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    ratios, keys = text["compress_ratios"], text["kv_source_layer_ids"]
    assert [ratios.count(r) for r in (0, 2, 1)] == [2, 18, 20]
    assert (keys, text["candidate_source_layer_id"]) == ([2, 8, 14, 20], 20)
    assert text["index_source_layer_ids"] == [*keys, 24, 28, 32, 36]
    assert [ratios[i] for i in keys] == [2, 2, 2, 1]


def test_servers_with_arguments_of_their_own_are_compared_among_themselves(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    for wrong, why in (("on=--enforce-eager", "no --server has this name"), ("off", "NAME=ARGUM")):
        capsys.readouterr()
        assert refused(model, tmp_path, "--server", "off", "--arguments", wrong) == 2
        assert why in capsys.readouterr().err


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
    assert found["error"].startswith("server on ended with exit code 1 without being asked to")
    assert "RuntimeError: no GPU here" in found["error"]


def test_steps_for_which_no_time_is_left_are_named(model: Path, tmp_path: Path) -> None:
    arguments = ("--server", "off", "--contexts", "4K", "--budget", "14")
    code, found = run(model, tmp_path, *arguments)
    assert code == 1 and found["tpot_ms"] == []
    assert [name.split(":")[0] for name in found["skipped"]] == ["warm-up", "context 4096"]


def test_a_step_that_does_not_end_is_broken_off(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TAIL", 16)
    monkeypatch.setattr(command, "RESERVE_S", 2)
    began = time.monotonic()
    code, found = run(
        model, tmp_path, "--server", "off:FAKE_HANGS=336", "--contexts", "64", "320",
        "--tokens", "20", "--pairs", "1", "--budget", "25",
    )  # fmt: skip
    assert time.monotonic() - began < 45  # the request itself would take a minute
    assert (code, len(found["tpot_ms"])) == (1, 1)
    assert found["error"] == "context 320 was broken off: the budget was spent"
    assert found["servers"]["off"]["ready_s"]


@pytest.mark.parametrize("text", [":A=1", "on:A", "on:=1"])
def test_a_server_is_a_name_and_variables(text: str) -> None:
    with pytest.raises(UsageError, match="NAME:VARIABLE=VALUE"):
        command.parse_server(text)


def test_numbers_and_prompts() -> None:
    assert [numbers.LENGTH(t) for t in ("512", "64K", "1m")] == [512, 65_536, 1_048_576]
    prompt = client.random_prompt(1000, 5)
    assert prompt == client.random_prompt(1000, 5) != client.random_prompt(1000, 6)
    assert min(prompt) >= client.FIRST_WORD and max(prompt) < client.WORDS


def answer(first: float, each: float, tokens: int) -> engines.Answer:
    times = [first + i * each for i in range(tokens)]
    return engines.Answer(0.0, times, [1] * tokens, list(range(tokens)))


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
    # The server stands still for 300 ms, and then sends the tokens of thirty steps in one piece.
    stalled = answer(1.0, 0.01, 60)
    stalled.times[10:40], stalled.counts[10:40] = [1.6], [30]
    stalled.times[11:] = [1.61 + 0.01 * i for i in range(20)]
    assert client.time_per_token([stalled], 20) == pytest.approx(10)
    stalled.times, stalled.counts = stalled.times[:11], stalled.counts[:11]
    assert client.time_per_token([stalled], 2) == pytest.approx(10)  # the ten before
    with pytest.raises(client.TooFew):
        client.time_per_token([stalled], 20)


def test_a_server_that_stood_still_is_asked_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def third_at_once(pairs: list[tuple[Any, list[int]]], tokens: int) -> list[engines.Answer]:
        sent.append(tokens)
        return [engines.Answer(0, [1.0], [tokens]) if len(sent) == 3 else answer(1, 0.01, tokens)]

    monkeypatch.setattr(measure, "together", third_at_once)
    served = types.SimpleNamespace(name="a", client="client")
    figures, tokens = measure.tpot([served], [[1]], measure.LEAD + 16, 3, 8)
    assert (tokens, len(sent)) == (measure.LEAD + 16, 4)
    assert figures == {"a": [pytest.approx(10)] * 3}


def test_the_first_answers_of_a_shape_need_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be computed and compiled for one after the other; what is timed must overlap."""
    sent = []

    def one_after_the_other(
        pairs: list[tuple[Any, list[int]]], tokens: int
    ) -> list[engines.Answer]:
        sent.append((pairs, tokens))
        return [answer(float(i), 0.01, tokens) for i in range(len(pairs))]

    monkeypatch.setattr(measure, "together", one_after_the_other)
    served = types.SimpleNamespace(name="a", client="client")
    assert measure.unseen([served], [[1], [2]], 16) == 1.0
    assert sent == [([("client", [1]), ("client", [2])], 16)] * 2
    assert measure.tokens_to_ask(96, 1.0, 512) == measure.LEAD + 96 + 125
    assert measure.tokens_to_ask(96, 0.0, 512) == measure.LEAD + 96
    assert measure.tokens_to_ask(96, 0.0, 1 << 20) == measure.LEAD + 256 + 96
    monkeypatch.setattr(measure, "MOST_TOKENS", 50)
    with pytest.raises(client.TooFew, match="did not decode at the same time"):
        measure.tpot([served], [[1], [2]], 16, 1, 2)
    assert [tokens for _, tokens in sent[2:]] == [16, 16, 32, 32, 50, 50]


def test_what_comes_all_at_once_is_asked_for_again_with_more_tokens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is busy with a long prompt sends the tokens of seconds in one piece."""
    arguments = ("--contexts", "64", "--pairs", "2", "--tokens", "20")
    code, found = run(model, tmp_path, "--server", "off:FAKE_LATE=100,FAKE_MS=4", *arguments)
    (entry,) = found["tpot_ms"]
    assert (code, entry["tokens"]) == (0, 2 * (measure.LEAD + 20))
    assert all(3.9 < ms < 40 for ms in entry["servers"]["off"])
    monkeypatch.setattr(measure, "MOST_TOKENS", 100)
    code, found = run(model, tmp_path, "--server", "off:FAKE_LATE=100", *arguments)
    assert (code, found["tpot_ms"]) == (1, [])
    assert found["skipped"] == [
        "context 64: TooFew: 1 requests did not decode at the same time for 10 tokens"
    ]


def test_a_profile_without_a_step_is_named(model: Path, tmp_path: Path) -> None:
    arguments = ("--contexts", "64", "--pairs", "2", "--tokens", "20", "--profile", "64")
    code, found = run(model, tmp_path, "--server", "off:FAKE_EMPTY=1", *arguments)
    assert (code, found["complete"], len(found["skipped"])) == (1, False, 1)
    assert found["skipped"][0].startswith(
        "profile 576x1 of off: 0 layers that write and score keys"
    )


def test_several_requests_are_profiled_for_as_long_as_they_are_timed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def profile(server: Any, prompts: Any, tokens: int, case: str, traces: Any) -> None:
        asked.append((case, tokens))

    monkeypatch.setattr(measure, "profile", profile)
    arguments = ("--contexts", "64", "--concurrent", "64:2", "--profile", "64", "--pairs", "2")
    code, found = run(model, tmp_path, "--server", "off", *arguments, "--tokens", "300")
    (_, several) = found["tpot_ms"]
    assert code == 0 and several["tokens"] > 300
    assert asked == [("576x1", measure.ALONE_TOKENS), ("576x2", several["tokens"])]


def test_the_interval_of_pairs() -> None:
    found = measure.paired([2.0, 2.0, 2.0], [1.0, 1.1, 0.9])
    assert found["ratio"] == pytest.approx((0.5 * 0.55 * 0.45) ** (1 / 3), abs=1e-5)
    assert found["interval95"][0] < 0.5 < found["interval95"][1]
    assert measure.paired([2.0], [1.0]) == {"pairs": 1, "ratio": 0.5, "interval95": None}


def test_weights_are_of_a_useful_size_and_the_same_every_time() -> None:
    import torch

    def made(name: str, tensor: torch.Tensor, seed: int = 3) -> torch.Tensor:
        side.fill(name, tensor, experts=16, seed=seed)
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
