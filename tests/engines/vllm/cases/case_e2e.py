"""The parts of a vLLM release on which the end-to-end benchmark relies: model folder and hooks."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import vllm

from benchmarks.server import vllm_side
from dsv4_plugin.engines.shared import source

ROOT = Path(__file__).resolve().parents[4]
VLLM = tuple(map(int, vllm.__version__.split(".")[:2]))
FORMS = {"tiny": (6, 3), "full": (43, 21), "two layers": (2, 1)}
V41_FORMS = {"tiny": ([], 6, 3), "full": (["--full"], 40, 8)}


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
    """The compression that the model uses for each layer; 1 is none."""
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


@pytest.mark.parametrize("form", V41_FORMS)
def test_vllm_reads_the_configuration_of_v41(form: str, tmp_path: Path) -> None:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    options, layers, indexers = V41_FORMS[form]
    maker = ROOT / "examples" / "make_tiny_v41.py"
    done = subprocess.run(
        [sys.executable, maker, tmp_path, *options], capture_output=True, text=True, check=True
    )
    assert f"{layers} layers, {indexers} with the indexer" in done.stdout
    written = json.loads((tmp_path / "config.json").read_text())
    if written["architectures"][0] not in ModelRegistry.get_supported_archs():
        assert VLLM < (0, 30), "V4.1 came with 0.30"
        return
    config = get_config(str(tmp_path), trust_remote_code=False)
    text = written["text_config"]
    same = ("index_topk", "index_n_heads", "index_source_layer_ids", "kv_source_layer_ids",
            "candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size",
            "compress_ratios", "num_hidden_layers", "hidden_size", "sliding_window",
            "num_nextn_predict_layers", "dspark_target_layer_ids", "dspark_block_size",
            "dspark_markov_rank", "dspark_noise_token_id")  # fmt: skip
    assert {key: getattr(config, key) for key in same} == {key: text[key] for key in same}
    assert (config.model_type, config.expert_dtype) == ("deepseek_v41", "fp4")
    # The drafter reads layers of the model.
    assert max(config.dspark_target_layer_ids) < config.num_hidden_layers


def test_vllm_reads_the_configuration_of_v32(tmp_path: Path) -> None:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    maker = ROOT / "examples" / "make_tiny_v32.py"
    subprocess.run([sys.executable, maker, tmp_path], capture_output=True, check=True)
    written = json.loads((tmp_path / "config.json").read_text())
    config = get_config(str(tmp_path), trust_remote_code=False)
    same = ("index_topk", "index_n_heads", "index_head_dim", "num_hidden_layers", "hidden_size",
            "kv_lora_rank", "qk_rope_head_dim", "first_k_dense_replace")  # fmt: skip
    assert {key: getattr(config, key) for key in same} == {key: written[key] for key in same}
    assert (config.index_topk, config.index_head_dim) == (2048, 128)
    assert set(config.architectures) <= set(ModelRegistry.get_supported_archs())


def test_the_tokenizer_returns_what_it_got(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    ids = [8, 1295, 1296, 19_999]
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


def test_the_warm_up_that_is_left_out_takes_what_it_is_given() -> None:
    name = "_warmup_ll_bf16_router_gemm"
    given = source.find("vllm.model_executor.warmup.kernel_warmup").parameters(name)
    module = SimpleNamespace(**{name: None})
    vllm_side._no_router_warmup(module)
    assert getattr(module, name)(*given) is None


def test_the_runners_have_the_seams_for_copied_contexts() -> None:
    first, second = map(source.find, vllm_side.RUNNERS)
    takes = first.parameters("GPUModelRunner._model_forward")
    assert takes[:3] == ("self", "input_ids", "positions")
    for name in ("load_model", "execute_model"):
        assert second.parameters(f"GPUModelRunner.{name}")[0] == "self"
    text = second.text_of("")
    assert "def _model_forward" not in text, "it is told from the first one by that"
    assert "self.model(**model_inputs)" in text
    assert '"input_ids": input_ids' in text and '"positions": input_batch.positions' in text
    for runner in (first, second):
        for name in ("kv_cache_config", "slot_mappings_by_layer", "model_config"):
            assert name in runner.text_of(""), name
    context = source.find("vllm.forward_context").text_of("")
    assert "slot_mapping: dict[str, torch.Tensor]" in context


def test_the_seams_that_drills_break_are_there() -> None:
    for fault in vllm_side.SEAMS:
        module, name = vllm_side.SEAMS[fault]
        try:
            assert source.find(module).binds(name)
        except source.Missing:
            assert fault == "candidate_seam" and VLLM < (0, 30)


def test_a_broken_seam_is_broken_where_it_was_imported_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, name = vllm_side.SEAMS["seam"]
    module = importlib.import_module(path)
    early = ModuleType("vllm.imported_early")
    early.alias = getattr(module, name)
    monkeypatch.setitem(sys.modules, early.__name__, early)
    monkeypatch.setattr(module, name, early.alias)
    vllm_side._renamed(module, name)
    for changed in (getattr(module, name), early.alias):
        assert list(inspect.signature(changed).parameters) == ["anything"]
