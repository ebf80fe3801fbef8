"""Contexts made by copying: what the wrapped forward pass of the runner does to the cache."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.server import vllm_side

CHUNK = vllm_side.WHOLE_CHUNK
SIZES = (256, 64)  # tokens of a page, in two groups of layers


class Runner:
    """As much of vLLM's GPUModelRunner as is read: two groups with a layer each, and a model."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        self.kv_cache_config = SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=[f"layer {i}"]) for i in range(2)]
        )
        self._kernel_block_sizes = list(SIZES)
        self.model_config = SimpleNamespace(get_hidden_size=lambda: 8)
        self.layers = {
            f"layer {i}": SimpleNamespace(kv_cache=torch.zeros(400, 3), size=size)
            for i, size in enumerate(SIZES)
        }
        self.computed: list[int] = []
        self.first = [1, 5]  # the first page of the chunk to come, in each group
        self.input_batch = SimpleNamespace(block_table=[None, None])

    def pages(self, group: int, n: int = CHUNK) -> torch.Tensor:
        return self.first[group] + torch.arange(n // SIZES[group])

    def _model_forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.computed.append(int(positions[0]))
        for i, layer in enumerate(self.layers.values()):
            pages = self.pages(i, len(positions))
            layer.kv_cache[pages] = pages[:, None].float()
        return torch.ones(len(positions), 8)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    return tmp_path / vllm_side.COPY


@pytest.fixture
def step(flag: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    runner = Runner()
    context = ModuleType("vllm.forward_context")
    context.get_forward_context = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        no_compile_layers=runner.layers
    )
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", context)
    forward = vllm_side._copying(flag, Runner._model_forward)

    def step(begin: int, n: int = CHUNK, first: tuple[int, int] | None = None) -> torch.Tensor:
        if first is not None:
            runner.first = list(first)
        for i, size in enumerate(SIZES):
            pages = runner.pages(i, n)
            slots = (pages[:, None] * size + torch.arange(size)).flatten()
            table = SimpleNamespace(slot_mapping=SimpleNamespace(gpu=slots))
            runner.input_batch.block_table[i] = table
        positions = torch.arange(begin, begin + n)
        return forward(runner, input_ids=positions, positions=positions)

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
