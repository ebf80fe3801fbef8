"""What the makers of tiny models share: folders of DeepSeek models without weights.

Served with random weights (`--load-format dummy`), such a model runs the kernels of the real model.
Every width is the real one's. It has fewer routed experts and, on request, fewer layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPERTS = 16
TOP_K = 512
MAX_TOKENS = 1 << 20
VOCABULARY = 129_280
WORDS = 20_000
# SGLang renders a chat when it starts, and needs the names of the real model's tokens.
SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<unk>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<｜deepseek_image｜>",
)  # fmt: skip
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

ENDS = {"bos_token_id": 0, "eos_token_id": 1}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def decoder(ratios: Sequence[int], index_heads: int, experts: int, k: int) -> dict[str, Any]:
    """Return the settings of layers that V4 and V4.1 share; `ratios` has one for each layer."""
    return {
        **ENDS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": 4096,
        "num_hidden_layers": len(ratios),
        "compress_ratios": list(ratios),
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
        "index_n_heads": index_heads,
        "index_head_dim": 128,
        "index_topk": k,
        # Experts.
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(6, experts),
        "moe_intermediate_size": 2048,
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
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def word(token: int) -> str:
    """Return the word of a token: three base-36 digits.

    The words are short, because vLLM refuses a prompt of more characters than its longest token
    times the model's length.
    """
    return DIGITS[token // 1296] + DIGITS[token // 36 % 36] + DIGITS[token % 36]


def tokenizer() -> dict[str, Any]:
    """Return the content of tokenizer.json: words between blanks, which decode to themselves."""
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    vocabulary |= {word(i): i for i in range(len(SPECIAL), WORDS)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for i, name in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def write(folder: Path, configuration: dict[str, Any]) -> None:
    """Write the four files of a model folder."""
    files: dict[str, dict[str, Any]] = {
        "config.json": configuration,
        "generation_config.json": {**ENDS, "do_sample": False},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "unk_token": SPECIAL[2],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_TOKENS,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
