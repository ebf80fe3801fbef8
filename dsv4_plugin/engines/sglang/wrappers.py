"""The hooks around SGLang's functions. Every hook calls the original when in doubt.

The registry passes the original function to a hook as its first argument. A hook keeps no reference
to it, because the registry rewrites every module global that is the original.

The counters (``dsv4_plugin.status()``) count calls of these Python functions. Under CUDA graphs
SGLang runs them while it captures, and not while it replays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin.engines.sglang import policy, row_shard
from dsv4_plugin.engines.sglang.adapter import SglangAdapter
from dsv4_plugin.engines.shared import adapter, aside, shadow
from dsv4_plugin.engines.shared.decision import KS, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.tensors import LENGTHS, is_matrix, is_output, rows_of, widen

__all__ = ["forward", "nonpaged_plan", "row_chunks", "topk_dsa", "topk_v1", "topk_v2"]


_FORWARD = ("x", "q_lora", "c4_indexer", "forward_batch")


def forward(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Run ``forward_c4_indexer`` with the decision for this indexer in force.

    In a prefill that is sharded among ranks each part below takes this rank's rows alone.
    """
    c4 = kwargs.get("c4_indexer", args[2] if len(args) > 2 else None)
    x = kwargs.get("x", args[0] if args else None)
    now = adapter.current()
    selection = None
    if c4 is not None and isinstance(x, torch.Tensor):
        selection = policy.for_v4(self, c4, x.device)
        if selection is not None and not now.intact("topk.paged"):
            selection = None  # other code reads the logits: bfloat16 must not be written
    call, rows = now.call, None
    if isinstance(now, SglangAdapter) and now.group is not None:
        given = {**dict(zip(_FORWARD, args, strict=False)), **kwargs}
        rows = row_shard.of_forward(now, self, c4, given["forward_batch"], x, given["q_lora"])
    before = call.kind, call.selection, call.rows
    call.kind, call.selection, call.rows = "v4", selection, rows
    try:
        original(self, *args, **kwargs)
        if rows is not None:
            rows.finished()
    finally:
        call.kind, call.selection, call.rows = before


def row_chunks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let SGLang divide a paged prefill by the real bytes of the logits of all its layers."""
    budget = kwargs.get("budget_bytes")
    return original(*args, **{**kwargs, "budget_bytes": _counted_in_fours(budget)})


def nonpaged_plan(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for the prefill of one request, which is divided at the first layer of a forward."""
    metadata = kwargs["indexer_metadata"]
    budget = metadata.mqa_logits_budget_bytes
    metadata.mqa_logits_budget_bytes = _counted_in_fours(budget)
    try:
        return original(self, *args, **kwargs)
    finally:
        metadata.mqa_logits_budget_bytes = budget


def _counted_in_fours(budget: int | None) -> int | None:
    """Return twice the budget if all logits take two bytes, because SGLang counts four for each.

    If the logits fail within that forward and take four bytes after all, they use twice the budget.
    SGLang sets the budget to a fifth of the free memory.
    """
    return 2 * budget if budget and adapter.current().narrow_selections() else budget


_V1 = ("seq_lens", "page_tables", "out_page_indices", "page_size", "out_raw_indices")
_V2 = (*_V1[:-1], "metadata", _V1[-1])


