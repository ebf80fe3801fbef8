"""The plugin's kernels in TokenSpeed's registry: logits by the plugin or DeepGEMM, then its top-k.

On Hopper the indexer of DeepSeek-V4 calls ``dsa_decode_topk`` and ``dsa_prefill_topk`` with a
page-planar FP8 plane and bfloat16 queries. The ``dsv4_*`` ops get FP8 queries. A plane is
``[pages, at least page_size · 132]`` uint8 and may be a strided view of an arena. So the kernels
address it by page and offset, never through a flattened view.

There is no host synchronisation and no control flow that depends on data, so decode can be
captured.
"""

from __future__ import annotations

from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin.engines.shared import logits as shared_logits
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.errors import UnmetError

__all__ = [
    "dsa_decode", "dsa_prefill", "dsv4_decode", "dsv4_prefill", "gather_slots", "logits_of",
    "quantise",
]  # fmt: skip

HEAD_DIM = 128
KEY_BYTES = HEAD_DIM + 4
E4M3_MAX = 448.0


def quantise(
    q: torch.Tensor, weights: torch.Tensor, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise queries to e4m3, one scale a token and head; multiply the scales into the weights.

    The score ``Σ weight · relu(q · k)`` is linear in a positive scale of ``q``, so the scale can
    move to the weight.
    """
    wide = q.float()
    scale = wide.abs().amax(dim=-1).clamp_min(1e-10) / E4M3_MAX
    values = (wide / scale.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values, weights.float() * scale * softmax_scale


def _pages(plane: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the plane as DeepGEMM takes it, ``[pages, page_size, 1, 132]``, strides kept."""
    shape = (plane.shape[0], page_size, 1, KEY_BYTES)
    return plane.as_strided(shape, (plane.stride(0), KEY_BYTES, KEY_BYTES, 1))


def gather_slots(
    plane: torch.Tensor, slots: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the quantised keys at ``slots``: e4m3 ``[tokens, 128]`` and float32 ``[tokens]``.

    One gather reads the values, in the widest words that the alignment of the plane's pages
    permits. A second gather reads the scales. A slot below zero reads slot 0; no row's window
    contains one.
    """
    slots = slots.to(device=plane.device, dtype=torch.int64).clamp_min(0)
    page, position = torch.div(slots, page_size, rounding_mode="floor"), slots % page_size
    split = page_size * HEAD_DIM
    values = plane[:, :split].unflatten(1, (page_size, HEAD_DIM))
    scales = plane[:, split : split + 4 * page_size].unflatten(1, (page_size, 4))
    wide = plane.stride(0) % 8 == 0 and plane.storage_offset() % 8 == 0
    words = values.view(torch.int64 if wide else torch.int32)[page, position]
    return words.view(torch.float8_e4m3fn), scales.view(torch.float32)[page, position].reshape(-1)


def _deep_gemm() -> Any:
    """Return DeepGEMM, set to TokenSpeed's form of launch (programmatic dependent launch)."""
    import deep_gemm

    try:
        from tokenspeed_kernel.platform import pdl_enabled
    except ImportError:
        return deep_gemm
    if hasattr(deep_gemm, "get_pdl") and deep_gemm.get_pdl() != pdl_enabled():
        deep_gemm.set_pdl(pdl_enabled())
    return deep_gemm


def _paged_logits(
    selection: Selection, q: torch.Tensor, weights: torch.Tensor, plane: torch.Tensor,
    ctx: torch.Tensor, table: torch.Tensor, page_size: int, plan: Any, width: int,
) -> torch.Tensor:  # fmt: skip
    if selection.logits == "plugin":
        pages = _pages(plane, page_size)
        return logits_of(
            shared_logits.paged(selection, q.unsqueeze(1), pages, weights, ctx, table, width)
        )
    deep_gemm = _deep_gemm()
    if not isinstance(plan, torch.Tensor):
        plan = deep_gemm.get_paged_mqa_logits_metadata(ctx, page_size, deep_gemm.get_num_sms())
    args = (_pages(plane, page_size), weights.contiguous(), ctx, table, plan, width)
    query = q.contiguous().unsqueeze(1)
    if has_logits_dtype(getattr(deep_gemm, "fp8_fp4_paged_mqa_logits", None)):
        dtype = torch.bfloat16 if selection.dtype == "bf16" else torch.float32
        return deep_gemm.fp8_fp4_paged_mqa_logits(
            (query, None), *args, clean_logits=False, logits_dtype=dtype
        )
    return deep_gemm.fp8_paged_mqa_logits(query, *args, clean_logits=False)


def _dense_logits(
    selection: Selection, q: torch.Tensor, weights: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor], starts: torch.Tensor, ends: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:  # fmt: skip
    """With ``max_seqlen_k`` rows begin at column zero; the plugin's rows always begin there."""
    if selection.logits == "plugin":
        return logits_of(
            shared_logits.dense(selection, q, keys, weights, starts, ends, max_seqlen_k)
        )
    deep_gemm = _deep_gemm()
    args = (keys, weights.contiguous(), starts, ends)
    kwargs = {"clean_logits": False, "max_seqlen_k": max_seqlen_k}
    if has_logits_dtype(getattr(deep_gemm, "fp8_fp4_mqa_logits", None)):
        dtype = torch.bfloat16 if selection.dtype == "bf16" else torch.float32
        return deep_gemm.fp8_fp4_mqa_logits(
            (q.contiguous(), None), *args, **kwargs, logits_dtype=dtype
        )
    return deep_gemm.fp8_mqa_logits(q.contiguous(), *args, **kwargs)


def logits_of(logits: torch.Tensor | None) -> torch.Tensor:
    """Return the plugin's logits, or None if it does not take the call."""
    if logits is None:
        raise UnmetError(
            "the plugin's logits", ["the call has dtypes, shapes or strides of another form"]
        )
    return logits


def _buffer(out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.int32, device=like.device)
    return out[: shape[0]]


def dsa_decode(
    chosen: Selection,
    q: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page_size: int,
    topk: int,
    softmax_scale: float,
    index_k_cache: torch.Tensor,
    q_len_per_req: int = 1,
    topk_layout: str = "global_slots",
    block_table_base_offsets: torch.Tensor | None = None,
    seq_lens_2d: torch.Tensor | None = None,
    plan: Any = None,
    out: torch.Tensor | None = None,
    lens_out: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select at decode, one query a request; offsets in the request, or pool slots.

    Ties go to the lowest position and a row does not depend on other rows, so ``batch_invariant``
    changes nothing. ``seq_lens_2d`` and ``plan`` are not used: the plan is made for ``seq_lens``.
    """
    tokens = q.shape[0]
    out = _buffer(out, (tokens, topk), q)
    lens_out = _buffer(lens_out, (tokens,), q)
    if tokens == 0:
        return out, lens_out
    lengths = seq_lens[:tokens].to(torch.int32).contiguous()
    table = block_table[:tokens]
    query, folded = quantise(q, weights, softmax_scale)
    ctx, pages = lengths.unsqueeze(1), table
    if chosen.logits != "plugin":
        # DeepGEMM's scheduler needs work, so an empty row scores one key of a page that exists.
        ctx, pages = ctx.clamp_min(1), table.clamp_min(0)
    logits = _paged_logits(
        chosen, query, folded, index_k_cache, ctx, pages, page_size, None,
        table.shape[1] * page_size,
    )  # fmt: skip
    if topk_layout == "global_slots":
        ops.topk(
            logits, lengths, topk, page_table=table, page_size=page_size, out=out,
            backend=chosen.backend,
        )  # fmt: skip
    else:
        ops.topk(logits, lengths, topk, out=out, backend=chosen.backend)
        if block_table_base_offsets is not None:
            base = block_table_base_offsets[:tokens].to(torch.int32).unsqueeze(1) * page_size
            out.copy_(torch.where(out < 0, out, out + base))
    lens_out.copy_(lengths.clamp(0, topk))
    return out, lens_out


def dsa_prefill(
    chosen: Selection,
    q: torch.Tensor,
    weights: torch.Tensor,
    kv_workspace_slots: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    *,
    topk: int,
    softmax_scale: float,
    index_k_cache: torch.Tensor,
    page_size: int | None = None,
    max_logits_bytes: int | None = None,
    out: torch.Tensor | None = None,
    lens_out: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select at prefill among the keys at ``kv_workspace_slots``; returns workspace rows.

    Query ``i`` sees the workspace rows ``row_starts[i] … row_ends[i]``. The logits have a column
    for every key, so no length has to be read back from the device. DeepGEMM writes a key at its
    own column, and the plugin begins each row at column zero. The logits are made for blocks of
    queries below ``max_logits_bytes``.
    """
    tokens, columns = q.shape[0], kv_workspace_slots.shape[0]
    out = _buffer(out, (tokens, topk), q)
    lens_out = _buffer(lens_out, (tokens,), q)
    if tokens == 0:
        return out, lens_out
    starts = row_starts.to(device=q.device, dtype=torch.int32).contiguous()
    ends = row_ends.to(device=q.device, dtype=torch.int32).contiguous()
    lengths = (ends - starts).clamp_min(0)
    lens_out.copy_(lengths.clamp_max(topk))
    if columns == 0:
        return out.fill_(-1), lens_out
    keys = gather_slots(index_k_cache, kv_workspace_slots, page_size or 64)
    query, folded = quantise(q, weights, softmax_scale)
    row_bytes = columns * (4 if chosen.dtype == "fp32" else 2)
    block = tokens if max_logits_bytes is None else max(1, max_logits_bytes // row_bytes)
    for first in range(0, tokens, block):
        rows = slice(first, first + block)
        logits = _dense_logits(chosen, query[rows], folded[rows], keys, starts[rows], ends[rows], 0)
        ops.topk(
            logits, lengths[rows], topk, out=out[rows], backend=chosen.backend,
            row_starts=None if chosen.logits == "plugin" else starts[rows],
        )  # fmt: skip
    out.copy_(torch.where(out < 0, out, out + starts.unsqueeze(1)))
    return out, lens_out


def dsv4_decode(
    chosen: Selection,
    index_q: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    index_k_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    page_size: int,
    topk: int,
    max_context_len: int,
    plan: Any,
    index_k_format: str = "fp8_scaled",
    out: torch.Tensor | None = None,
    persistent_topk_workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select at decode with FP8 queries whose scale is in the weights; offsets in the request."""
    q = index_q[0]
    tokens = q.shape[0]
    out = _buffer(out, (tokens, topk), q)
    if tokens == 0:
        return out
    if max_context_len <= 0:
        return out.fill_(-1)
    context = context_lens.to(torch.int32).reshape(tokens, -1)[:, -1:].contiguous()
    logits = _paged_logits(
        chosen, q, weights, index_k_cache, context, block_table, page_size, plan, max_context_len
    )
    return ops.topk(logits, context.reshape(-1), topk, out=out, backend=chosen.backend)


def dsv4_prefill(
    chosen: Selection,
    index_q: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    index_k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    cu_seqlen_k_start: torch.Tensor,
    cu_seqlen_k_end: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    topk: int,
    max_seqlen_k: int,
    index_k_format: str = "fp8_scaled",
    gathered_k: tuple[torch.Tensor, torch.Tensor] | None = None,
    gather_workspace: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Select at prefill with FP8 queries; offsets in the request, and the gathered keys.

    Every row begins at column zero. The plugin's rows always do. DeepGEMM shifts its rows
    (``max_seqlen_k``), as in TokenSpeed's own kernel.
    """
    q = index_q[0]
    tokens = q.shape[0]
    out = _buffer(out, (tokens, topk), q)
    if tokens == 0:
        return out, gathered_k
    if max_seqlen_k <= 0:
        return out.fill_(-1), gathered_k
    if gathered_k is None:
        gathered = ops.gather_indexer_cache(
            index_k_cache, block_table, cu_seq_lens, block_size=page_size, head_dim=HEAD_DIM
        )
        assert isinstance(gathered, tuple)
        gathered_k = gathered
    logits = _dense_logits(
        chosen, q, weights, gathered_k, cu_seqlen_k_start, cu_seqlen_k_end, max_seqlen_k
    )
    lengths = seq_lens.to(device=q.device, dtype=torch.int32).reshape(-1)
    return ops.topk(logits, lengths, topk, out=out, backend=chosen.backend), gathered_k
