"""SGLang: its top-k v2, its small bfloat16 top-k, its DeepGEMM.

The top-k is compiled by SGLang's own JIT at the first call. Read in SGLang 0.5.16 to 0.5.23.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from dsv4_plugin.cli.bench.upstream.prepared import (
    Prepared,
    imported,
    lengths_of,
    need,
    release,
    schedule_of,
    zeros_for,
)
from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype

__all__ = ["CHOICE", "FORMS", "name", "paged_with_raw"]

CHOICE = " v2"

# The module of DeepSeek-V4's top-k: from 0.5.17 on, and before.
MODULES = ("sglang.kernels.ops.attention.dsv4.topk", "sglang.jit_kernel.dsv4.topk")
TRANSFORMS = ("topk_transform_paged_v2", "topk_transform_512_v2")  # renamed in 0.5.20
SMALL_COLUMNS = 16_384

_plans = Prepared("SGLang's plan")
_tables = Prepared("a page table", most=8)
_windows = Prepared("the windows' lengths")
_schedules = Prepared("DeepGEMM's schedule")


def name() -> str | None:
    """Return SGLang's name with its release; None if it is not installed."""
    return release("sglang")


def _topk() -> Any:
    imported("sglang")
    why = ""
    for name in MODULES:
        try:
            return imported(name)
        except LookupError as error:
            why = why or str(error)
    raise LookupError(why)


def _function(*names: str) -> Any:
    module = _topk()
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return found
    raise LookupError(f"{module.__name__} has no {' or '.join(names)}")


def _plan(make: Any, lengths: torch.Tensor) -> torch.Tensor:
    """Return the plan for these lengths; each eager call makes it anew.

    The kernel reads the plan before it waits for the previous kernel (programmatic dependent
    launch). So the kernel that makes the plan must not come right before it. The copy lies between
    them.
    """
    return _plans.anew((len(lengths), lengths.data_ptr()), lambda: make(lengths))


