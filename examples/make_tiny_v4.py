#!/usr/bin/env python3
"""Write the folder of a DeepSeek-V4 model without weights: configuration and tokenizer.

    python examples/make_tiny_v4.py DIR                # 6 layers, 3 of them with the indexer
    python examples/make_tiny_v4.py DIR --full         # 43 layers, 21 of them with the indexer

Served with random weights (`--load-format dummy`) it runs the kernels of the real model: every
width is that of DeepSeek-V4-Flash, only the layers and the routed experts are fewer. With 16
experts the full depth is 17 GiB. `python -m benchmarks.server` serves and measures it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Compression of each layer's cache: 0 none (sliding window only), 4 with the indexer, 128 without.
TINY = (0, 0, 4, 128, 4, 4)
FULL = (0, 0, *(4, 128) * 20, 4)
EXPERTS = 16
TOP_K = 512
VOCABULARY = 129_280
MAX_TOKENS = 1 << 20
WORDS = 20_000
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def config(
    ratios: tuple[int, ...] = TINY, experts: int = EXPERTS, k: int = TOP_K
) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": 4096,
        "num_hidden_layers": len(ratios),
        "compress_ratios": list(ratios),
        "num_nextn_predict_layers": 1,  # served with --speculative-config only
        # Attention: 64 heads of 448 + 64 over one latent key.
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "sliding_window": 128,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # The indexer.
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": k,
        # Experts. The first layers choose theirs by a table over the vocabulary.
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(6, experts),
        "moe_intermediate_size": 2048,
        "num_hash_layers": min(2, len(ratios)),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "swiglu_limit": 10.0,
        # Hyper-connections.
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "compress_rope_theta": 160_000,
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65_536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def word(token: int) -> str:
    """Return the word of a token: three base-36 digits.

    Short words, because vLLM refuses a prompt of more characters than its longest token times the
    model's length.
    """
    return DIGITS[token // 1296] + DIGITS[token // 36 % 36] + DIGITS[token % 36]


def tokenizer() -> dict[str, Any]:
    """Return the content of tokenizer.json: words between blanks, which come back as they went."""
    special = ("<bos>", "<eos>", "<unk>")
    vocabulary = {name: i for i, name in enumerate(special)}
    vocabulary |= {word(i): i for i in range(len(special), WORDS)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for i, name in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def write(folder: Path, configuration: dict[str, Any]) -> None:
    """Write the four files of a model folder."""
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    files: dict[str, dict[str, Any]] = {
        "config.json": configuration,
        "generation_config.json": {**ends, "do_sample": False},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_TOKENS,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--full", action="store_true", help="all 43 layers")
    parser.add_argument(
        "--layers",
        type=lambda text: tuple(int(x) for x in text.split(",")),
        metavar="R,R,…",
        help="compression of each layer: 0, 4 (has the indexer) or 128",
    )
    parser.add_argument("--experts", type=int, default=EXPERTS, help=f"routed (default: {EXPERTS})")
    parser.add_argument("--topk", type=int, default=TOP_K, help=f"default: {TOP_K}")
    a = parser.parse_args()
    ratios = a.layers or (FULL if a.full else TINY)
    if bad := [r for r in ratios if r not in (0, 4, 128)]:
        parser.error(f"--layers has {bad[0]}; a layer compresses by 0, 4 or 128")
    write(a.folder, config(ratios, a.experts, a.topk))
    print(f"{a.folder}: {len(ratios)} layers, {ratios.count(4)} with the indexer")


if __name__ == "__main__":
    main()
