"""The HTTP server around TokenSpeed's engine, and its side, with an engine that has no model."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.server import side, tokenspeed_side
from benchmarks.server.client import Client
from benchmarks.server.engines import ENGINES
from benchmarks.server.tokenspeed_front import Front


class Engine:
    """Answers like TokenSpeed's ``Engine`` with ``--skip-tokenizer-init``."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.tokenizer_manager = types.SimpleNamespace(
            start_profile=lambda **options: options, stop_profile=lambda: "stop"
        )
        self.llm = types.SimpleNamespace(run=self.calls.append)

    def generate(self, input_ids: list[int], sampling_params: dict[str, Any], stream: bool) -> Any:
        assert stream and sampling_params["temperature"] == 0 and sampling_params["ignore_eos"]
        if not input_ids:
            raise ValueError("no prompt")
        for n in range(1, sampling_params["max_new_tokens"] + 1):
            tokens = [input_ids[0] + i for i in range(n)]
            yield {"output_ids": tokens, "meta_info": {"completion_tokens": n}}


@pytest.fixture
def front() -> Iterator[Front]:
    server = Front(("127.0.0.1", 0), Engine())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(front: Front) -> Client:
    return Client(f"http://127.0.0.1:{front.server_address[1]}", ENGINES["tokenspeed"])


def test_an_answer_comes_token_by_token(front: Front) -> None:
    answer = client(front).complete([7, 8], 4, "salt", ids=True)
    assert (answer.tokens, answer.counts) == ([7, 8, 9, 10], [1, 1, 1, 1])
    assert client(front).read("/health") == b""
    with pytest.raises(RuntimeError, match="404"):
        client(front).read("/nothing")


def test_an_error_of_the_engine_is_the_clients(front: Front) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no prompt"):
        client(front).complete([], 2)
    assert client(front).complete([1], 1).total == 1


def test_a_profile_begins_and_ends(front: Front) -> None:
    asked = ENGINES["tokenspeed"].profile(Path("/there"))
    client(front).read("/start_profile", asked)
    client(front).read("/stop_profile", {})
    assert front.engine.calls == [asked, "stop"] and asked["output_dir"] == "/there"


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_filled_before_they_are_prepared(
    weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(64, 4)
    model.config = types.SimpleNamespace(n_routed_experts=2)  # type: ignore[assignment]
    model.weight.data.fill_(9)
    watched: list[int] = []
    monkeypatch.setattr(tokenspeed_side, "watch", lambda: watched.append(1))
    loader = types.SimpleNamespace(
        _initialize_model=lambda config: model, initialize_dummy_weights=lambda model: 1 / 0
    )
    tokenspeed_side._loading(weights, loader)
    assert loader._initialize_model("config") is model and watched == [1]
    assert bool((model.weight == 9).all()) is not weights
    if weights:
        assert 0.05 < model.weight.std().item() < 0.3 and not model.bias.any()
        loader.initialize_dummy_weights(model)


def test_outside_of_a_measurement_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2E_DIR", raising=False)
    monkeypatch.setattr(tokenspeed_side, "after_import", lambda *args: 1 / 0)
    tokenspeed_side.register()


def test_the_loader_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / side.OPTIONS).write_text('{"weights": true}')
    monkeypatch.setenv("E2E_DIR", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(tokenspeed_side, "after_import", lambda name, call: asked.append(name))
    tokenspeed_side.register()
    assert asked == ["tokenspeed.runtime.model_loader.loader"]
    monkeypatch.setenv("E2E_FAULT", "x")
    with pytest.raises(ValueError, match="E2E_FAULT is 'x'"):
        tokenspeed_side.register()
