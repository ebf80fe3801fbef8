"""The drills of SGLang: faults, and the modes of its server in which the plugin must serve."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.server import model
from benchmarks.server.client import random_prompt
from benchmarks.server.drill import (
    SHADOW,
    Drill,
    capability,
    failing,
    fault,
    off,
    serving,
    without_library,
)
from benchmarks.server.engines import Request
from benchmarks.server.server import Server

__all__ = ["DRILLS"]

_TOPK = ("topk.paged",)
_ALL = (*_TOPK, "logits.plugin")
_NONE = (*_ALL, "logits.bf16")
# SGLang gathers the keys of a prefill of one request from so many tokens on (default: 8,192).
_DENSE = {"SGLANG_OPT_DSV4_NONPAGED_INDEXER_MIN_QUERY_TOKENS": "1024"}
_CACHED = 5000  # tokens of the prompt that the radix cache must hold


def _sleep(server: Server) -> None:
    """Let SGLang free its memory, and take it again. The weights are kept in host memory."""
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        server.client.read(path, {})


def _again(server: Server) -> None:
    """Send a prompt twice, and check that the second time the radix cache holds its beginning."""
    engine = server.engine
    whole = engine.body(Request(random_prompt(_CACHED, 7), 8))
    del whole["stream"]
    answers = [json.loads(server.client.read(engine.path, whole)) for _ in range(2)]
    found = answers[1]["meta_info"]["cached_tokens"]
    if found < _CACHED // 2:
        raise RuntimeError(f"the radix cache held {found} of {_CACHED} tokens")


def _mode(name: str, what: str, *arguments: str, **more: Any) -> Drill:
    return serving(name, f"nothing: {what}", _ALL, arguments=arguments, kinds=(model.V4,), **more)


DRILLS = (
    off("--dsv4-topk auto", _NONE, arguments=("--dsv4-topk", "auto")),
    _mode("on", "the plugin serves"),
    capability(_NONE),
    without_library(_NONE),
    Drill(
        "seam", "a function of SGLang's that is hooked has another name",
        r"the engine's own code stays at topk\.paged \(.*topk_transform_paged", fault("seam"),
        never=_NONE, kinds=(model.V4,),
    ),
    failing("topk", "the top-k", ("topk.paged.upstream",), _TOPK),
    failing("logits", "the logits kernel", ("topk.paged.upstream",), ("logits.plugin",)),
    Drill(
        "deep_gemm", "DeepGEMM's bfloat16 logits raise at their first call",
        r"DeepGEMM's bf16 logits failed at a call \(RuntimeError: drill: deep_gemm\)",
        {**fault("deep_gemm"), **_DENSE}, counts=_ALL, never=("logits.bf16", "topk.paged.upstream"),
        upstream=False, kinds=(model.V4,),
    ),
    serving(
        "shadow",
        "nothing: SGLang's selection runs beside the plugin's in float32, on the same scores",
        _TOPK, SHADOW, dtype="fp32", shadow=("paged",), kinds=(model.V4,),
    ),
    _mode("sleep", "the engine frees its memory and takes it again between two rounds",
          "--enable-memory-saver", "--enable-weights-cpu-backup", act=_sleep),
    _mode("eager", "without CUDA graphs", "--cuda-graph-backend-decode", "disabled"),
    _mode("breakable", "prefill in breakable CUDA graphs",
          "--cuda-graph-backend-prefill", "breakable", "--cuda-graph-max-bs-prefill", "512"),
    serving("dense", "nothing: DeepGEMM writes the logits of a prefill of one request, in bfloat16",
            (*_ALL, "logits.bf16"), _DENSE, kinds=(model.V4,)),
    _mode("mixed", "prefill in chunks of 2,048 tokens, in batches with decode",
          "--enable-mixed-chunk", "--chunked-prefill-size", "2048"),
    _mode("radix", "a prompt that the radix cache holds", act=_again, same=False),
    _mode("mtp", "MTP with three draft tokens",
          "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3",
          "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)  # fmt: skip
