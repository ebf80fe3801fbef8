"""What a model's configuration says of its indexer, and of what it has besides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared.run import UsageError, reading

__all__ = ["V4", "V41", "Model", "read"]

V4, V41 = "deepseek_v4", "deepseek_v41"
_TOLD = (
    "num_hidden_layers", "n_routed_experts", "index_topk", "index_n_heads", "compress_ratios",
    "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id",
    "candidate_topk_blocks", "candidate_block_size", "hidden_size", "expert_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        kind: :data:`V4`, :data:`V41` or another ``model_type``.
        indexers: layers with an indexer.
        writers: layers that write a key of their own to an indexer's cache in each step.
        images: whether it takes images as well.
        tables: whether it has tables of n-grams.
        about: what the results say of it.
    """

    kind: str
    indexers: int
    writers: int
    about: dict[str, Any]
    images: bool = False
    tables: bool = False


def read(folder: Path) -> Model:
    """Return what ``config.json`` in a model's folder says.

    Raises:
        UsageError: it is not there, or says nothing of a model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"--model {folder}: no config.json there")
    with reading(file, "configuration"):
        return _model(json.loads(file.read_text(encoding="utf-8")))


def _model(config: dict[str, Any]) -> Model:
    kind = config["model_type"]
    text = config.get("text_config", config)  # V4.1 has its layers there
    about = {"model_type": kind, **{key: text[key] for key in _TOLD if key in text}}
    if kind == V41:
        keys, indices = text["kv_source_layer_ids"], text["index_source_layer_ids"]
        tables = bool(text.get("engram_layer_ids"))
        return Model(kind, len(indices), len(keys), about, images=True, tables=tables)
    layers = text.get("compress_ratios", []).count(4) or text["num_hidden_layers"]
    return Model(kind, layers, layers, about)
