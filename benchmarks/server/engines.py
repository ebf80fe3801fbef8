"""The differences between the engines whose servers are measured: one record for each."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.server.model import V4, Model
from dsv4_plugin.cli.ab import engines as shipped

__all__ = ["CHUNK", "ENGINES", "NAME", "Answer", "Engine", "Request"]

CHUNK = 8192  # tokens of a forward pass
NAME = "v4"  # the name of the model in a request
LARGE = 4  # times as many tokens as usual are a large piece of an answer
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384)  # requests of a captured batch
_TOLD = (
    r"dsv4|graph captur|Graph capturing|KV cache size|Model loading took|init engine|"
    r"took .* seconds|[Uu]s(?:e|ing) .* backend|Available KV|WARNING.*(?:topk|indexer)|"
    r"max_total_num_tokens|Capture .* end|KV Cache is allocated|token_capacity|device graphs"
)


# The plugin's lines in the formats of SGLang and TokenSpeed.
_SAID = re.compile(
    r"^\S*\[[^]]*\] ((?:dsv4 |DSV4_|--dsv4-topk |topk |DeepGEMM's bf16 |\w+ [\d.]+: the engine).*)"
)


@dataclass(frozen=True)
class Request:
    """A greedy completion of exactly ``tokens`` tokens; the rest as in ``Client.complete``."""

    prompt: Sequence[int]
    tokens: int
    salt: str | None = None
    ids: bool = False


@dataclass
class Answer:
    """One streamed answer; times in seconds of ``time.perf_counter``."""

    sent: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def total(self) -> int:
        """How many tokens came."""
        return sum(self.counts)

    def steady(self, tokens: int) -> tuple[float, float]:
        """When so many tokens had come, and when the last one came, but for large pieces.

        A server that was busy sends the tokens of many steps in one piece. The time of such a
        piece says nothing of the steps. Both times are the same if there are no other pieces.
        """
        most = LARGE * statistics.median(self.counts)
        came, known = 0, []
        for then, count in zip(self.times, self.counts, strict=True):
            came += count
            if came >= tokens and count <= most:
                known.append(then)
        return (known[0], known[-1]) if known else (self.times[-1], self.times[-1])

    def until(self, time: float) -> int:
        """How many tokens had come by then."""
        return sum(n for t, n in zip(self.times, self.counts, strict=True) if t <= time)


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        shipped: the engine's record in ``dsv4-plugin ab``; its ``server`` is the command.
        group: the group of entry points from which its processes load plugins.
        allowed: the variable that names the plugins that may be loaded.
        side: the module that is loaded into its processes for a measurement.
        environment: variables of its servers.
        wish: arguments that switch the plugin on, if the engine has such arguments.
        parallel: the option for the number of GPUs.
        arguments: model, traces' folder, options of the command, requests at once, share of the
            GPU's memory → the arguments after the model's folder.
        path: the path of a completion request; ``body`` is the request.
        read: a chunk of the stream → how many tokens have come; it adds ids to the answer.
        profile: traces' folder → the request that begins a profile.
        cache: the pattern of the tokens that the cache holds, in the log.
        graphs: the pattern of the GiB of captured graphs, in the log, once for each capture.
        copies: whether contexts can be copied.
        command: Python's arguments before the model, if not those of ``shipped``.
        said: the pattern of the plugin's lines in the log; its group is the message. SGLang and
            TokenSpeed write them in their own format, without ``[dsv4]``.
        told: the pattern of the lines that the results keep.
    """

    shipped: shipped.Engine
    group: str
    allowed: str
    side: str
    environment: Mapping[str, str]
    wish: tuple[str, ...]
    parallel: str
    arguments: Callable[[Model, Path, argparse.Namespace, int, float], list[str]]
    path: str
    body: Callable[[Request], dict[str, Any]]
    read: Callable[[dict[str, Any], Answer], int]
    profile: Callable[[Path], dict[str, Any]]
    cache: re.Pattern[str]
    graphs: re.Pattern[str]
    copies: bool
    command: tuple[str, ...] = ()
    said: re.Pattern[str] = re.compile(r"\[dsv4[^]]*\] (.*)")
    told: re.Pattern[str] = re.compile(_TOLD, re.I)


# --- vLLM --------------------------------------------------------------------------------------


def _vllm_arguments(
    model: Model, traces: Path, a: argparse.Namespace, requests: int, share: float
) -> list[str]:
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces),
        "torch_profiler_with_stack": False,
        "torch_profiler_use_gzip": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    options = ["--block-size", "256"] if model.kind == V4 else []
    if model.images:
        options += ["--limit-mm-per-prompt", '{"image": 0}']
    if model.tables:  # tables of n-grams: on the GPU, like all other tensors
        options += ["--engram-config", '{"cpu_offload": false}']
    sizes = [str(n) for n in GRAPHS if n <= requests]
    return [
        "--kv-cache-dtype", "fp8", "--profiler-config", json.dumps(profiler), *options,
        "--max-model-len", str(a.max_model_len), "--max-num-seqs", str(requests),
        "--max-num-batched-tokens", str(CHUNK),
        "--kv-cache-memory-bytes", str(int(a.kv_gib * 2**30)),
        "--gpu-memory-utilization", f"{share:.2f}",
        "--seed", "0", "--cudagraph-capture-sizes", *sizes,
    ]  # fmt: skip


