"""Contexts made by copying: the effect of the runner's wrapped forward pass on the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.server import side, vllm_side

CHUNK = vllm_side.WHOLE_CHUNK
SIZES = (256, 64)  # tokens of a page, in two groups of layers
BLOCKS = 400


class Runs:
    """As much of vLLM's GPUModelRunner as is read: two groups with a layer each, and a model.

    A block is 256 tokens in both groups; in the second one a page is a quarter of it.
    """

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.kv_cache_config = SimpleNamespace(
            num_blocks=BLOCKS,
            kv_cache_groups=[
                SimpleNamespace(
                    layer_names=[f"layer {i}"], kv_cache_spec=SimpleNamespace(block_size=256)
                )
                for i in range(2)
            ],
        )
        self.model_config = SimpleNamespace(get_hidden_size=lambda: 8)
        self.layers = {
            f"layer {i}": SimpleNamespace(kv_cache=torch.zeros(BLOCKS * 256 // size, 3))
            for i, size in enumerate(SIZES)
        }
        self.computed: list[int] = []
        self.first = [1, 5]  # the first page of the chunk to come, in each group
        self.slots: dict[str, torch.Tensor] = {}

    def pages(self, group: int, n: int = CHUNK) -> torch.Tensor:
        return self.first[group] + torch.arange(n // SIZES[group])

    def compute(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.computed.append(int(positions[0]))
        for i, layer in enumerate(self.layers.values()):
            pages = self.pages(i, len(positions))
            layer.kv_cache[pages] = pages[:, None].float()
        return torch.ones(len(positions), 8)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / side.COPY


class First(Runs):
    """vLLM's first runner: a method of its own calls the model."""

    def _model_forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.compute(input_ids, positions)

    def execute_model(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self._model_forward(**inputs)


class Second(Runs):
    """The second one: it calls the model itself."""

    def load_model(self) -> str:
        self.model = torch.nn.Module()
        self.model.forward = self.compute
        return "loaded"

    def execute_model(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs)


@pytest.fixture(params=[First, Second])
def step(request: pytest.FixtureRequest, flag: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    owner = type("GPUModelRunner", (request.param,), {})
    runner = owner()
    context = ModuleType("vllm.forward_context")
    context.get_forward_context = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        no_compile_layers=runner.layers, slot_mapping=runner.slots
    )
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    monkeypatch.setattr(vllm_side, "watch", lambda each: None)
    vllm_side._runner(flag.parent, SimpleNamespace(GPUModelRunner=owner))
    if request.param is Second:
        assert runner.load_model() == "loaded"

    def step(
        begin: int, n: int = CHUNK, first: tuple[int, int] | None = None, dropped: int = 0
    ) -> torch.Tensor:
        if first is not None:
            runner.first = list(first)
        for i, size in enumerate(SIZES):
            pages = runner.pages(i, n)
            slots = (pages[:, None] * size + torch.arange(size)).flatten()
            slots[:dropped] = -1
            runner.slots[f"layer {i}"] = slots
        positions = torch.arange(begin, begin + n)
        return runner.execute_model(input_ids=positions, positions=positions)

    step.runner = runner  # type: ignore[attr-defined]
    return step


def cache(step: Any, group: int) -> torch.Tensor:
    return step.runner.layers[f"layer {group}"].kv_cache


def test_the_first_chunk_is_computed_and_the_next_ones_are_copied(step: Any, flag: Path) -> None:
    flag.touch()
    step(0)
    out = step(CHUNK, first=(100, 150))
    assert step.runner.computed == [0]
    assert out.shape == (CHUNK, 8) and out.dtype == torch.bfloat16 and not out.any()
    for group, (old, new) in enumerate(((1, 100), (5, 150))):
        n = CHUNK // SIZES[group]
        assert torch.equal(cache(step, group)[new : new + n], cache(step, group)[old : old + n])
        assert cache(step, group)[new, 0] == old
    step(2 * CHUNK, first=(200, 250))  # of the copy, not of the first chunk
    assert cache(step, 0)[200, 0] == 1 and step.runner.computed == [0]


def test_pages_that_move_onto_each_other_are_read_first(step: Any, flag: Path) -> None:
    flag.touch()
    step(0)
    expected = cache(step, 1)[5 : 5 + CHUNK // 64].clone()
    step(CHUNK, first=(100, 25))  # overlaps 5 … 68
    assert torch.equal(cache(step, 1)[25 : 25 + CHUNK // 64], expected)


def test_tokens_without_a_slot_move_no_page(step: Any, flag: Path) -> None:
    """What a sliding window has dropped has none: -1."""
    flag.touch()
    step(0)
    cache(step, 0)[399] = 7
    begin, n = CHUNK, CHUNK // SIZES[0]
    step(begin, first=(100, 150), dropped=SIZES[0])
    assert cache(step, 0)[399, 0] == 7
    assert cache(step, 0)[100, 0] == 0 and cache(step, 0)[101, 0] == 2
    assert cache(step, 0)[100 + n - 1, 0] == n


def test_a_runner_of_another_form_is_left_alone(
    flag: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_side, "watch", lambda each: None)
    vllm_side._runner(flag.parent, SimpleNamespace(GPUModelRunner=type("GPUModelRunner", (), {})))
    assert "contexts cannot be copied" in caplog.text


def test_everything_is_computed_without_the_flag(step: Any) -> None:
    step(0)
    assert step(CHUNK, first=(100, 150)).all()
    assert step.runner.computed == [0, CHUNK]


def test_the_end_and_other_prompts_are_computed(step: Any, flag: Path) -> None:
    flag.touch()
    step(0)
    step(CHUNK, n=512, first=(100, 150))  # the rest of the prompt
    step(0, first=(120, 160))  # another prompt
    step(3 * CHUNK, first=(140, 170))  # and one whose beginning was cached
    assert step.runner.computed == [0, CHUNK, 0, 3 * CHUNK]


def test_a_failure_computes_and_takes_the_flag_away(
    step: Any, flag: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag.touch()
    step(0)
    del step.runner.layers["layer 1"]
    step.runner.kv_cache_config.kv_cache_groups[1].layer_names = ["gone"]
    assert step(CHUNK, first=(100, 150)).all()
    assert not flag.exists() and step.runner.computed == [0, CHUNK]
    assert "copying failed" in caplog.text
