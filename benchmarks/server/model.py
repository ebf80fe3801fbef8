"""A model's configuration: its indexer, and the other parts that a server needs to know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared.run import UsageError, reading

__all__ = ["V32", "V4", "V41", "Model", "read"]

V4, V41, V32 = "deepseek_v4", "deepseek_v41", "deepseek_v32"
_TOLD = (
    "num_hidden_layers", "n_routed_experts", "index_topk", "index_n_heads", "compress_ratios",
    "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id",
    "candidate_topk_blocks", "candidate_block_size", "hidden_size", "expert_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        kind: :data:`V4`, :data:`V41`, :data:`V32` or another ``model_type``.
        indexers: layers with an indexer.
        writers: layers that write their own key to an indexer's cache in each step.
        images: whether it also takes images.
        tables: whether it has tables of n-grams.
        about: the model's fields in the results.
    """

    kind: str
    indexers: int
    writers: int
    about: dict[str, Any]
    images: bool = False
    tables: bool = False


def read(folder: Path) -> Model:
    """Return the model that ``config.json`` in a folder describes.

    Raises:
        UsageError: the file is missing, or does not describe a model.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"--model {folder}: no config.json there")
    with reading(file, "configuration"):
        return _model(json.loads(file.read_text(encoding="utf-8")))


def _model(config: dict[str, Any]) -> Model:
    kind = config["model_type"]
    text = config.get("text_config", config)  # V4.1 has the layers there
    about = {"model_type": kind, **{key: text[key] for key in _TOLD if key in text}}
    if kind == V41:
        keys, indices = text["kv_source_layer_ids"], text["index_source_layer_ids"]
        tables = bool(text.get("engram_layer_ids"))
        return Model(kind, len(indices), len(keys), about, images=True, tables=tables)
    layers = text.get("compress_ratios", []).count(4) or text["num_hidden_layers"]
    return Model(kind, layers, layers, about)
