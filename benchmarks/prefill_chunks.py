"""The chunks in which an engine scores a prompt of DeepSeek-V4, and the bytes of a chunk's scores.

    python -m benchmarks.prefill_chunks --engine vllm --json cpu_prefill_chunks.json

The engine's own function cuts each step of a prompt into chunks; no model and no GPU is needed.
``float32`` is the engine's budget as it is; ``bfloat16`` is twice the budget, which the plugin asks
for when scores have two bytes. Lengths are in tokens, bytes are those of the scores of one layer.
Results of an engine that the file has already are replaced.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tool import tool
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import Parser, reading

__all__ = ["main", "parser"]

RATIO = 4  # tokens of a key of the indexer
STEP = 8192  # tokens of a step
CONTEXTS = (131_072, 524_288, 1_048_576)
# SGLang's budget depends on the GPU: 141 GB, of which a server keeps 88 % for weights and cache.
SGLANG_GPU, SGLANG_STATIC = 143_771 * 2**20, 0.88


def vllm_chunks() -> tuple[int, Callable[[int, int, int], list[int]]]:
    """Return vLLM's budget, and the rows of each chunk of a step by rows, keys and budget."""
    import torch
    from vllm import envs
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder

    def chunks(rows: int, keys: int, budget: int) -> list[int]:
        found = DeepseekV32IndexerMetadataBuilder._split_indexer_prefill_chunks(
            torch.tensor([keys]), torch.tensor([rows]), 40 * keys, budget
        )
        return [part.stop - part.start for _, part in found]

    return envs.VLLM_SPARSE_INDEXER_MAX_LOGITS_MB * 2**20, chunks


def sglang_chunks() -> tuple[int, Callable[[int, int, int], list[int]]]:
    """Return SGLang's budget with nothing else in the free memory, and the same function."""
    from sglang.srt.layers.attention.dsv4.metadata import iter_row_chunks, plan_indexer_row_chunks
    from sglang.srt.layers.attention.mqa_logits_utils import mqa_logits_free_mem_fraction

    def chunks(rows: int, keys: int, budget: int) -> list[int]:
        each = plan_indexer_row_chunks(
            num_rows=rows, num_cols=keys, budget_bytes=budget, sm120_row_cap=None
        )
        parts = iter_row_chunks(num_rows=rows, rows_per_chunk=each)
        return [part.stop - part.start for part in parts]

    free = int(SGLANG_GPU * (1 - SGLANG_STATIC))
    return int(free * mqa_logits_free_mem_fraction()), chunks


ENGINES = {"vllm": vllm_chunks, "sglang": sglang_chunks}


def measure(engine: str) -> list[dict[str, Any]]:
    """Return the results of an engine, which is installed here."""
    budget, chunks = ENGINES[engine]()
    results = []
    for context in CONTEXTS:
        for dtype, size, asked in (("float32", 4, budget), ("bfloat16", 2, 2 * budget)):
            steps = [
                (keys, chunks(STEP, keys, asked))
                for keys in range(STEP // RATIO, context // RATIO + 1, STEP // RATIO)
            ]
            results.append(
                {
                    "engine": engine, "version": importlib.metadata.version(engine),
                    "context": context, "dtype": dtype, "budget": budget,
                    "chunks": sum(len(rows) for _, rows in steps),
                    "last_step": len(steps[-1][1]),
                    "peak_bytes": max(keys * max(rows) * size for keys, rows in steps),
                }
            )  # fmt: skip
    return results


def parser() -> Parser:
    """Return the command line."""
    p = Parser(prog="python -m benchmarks.prefill_chunks", description=__doc__)
    p.add_argument("--engine", choices=sorted(ENGINES), required=True)
    p.add_argument("--json", type=outputs.file, required=True, help="the results file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return tool(parser(), _run, argv)


def _run(a: argparse.Namespace) -> int:
    kept: list[dict[str, Any]] = []
    if a.json.is_file():
        with reading(a.json):
            before = json.loads(a.json.read_text(encoding="utf-8"))["results"]
        kept = [row for row in before if row["engine"] != a.engine]
    what = f"steps of {STEP} tokens, a key for {RATIO} tokens"
    document: dict[str, Any] = {"what": what, "complete": False, "results": kept}
    with Results(document, a.json):
        found = measure(a.engine)
        document["results"] = sorted([*kept, *found], key=lambda row: str(row["engine"]))
        document["complete"] = True
    for row in document["results"]:
        print(*row.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
