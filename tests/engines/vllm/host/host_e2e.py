"""What the end-to-end benchmark relies on in a vLLM release: the model's folder, and its hooks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.server import vllm_side
from dsv4_plugin.engines.shared import source

ROOT = Path(__file__).resolve().parents[4]
FORMS = {"tiny": (6, 3), "full": (43, 21), "two layers": (2, 1)}


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    options = {"tiny": [], "full": ["--full"], "two layers": ["--layers", "4,128"]}
    command = [sys.executable, ROOT / "examples" / "make_tiny_v4.py", folder]
    done = subprocess.run(
        [*map(str, command), *options[request.param]], capture_output=True, text=True, check=True
    )
    layers, indexers = FORMS[request.param]
    assert f"{layers} layers, {indexers} with the indexer" in done.stdout
    return folder


def compress_ratios(config: Any) -> list[int]:
    """What the model takes as each layer's compression; 1 is none."""
    if hasattr(config, "compress_ratios"):  # 0.26
        return [max(1, ratio) for ratio in config.compress_ratios]
    return [max(1, config.compress_rates.get(kind, 0)) for kind in config.layer_types]


def test_vllm_reads_the_configuration(model: Path) -> None:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    written = json.loads((model / "config.json").read_text())
    config = get_config(str(model), trust_remote_code=False)
    assert config.model_type == "deepseek_v4"
    same = ("index_topk", "index_n_heads", "index_head_dim", "head_dim", "n_routed_experts",
            "hc_mult", "sliding_window", "max_position_embeddings")  # fmt: skip
    assert {key: getattr(config, key) for key in same} == {key: written[key] for key in same}
    assert compress_ratios(config) == [max(1, ratio) for ratio in written["compress_ratios"]]
    assert set(config.architectures) <= set(ModelRegistry.get_supported_archs())


def test_the_tokenizer_returns_what_it_got(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    ids = [3, 1295, 1296, 19_999]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert max(map(len, text.split())) == 3


def test_random_weights_take_the_place_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import dummy_loader

    owner = dummy_loader.DummyModelLoader
    monkeypatch.setattr(owner, "load_weights", owner.load_weights)
    for name in ("initialize_dummy_weights", "initialize_single_dummy_weight"):
        if hasattr(dummy_loader, name):
            monkeypatch.setattr(dummy_loader, name, getattr(dummy_loader, name))
    vllm_side._weights(dummy_loader)

    class Derives(torch.nn.Linear):
        derived = 0

        def finalize_mhc_broadcast_weights(self) -> None:
            Derives.derived += 1

    model = torch.nn.Sequential(Derives(1024, 64, bias=False), torch.nn.LayerNorm(8))
    config = SimpleNamespace(hf_config=SimpleNamespace(n_routed_experts=16))
    owner.load_weights(object.__new__(owner), model, config)
    assert model[0].weight.detach().std() == pytest.approx(1 / 32, rel=0.05)
    assert model[1].weight.tolist() == [1.0] * 8
    assert Derives.derived == 1


def test_the_runner_has_the_seam_for_copied_contexts() -> None:
    runner = source.find("vllm.v1.worker.gpu_model_runner")
    runner.require("GPUModelRunner._model_forward", ("self", "input_ids", "positions"))
    for name in ("_kernel_block_sizes", "kv_cache_config", "input_batch"):
        assert runner.mentions(name), name
