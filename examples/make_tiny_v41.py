#!/usr/bin/env python3
"""Write the folder of a DeepSeek-V4.1 model without weights: configuration and tokenizer.

    python examples/make_tiny_v41.py DIR               # 6 layers, 3 of them with the indexer
    python examples/make_tiny_v41.py DIR --full        # 40 layers, 8 of them with the indexer

Both have every kind of layer of V4.1: without compressed keys; with its own keys; with another
layer's keys and its own indices; with another layer's indices; the layer that publishes candidate
blocks, and the layers that select among them. `--full` puts them at the layers where
DeepSeek-V4.1-Flash has them. Widths outside the indexer are V4-Flash's, also where V4.1-Flash's
differ. The n-gram tables, and all but a stub of the vision tower, are left out. The model has a
DSpark drafter of three layers, which an engine builds only with a speculative configuration. Its
sizes are not those of V4.1-Flash.

Serve it with `--limit-mm-per-prompt '{"image": 0}'`, as `python -m benchmarks.server` does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_model import ENDS, EXPERTS, QUANTIZATION, TOP_K, decoder, write


@dataclass(frozen=True)
class Layers:
    """The role of each layer.

    Attributes: ratios: positions that a layer's compressed key stands for; 0: the layer has none.
    keys: layers that write keys, for themselves and the layers after them. indices: layers with an
    indexer, for themselves and the layers after them. candidates: the layer that publishes
    candidate blocks; the indexers after it read them. targets: layers whose inputs the drafter
    reads.
    """

    ratios: tuple[int, ...]
    keys: tuple[int, ...]
    indices: tuple[int, ...]
    candidates: int
    targets: tuple[int, ...]


TINY = Layers((0, 0, 2, 1, 1, 1), keys=(2, 3), indices=(2, 3, 4), candidates=3, targets=(1, 3, 5))
FULL = Layers(
    (0, 0, *(2,) * 18, *(1,) * 20),
    keys=(2, 8, 14, 20),
    indices=(2, 8, 14, 20, 24, 28, 32, 36),
    candidates=20,
    targets=(1, 20, 39),
)


def config(layers: Layers = TINY, experts: int = EXPERTS, k: int = TOP_K) -> dict[str, Any]:
    """Return the content of config.json."""
    text = {
        **decoder(layers.ratios, index_heads=32, experts=experts, k=k),
        "model_type": "deepseek_v41_text",
        "kv_source_layer_ids": list(layers.keys),
        "index_source_layer_ids": list(layers.indices),
        "candidate_source_layer_id": layers.candidates,
        "candidate_topk_blocks": 2048,
        "candidate_block_size": 8,
        # The drafter: layers after the last one, which draft a block of tokens in one pass.
        "num_nextn_predict_layers": 3,
        "dspark_target_layer_ids": list(layers.targets),
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": 2,
    }
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "torch_dtype": "bfloat16",
        **ENDS,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "num_hidden_layers": 1,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "patch_size": 14,
        },
        "quantization_config": {**QUANTIZATION, "expert_dtype": "fp4"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--full", action="store_true", help="all 40 layers")
    parser.add_argument("--experts", type=int, default=EXPERTS, help=f"routed (default: {EXPERTS})")
    parser.add_argument("--topk", type=int, default=TOP_K, help=f"default: {TOP_K}")
    a = parser.parse_args()
    layers = FULL if a.full else TINY
    write(a.folder, config(layers, a.experts, a.topk))
    print(f"{a.folder}: {len(layers.ratios)} layers, {len(layers.indices)} with the indexer")


if __name__ == "__main__":
    main()