def topk_v1(original: Callable[..., None], scores: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Select with the fused page table, in the form without a plan."""
    _transform(_V1, original, scores, args, kwargs)


def topk_v2(original: Callable[..., None], scores: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Select with the fused page table, in the form with SGLang's plan, which is not needed."""
    _transform(_V2, original, scores, args, kwargs)


def _transform(
    names: tuple[str, ...], original: Callable[..., None], scores: Any, args: Any, kwargs: Any
) -> None:
    def engine(**into: torch.Tensor) -> None:
        """Make the call with its original arguments, except for other outputs."""
        placed = [into.pop(n, v) for n, v in zip(names, args, strict=False)]
        plain = scores
        if isinstance(scores, torch.Tensor):
            plain = widen(row_shard.whole(scores, every))
        original(plain, *placed, *args[len(names) :], **{**kwargs, **into})

    now, every = adapter.current(), rows_of(scores)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if now.call.kind is None or not set(_V1[:-1]) <= set(given):
        engine()  # another model calls the same names
        return
    seq_lens, page_tables, out, page_size = (given[name] for name in _V1[:-1])
    raw, parts, logits = given.get("out_raw_indices"), now.call.rows, scores
    if parts is not None:
        every, (own, positions) = len(out), parts.next_selected(out, page_tables, raw)
        logits = row_shard.narrowed(scores, own)
        seq_lens, page_tables, out = seq_lens[own], page_tables[own], out[own]
        raw = positions[own]
    rows = logits.shape[0]
    readable = (
        "topk" not in now.off
        and is_matrix(logits)
        and is_output(out, rows, out.shape[1])
        and out.shape[1] in KS
        and (raw is None or is_output(raw, rows, out.shape[1]))
        and seq_lens.dtype in LENGTHS
        and seq_lens.numel() == rows
        and isinstance(page_tables, torch.Tensor)
        and page_tables.dim() == 2
        and page_tables.dtype == torch.int32
        and page_tables.shape[0] == rows
        and (page_tables.stride(1) == 1 or page_tables.shape[1] == 1)
    )

    def plugin(selection: Selection) -> None:
        ops.topk(
            logits,
            seq_lens.reshape(-1),
            out.shape[1],
            page_table=page_tables,
            page_size=page_size,
            out=out,
            out_raw=raw,
            backend=selection.backend,
        )
        by_plugin.append(True)

    def watch() -> None:
        if raw is None:  # a page has one slot range: sets of slots are sets of columns
            shadow.watch("paged", out, lambda scratch: engine(out_page_indices=scratch))
            return
        shadow.watch(
            "paged",
            raw,
            lambda scratch: engine(out_page_indices=torch.empty_like(out), out_raw_indices=scratch),
            scores,
            lambda: seq_lens.reshape(-1),
        )

    by_plugin: list[bool] = []
    selection = now.call.selection if readable else None
    if rows or parts is None:
        serve("paged", selection, scores.dtype, plugin, engine, watch, rows)
    if parts is not None:
        if raw is not None and not by_plugin and given.get("out_raw_indices") is None:
            raw.copy_(row_shard.positions_of(out, page_tables, page_size))
        parts.gather_last(page_size)


_DSA_REST = (
    "cu_seqlens_q_topk",
    "topk_indices_offset",
    "row_starts",
    "batch_idx_list",
    "force_unfused_topk",
)


def topk_dsa(
    original: Callable[..., torch.Tensor],
    self: Any,
    logits: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    topk_transform_method: Any,
    attn_metadata: Any,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Select for V3.2 and GLM if the call is decode-shaped and PAGED; leave others to SGLang."""
    given = {**dict(zip(_DSA_REST, args, strict=False)), **kwargs}
    result: list[torch.Tensor] = []

    def engine() -> torch.Tensor:
        return original(
            self, logits, lengths, topk, topk_transform_method, attn_metadata, *args, **kwargs
        )

    def upstream() -> None:
        result.append(engine())

    decided = None
    if _decode_shaped(logits, lengths, topk, topk_transform_method, attn_metadata, given):
        decided = policy.for_dsa(self, topk, logits.device)
        if decided is not None and not adapter.current().intact("topk.dsa"):
            decided = None

    def plugin(selection: Selection) -> None:
        result.append(
            ops.topk(
                logits,
                lengths,
                topk,
                page_table=attn_metadata.real_page_table,
                page_size=attn_metadata.page_size,
                out=logits.new_empty((logits.shape[0], topk), dtype=torch.int32),
                backend=selection.backend,
            )
        )

    def watch() -> None:  # it allocates its result
        shadow.watch("dsa", result[0], lambda _: engine())

    rows = rows_of(logits)
    left = (
        decided is not None
        and aside.faster(decided, "dsa", topk, rows, logits.shape[1], logits.shape[1])
        and _measured_kernel(self)
    )
    serve("dsa", decided, logits.dtype, plugin, upstream, watch, rows, left)
    return result[0]


def _decode_shaped(
    logits: Any, lengths: Any, k: Any, method: Any, metadata: Any, given: dict[str, Any]
) -> bool:
    """Whether each row is the query of one request and the page table has a row for each."""
    table = getattr(metadata, "real_page_table", None)
    return (
        getattr(method, "name", None) == "PAGED"
        and given.get("row_starts") is None
        and given.get("batch_idx_list") is None
        and not given.get("force_unfused_topk")
        and isinstance(table, torch.Tensor)
        and isinstance(getattr(metadata, "page_size", None), int)
        and is_matrix(logits)
        and logits.dtype == torch.float32
        and k in KS
        and lengths.dim() == 1
        and lengths.dtype in LENGTHS
        and table.dim() == 2
        and table.dtype == torch.int32
        and (table.stride(1) == 1 or table.shape[1] == 1)
        and lengths.shape[0] == logits.shape[0] == table.shape[0]
        and _fused()
    )


def _measured_kernel(dsa_backend: Any) -> bool:
    """Whether SGLang would run the kernel that was measured, and not its older one."""
    asked = getattr(dsa_backend, "should_use_topk_v2", None)
    return bool(asked is not None and asked())


def _fused() -> bool:
    """Whether SGLang needs pool slots; unfused it needs the indices themselves."""
    from sglang.srt.environ import envs

    switch = getattr(envs, "SGLANG_DSA_FUSE_TOPK", None)
    return bool(switch is None or switch.get())
