"""vLLM: the top-k that it chooses itself, its DeepGEMM, its gather.

The compiled ops come with ``vllm._custom_ops``. If vLLM is not installed, they come with
``--load-library .../_C_stable_libtorch.abi3.so``. Read in vLLM 0.26 and 0.33.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from dsv4_plugin.cli.bench.upstream.prepared import Prepared, imported, need, release, schedule_of
from dsv4_plugin.cli.checks.topk_cases import KS, PAGE_SIZE
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype

__all__ = ["CHOICE", "FORMS", "name"]

CHOICE = ""

LIBRARY = "vllm (loaded library)"
COOPERATIVE_ROWS = 32  # up to 0.32; later releases name their own
WORKSPACE = 1 << 20  # RADIX_TOPK_WORKSPACE_SIZE of every release

_workspaces = Prepared("vllm's workspace")
_schedules = Prepared("vllm's schedule")


def name() -> str | None:
    """Return vLLM's name with its release, or the loaded library's name; None without both."""
    loaded = _has("_C", "persistent_topk") or _has(*GATHER)
    return release("vllm") or (LIBRARY if loaded else None)


GATHER = ("_C_cache_ops", "cp_gather_indexer_k_quant_cache")


def _has(namespace: str, name: str) -> bool:
    try:
        getattr(getattr(torch.ops, namespace), name)
    except (AttributeError, RuntimeError):
        return False
    return True


def _op(namespace: str, name: str) -> Any:
    """Return a compiled op; an installed vLLM registers it when its ops are imported."""
    if not _has(namespace, name):
        imported("vllm._custom_ops")
        if not _has(namespace, name):
            raise LookupError(f"torch.ops.{namespace} has no {name}")
    return getattr(getattr(torch.ops, namespace), name)


def _cooperative_rows() -> int:
    if name() == LIBRARY:
        return COOPERATIVE_ROWS
    try:
        module = imported("vllm.model_executor.layers.indexer_topk")
    except LookupError:  # before 0.30 there is no such module
        return COOPERATIVE_ROWS
    return int(getattr(module, "AUTO_COOPERATIVE_MAX_ROWS", COOPERATIVE_ROWS))


def _decode() -> Any:
    cooperative, persistent = _op("_C", "cooperative_topk"), _op("_C", "persistent_topk")
    per_row = _op("_C", "top_k_per_row_decode")
    most = _cooperative_rows()

    def decode(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
        """``cooperative_topk``, ``persistent_topk`` or ``top_k_per_row_decode``, as vLLM chooses.

        vLLM takes the first for k 512, 1024 or 2048, rows whose stride divides by four, and up to
        32 rows (0.33: ``AUTO_COOPERATIVE_MAX_ROWS``, 64). It takes the second for more rows and the
        third for another k. Arguments of the first two: logits, lengths, out, workspace (uint8, 1
        MiB, from vLLM's workspace manager), k, the longest row. Here the longest row is the width,
        as in a graph that was captured for all lengths. Float32 only.
        """
        rows, columns = logits.shape
        need(logits.dtype == torch.float32, "takes float32 only")
        if k not in KS:
            per_row(logits, 1, lengths, out, rows, logits.stride(0), logits.stride(1), k)
            return
        which = cooperative if rows <= most and logits.stride(0) % 4 == 0 else persistent
        which(logits, lengths, out, _workspace(logits.device), k, columns)

    return decode


def _workspace(device: torch.device) -> torch.Tensor:
    return _workspaces.get(
        str(device), lambda: torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    )


def _prefill() -> Any:
    op = _op("_C", "top_k_per_row_prefill")

    def prefill(
        logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``top_k_per_row_prefill``, which vLLM runs on every chunk of a prefill.

        Arguments: logits, starts, ends, out, rows, both strides, k. Indices count from the row's
        start. Float32 only.
        """
        need(logits.dtype == torch.float32, "takes float32 only")
        op(logits, row_starts, row_ends, out, len(logits), logits.stride(0), logits.stride(1), k)

    return prefill


def _gather() -> Any:
    op = _op(*GATHER)

    def gather(
        cache: torch.Tensor, block_table: torch.Tensor, cu_seq_lens: torch.Tensor,
        values: torch.Tensor, scales: torch.Tensor,
    ) -> None:  # fmt: skip
        """``cp_gather_indexer_k_quant_cache``, which vLLM runs before a prefill's logits.

        Arguments: the cache ``[pages, 64, 132]``, values, scales, block table, cumulated lengths.
        It does not dequantise.
        """
        op(cache, values, scales, block_table, cu_seq_lens)

    return gather


# ---- DeepGEMM ------------------------------------------------------------------------------------


def _deep_gemm(function: str) -> Any:
    if name() == LIBRARY:
        raise LookupError("it is not in the loaded library")
    module = imported("vllm.utils.deep_gemm")
    if not callable(getattr(module, function, None)):
        raise LookupError(f"vllm.utils.deep_gemm has no {function}")
    resolve = getattr(module, "_lazy_init", None)
    if resolve is not None:
        resolve()
    if getattr(module, f"_{function}_impl", None) is None:
        raise LookupError("vLLM finds no DeepGEMM here")
    return module


def _of_dtype(module: Any, name: str, dtype: torch.dtype) -> Any:
    """Return vLLM's function, which writes float32; for bfloat16 the DeepGEMM function below it."""
    if dtype == torch.float32:
        return getattr(module, name)
    below = getattr(module, f"_{name}_impl")
    need(dtype == torch.bfloat16 and has_logits_dtype(below), f"does not write {dtype}")
    return below


def _more(function: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that only some releases have."""
    if dtype != torch.float32:
        return {"clean_logits": False, "logits_dtype": dtype}
    return {"clean_logits": False} if "clean_logits" in _parameters(function) else {}


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _logits() -> Any:
    function = "fp8_fp4_paged_mqa_logits"
    module = _deep_gemm(function)

    def logits(
        q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor,
        block_table: torch.Tensor, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """``vllm.utils.deep_gemm.fp8_fp4_paged_mqa_logits``, as vLLM's decode calls it.

        Arguments: ``(q, None)``, cache, weights, lengths, block table, schedule, the longest row,
        and up to 0.32 ``clean_logits=False``. The schedule is ``get_paged_mqa_logits_metadata`` of
        the lengths, once per step. vLLM asks for float32. For bfloat16 the peer calls the DeepGEMM
        function below it with ``logits_dtype``, which vLLM 0.33's DeepGEMM does not have.
        """
        call = _of_dtype(module, function, dtype)
        held = schedule_of(module, lengths, _schedules)
        width = block_table.shape[1] * PAGE_SIZE
        return call((q, None), cache, weights, lengths, block_table, held, width,
                    **_more(call, dtype))  # fmt: skip

    return logits


def _ragged_logits() -> Any:
    function = "fp8_fp4_mqa_logits"
    module = _deep_gemm(function)

    def ragged_logits(
        q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor,
        row_starts: torch.Tensor, row_ends: torch.Tensor, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """``vllm.utils.deep_gemm.fp8_fp4_mqa_logits``, as vLLM's prefill calls it.

        Arguments: ``(q, None)``, ``(keys, scales)``, weights, starts, ends, and then
        ``clean_logits=False`` or, from 0.33 on, the longest window.
        """
        call = _of_dtype(module, function, dtype)
        more = _more(call, dtype)
        if dtype == torch.float32 and "max_seqlen_k" in _parameters(call):
            more = {"max_seqlen_k": len(k)}
        return call((q, None), (k, k_scale), weights, row_starts, row_ends, **more)

    return ragged_logits


FORMS = {
    "decode": (("", _decode),),
    "prefill": ((" prefill", _prefill),),
    "paged": ((" paged", "its top-k answers in columns, not in pool slots"),),
    "gather": ((" cp_gather", _gather),),
    "logits": ((" DeepGEMM", _logits),),
    "ragged_logits": ((" DeepGEMM prefill", _ragged_logits),),
}