def _identity(logits: torch.Tensor) -> torch.Tensor:
    """Return a page table that makes a slot equal to a column."""
    (rows, columns), device = logits.shape, logits.device

    def make() -> torch.Tensor:
        pages = torch.arange(-(-columns // PAGE_SIZE), dtype=torch.int32, device=device)
        return pages.repeat(rows, 1)

    return _tables.get((rows, columns, str(device)), make)


def _checked(logits: torch.Tensor) -> None:
    need(logits.dtype == torch.float32, "takes float32 only")
    need(logits.stride(1) == 1 and logits.stride(0) % 4 == 0, "takes rows of aligned 16 bytes")


def _decode() -> Any:
    transform, make = _function(*TRANSFORMS), _function("plan_topk_v2")
    table = str(inspect.signature(transform).parameters["page_tables"].annotation)
    columns_too = "Optional" in table or "None" in table

    def decode(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
        """``topk_transform_paged_v2`` without a page table: it writes columns.

        Arguments: scores, lengths, page tables, out, page size, plan. The plan is ``plan_topk_v2``
        of the lengths, once per forward pass. SGLang passes the page table (:func:`_paged`). Up to
        0.5.16 the kernel needs one; here it is then the identity. Float32 only.
        """
        _checked(logits)
        pages = None if columns_too else _identity(logits)
        transform(logits, lengths, pages, out, PAGE_SIZE, _plan(make, lengths))

    return decode


def paged_with_raw() -> Any:
    """Return ``topk_transform_paged_v2`` as ``forward_c4_indexer`` calls it.

    Arguments: scores, lengths, page tables, out, page size, plan, and the raw indices or None. Up
    to 0.5.19 its name is ``topk_transform_512_v2``. Float32 only.
    """
    transform, make = _function(*TRANSFORMS), _function("plan_topk_v2")

    def paged(
        logits: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor,
        page_size: int, raw: torch.Tensor | None,
    ) -> None:  # fmt: skip
        _checked(logits)
        transform(logits, lengths, page_table, out, page_size, _plan(make, lengths), raw)

    return paged


def _paged() -> Any:
    with_raw = paged_with_raw()

    def paged(
        logits: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """:func:`paged_with_raw` without the raw indices."""
        with_raw(logits, lengths, page_table, out, PAGE_SIZE, None)

    return paged


def _small_paged() -> Any:
    small = _function("topk_transform_bf16_small")

    def small_paged(
        logits: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``topk_transform_bf16_small``, which SGLang runs only in V4.1's sparse indexer.

        Arguments: scores, lengths, page table, out, page size. Bfloat16, at most 16,384 columns.
        """
        need(logits.dtype == torch.bfloat16, "takes bfloat16 only")
        need(logits.shape[1] <= SMALL_COLUMNS, f"takes at most {SMALL_COLUMNS} columns")
        small(logits, lengths, page_table, out, PAGE_SIZE)

    return small_paged


def _small() -> Any:
    mapped = _small_paged()

    def small(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
        """:func:`_small_paged` with the identity table: it always maps columns to slots."""
        need(logits.shape[1] <= SMALL_COLUMNS, f"takes at most {SMALL_COLUMNS} columns")
        mapped(logits, lengths, _identity(logits), k, out)

    return small


def _prefill() -> Any:
    ragged = _function("topk_transform_ragged_v2")

    def prefill(
        logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``topk_transform_ragged_v2``, which the V3.2 path of SGLang runs on a prefill.

        Arguments: scores, lengths, and by name ``out_offsets``, ``out_indices``, ``row_starts``.
        SGLang passes the starts as offsets; here they are zeros, so that indices count from the
        row's start. The kernel overwrites up to three scores before a window, none of the row
        itself. Float32 only.
        """
        _checked(logits)
        lengths = lengths_of(row_starts, row_ends, _windows)
        zeros = zeros_for(lengths, _windows)
        ragged(logits, lengths, out_offsets=zeros, out_indices=out, row_starts=row_starts)

    return prefill


# ---- DeepGEMM ------------------------------------------------------------------------------------


def _deep_gemm(name: str) -> Any:
    try:
        module = imported("deep_gemm")
    except LookupError as error:
        raise LookupError(f"its DeepGEMM: {error}") from error
    if not callable(getattr(module, name, None)):
        raise LookupError(f"deep_gemm has no {name}")
    return module


def _wide(module: Any, name: str, dtype: torch.dtype) -> Any:
    """Return the function of DeepGEMM that takes a dtype for the logits."""
    wide = getattr(module, name.replace("fp8_", "fp8_fp4_", 1), None)
    need(dtype == torch.bfloat16 and has_logits_dtype(wide), f"does not write {dtype}")
    return wide


def _logits() -> Any:
    name = "fp8_paged_mqa_logits"
    module = _deep_gemm(name)

    def logits(
        q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor,
        block_table: torch.Tensor, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """``deep_gemm.fp8_paged_mqa_logits`` as ``forward_c4_indexer`` calls it.

        Arguments: q, cache, weights, lengths ``[batch, next_n]``, page table, schedule, the longest
        row, False (no cleaning). The schedule is ``get_paged_mqa_logits_metadata`` of the lengths,
        once per forward pass. SGLang asks for float32. For bfloat16 the peer calls
        ``fp8_fp4_paged_mqa_logits`` with ``(q, None)`` and ``logits_dtype``.
        """
        held = schedule_of(module, lengths, _schedules)
        rest = cache, weights, lengths, block_table, held, block_table.shape[1] * PAGE_SIZE
        if dtype == torch.float32:
            return getattr(module, name)(q, *rest, False)
        wide = _wide(module, name, dtype)
        return wide((q, None), *rest, clean_logits=False, logits_dtype=dtype)

    return logits


def _ragged_logits() -> Any:
    name = "fp8_mqa_logits"
    module = _deep_gemm(name)

    def ragged_logits(
        q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor,
        row_starts: torch.Tensor, row_ends: torch.Tensor, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """``deep_gemm.fp8_mqa_logits`` as SGLang's prefill calls it.

        Arguments: q, ``(keys, scales)``, weights, starts, ends, ``clean_logits=False``, and
        ``max_seqlen_k``, the longest window. Bfloat16 works as in :func:`_logits`.
        """
        rest = (k, k_scale), weights, row_starts, row_ends
        more: dict[str, Any] = {"clean_logits": False, "max_seqlen_k": len(k)}
        if dtype == torch.float32:
            return getattr(module, name)(q, *rest, **more)
        return _wide(module, name, dtype)((q, None), *rest, **more, logits_dtype=dtype)

    return ragged_logits


FORMS = {
    "decode": ((" v2", _decode), (" bf16_small", _small)),
    "prefill": ((" ragged_v2", _prefill),),
    "paged": ((" v2", _paged), (" bf16_small", _small_paged)),
    "gather": ((" gather", "it gathers from its memory pool, by no function of tensors"),),
    "logits": ((" DeepGEMM", _logits),),
    "ragged_logits": ((" DeepGEMM prefill", _ragged_logits),),
}