def _vllm_body(request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": list(request.prompt),
        "max_tokens": request.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if request.ids:  # the stream also returns the prompt, before the first token
        body["return_token_ids"] = True
    if request.salt is not None:
        body["cache_salt"] = request.salt
    return body


def _vllm_read(chunk: dict[str, Any], answer: Answer) -> int:
    for choice in chunk["choices"]:
        answer.tokens += choice.get("token_ids") or ()
    return chunk["usage"]["completion_tokens"]


# --- SGLang ------------------------------------------------------------------------------------


def _cached(a: argparse.Namespace, requests: int) -> int:
    """Return the tokens of the cache of SGLang and TokenSpeed."""
    tokens: int = a.kv_tokens or requests * CHUNK + a.max_model_len
    return tokens


def _sglang_arguments(
    model: Model, traces: Path, a: argparse.Namespace, requests: int, share: float
) -> list[str]:
    # The cache is bounded in tokens. The share of the memory would also bound the weights, and
    # would count the memory of the servers beside this one.
    return [
        "--context-length", str(a.max_model_len), "--max-running-requests", str(requests),
        "--max-total-tokens", str(_cached(a, requests)), "--mem-fraction-static", "0.7",
        "--chunked-prefill-size", str(CHUNK), "--cuda-graph-max-bs-decode", str(requests),
        "--random-seed", "0", "--skip-server-warmup",
    ]  # fmt: skip


def _sglang_body(request: Request) -> dict[str, Any]:
    sampling = {"max_new_tokens": request.tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": list(request.prompt), "stream": True, "sampling_params": sampling}
    return body if request.salt is None else {**body, "cache_salt": request.salt}


def _sglang_read(chunk: dict[str, Any], answer: Answer) -> int:
    answer.tokens = chunk.get("output_ids") or answer.tokens  # all ids until now
    return chunk["meta_info"]["completion_tokens"]


# --- TokenSpeed --------------------------------------------------------------------------------


def _tokenspeed_arguments(
    model: Model, traces: Path, a: argparse.Namespace, requests: int, share: float
) -> list[str]:
    return [
        "--max-model-len", str(a.max_model_len), "--max-num-seqs", str(requests),
        "--max-total-tokens", str(_cached(a, requests)), "--gpu-memory-utilization", f"{share:.2f}",
        "--chunked-prefill-size", str(CHUNK), "--max-prefill-tokens", str(CHUNK),
        "--max-cudagraph-capture-size", str(requests), "--disable-kvstore", "--seed", "0",
        "--log-level", "info",
    ]  # fmt: skip


def _torch_profile(traces: Path) -> dict[str, Any]:
    """Return the request of SGLang and TokenSpeed."""
    return {
        "output_dir": str(traces), "activities": ["CPU", "GPU"],
        "with_stack": False, "record_shapes": False,
    }  # fmt: skip


ENGINES = {
    "vllm": Engine(
        shipped.ENGINES["vllm"], "vllm.general_plugins", "VLLM_PLUGINS",
        "benchmarks.server.vllm_side:register",
        # The prefix cache then keeps only the end of a prompt's sliding windows, and not a piece of
        # every 256 tokens. Those pieces take ten times the memory of the context itself, and evict
        # it. 0.33 does this by default, and warns that it does not know the variable.
        {"VLLM_PREFIX_CACHE_RETENTION_INTERVAL": "0"},
        ("--plugin", "dsv4"), "--tensor-parallel-size", _vllm_arguments,
        "/v1/completions", _vllm_body, _vllm_read, lambda traces: {},
        re.compile(r"KV cache size: ([\d,]+) tokens"),
        re.compile(r"Graph capturing finished in .* took (-?[\d.]+) GiB"),
        copies=True,
    ),
    "sglang": Engine(
        shipped.ENGINES["sglang"], "sglang.srt.plugins", "SGLANG_PLUGINS",
        "benchmarks.server.sglang_side:register", {}, (), "--tp-size", _sglang_arguments,
        "/generate", _sglang_body, _sglang_read,
        _torch_profile,
        re.compile(r"max_total_num_tokens=(\d+)"),
        re.compile(r"Capture .* end\. .*mem usage=(-?[\d.]+) GB"),
        copies=False,
        said=_SAID,
    ),
    "tokenspeed": Engine(
        shipped.ENGINES["tokenspeed"], "tokenspeed.plugins", "TOKENSPEED_PLUGINS",
        "benchmarks.server.tokenspeed_side:register", {}, (), "--tensor-parallel-size",
        _tokenspeed_arguments, "/generate", _sglang_body, _sglang_read,
        _torch_profile,
        re.compile(r"token_capacity=(\d+)"),
        re.compile(r"\| Activations \+ device graphs +\| +([\d.]+)"),
        copies=False,
        command=("-m", "benchmarks.server.tokenspeed_front", "--model"),
        said=_SAID,
        told=re.compile(rf"{_SAID.pattern}|token_capacity|device graphs|Startup compiled"),
    ),
}  # fmt: skip
