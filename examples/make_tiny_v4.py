#!/usr/bin/env python3
"""Write the folder of a DeepSeek-V4 model without weights: configuration and tokenizer.

    python examples/make_tiny_v4.py DIR                # 6 layers, 3 of them with the indexer
    python examples/make_tiny_v4.py DIR --full         # 43 layers, 21 of them with the indexer

The widths are those of DeepSeek-V4-Flash. With 16 experts the full depth is 17 GiB.
`python -m benchmarks.server` serves and measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tiny_model import EXPERTS, QUANTIZATION, TOP_K, VOCABULARY, WORDS, decoder, write

# The compression of each layer's cache: 0 none (sliding window only), 4 with the indexer, 128
# without it.
TINY = (0, 0, 4, 128, 4, 4)
FULL = (0, 0, *(4, 128) * 20, 4)


def config(
    ratios: tuple[int, ...] = TINY, experts: int = EXPERTS, k: int = TOP_K
) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        **decoder(ratios, index_heads=64, experts=experts, k=k),
        "num_nextn_predict_layers": 1,  # used only with --speculative-config
        "num_hash_layers": min(2, len(ratios)),  # a table over the tokens chooses their experts
        "expert_dtype": "fp4",
        "quantization_config": QUANTIZATION,
    }


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
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=VOCABULARY,
        metavar="N",
        help=f"rows of the embedding and of the head, {WORDS} or more (default: {VOCABULARY})",
    )
    a = parser.parse_args()
    ratios = a.layers or (FULL if a.full else TINY)
    if bad := [r for r in ratios if r not in (0, 4, 128)]:
        parser.error(f"--layers has {bad[0]}; a layer compresses by 0, 4 or 128")
    if a.vocabulary < WORDS:
        parser.error(f"--vocabulary is {a.vocabulary}; the tokenizer has {WORDS} words")
    write(a.folder, {**config(ratios, a.experts, a.topk), "vocab_size": a.vocabulary})
    print(f"{a.folder}: {len(ratios)} layers, {ratios.count(4)} with the indexer")


if __name__ == "__main__":
    main()
