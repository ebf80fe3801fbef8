#!/usr/bin/env python3
"""Write the folder of a DeepSeek-V3.2 model without weights: configuration and tokenizer.

    python examples/make_tiny_v32.py DIR               # 4 layers, all with the indexer

The widths are those of DeepSeek-V3.2: no compression, and an indexer that selects 2,048 keys. Three
of four layers have experts. `python -m benchmarks.server` serves and measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tiny_model import ENDS, EXPERTS, QUANTIZATION, VOCABULARY, write

LAYERS = 4
TOP_K = 2048
MAX_TOKENS = 163_840


def config(layers: int = LAYERS, experts: int = EXPERTS, k: int = TOP_K) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "torch_dtype": "bfloat16",
        **ENDS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": 7168,
        "num_hidden_layers": layers,
        # Attention: 128 heads over one latent key of 512 + 64.
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # The indexer.
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": k,
        # Experts, in all layers but the first.
        "intermediate_size": 18_432,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, experts),
        "n_group": 8,
        "topk_group": 4,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "num_nextn_predict_layers": 1,  # used only with --speculative-config
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "quantization_config": QUANTIZATION,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"default: {LAYERS}")
    parser.add_argument("--experts", type=int, default=EXPERTS, help=f"routed (default: {EXPERTS})")
    parser.add_argument("--topk", type=int, default=TOP_K, help=f"default: {TOP_K}")
    a = parser.parse_args()
    write(a.folder, config(a.layers, a.experts, a.topk))
    print(f"{a.folder}: {a.layers} layers, all with the indexer")


if __name__ == "__main__":
    main()
