"""What runs around SGLang's functions. Every hook ends in the original when in doubt.

The hooks take the functions they stand around as their first argument, as the registry hands them
over, and keep no reference to it: the registry rewrites every module global that is the original.

The counters (``dsv4_plugin.status()``) count calls of these Python functions: under CUDA graphs
they run while SGLang captures, and not while it replays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import ops
from dsv4_plugin.engines.sglang import install, policy
from dsv4_plugin.engines.shared import logits as own
from dsv4_plugin.engines.shared import plan, shadow
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.plan import KS, Topk
from dsv4_plugin.engines.shared.tensors import LENGTHS, is_matrix, is_output, saved_mib, widen
from dsv4_plugin.state import state

__all__ = ["forward", "logits", "own_dense", "own_paged", "topk_dsa", "topk_v1", "topk_v2"]


class _Scope(threading.local):
    """What the indexer's forward below this frame shall do; None: it is not one of ours."""

    topk: Topk | None = None
    inside = False


_scope = _Scope()


def forward(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Run ``forward_c4_indexer`` with the decision for this indexer in force.

    Why: its logits and top-k functions are shared with other models, and only here it is known
    whose scores come. May go when SGLang hands the backend choice to its top-k functions.
    """
    c4 = kwargs.get("c4_indexer", args[2] if len(args) > 2 else None)
    x = kwargs.get("x", args[0] if args else None)
    topk = None
    if c4 is not None and isinstance(x, torch.Tensor):
        topk = policy.for_v4(self, c4, x.device)
        if topk is not None and not install.intact("topk.paged"):
            topk = None  # their reader was replaced since: bfloat16 must not be written
    before = _scope.topk, _scope.inside
    _scope.topk, _scope.inside = topk, True
    try:
        original(self, *args, **kwargs)
    finally:
        _scope.topk, _scope.inside = before


_PAGED = ("cache", "weights", "lengths", "table", "schedule", "columns", "clean_logits")
_DENSE = ("keys", "weights", "starts", "ends", "clean_logits", "max_seqlen_k")


def own_paged(topk: Topk, q: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Compute the logits of ``fp8_paged_mqa_logits`` ourselves; None: the call has another form."""
    given = dict(zip(_PAGED, args, strict=False)) | kwargs
    known = set(_PAGED[:6]) <= set(given) <= set(_PAGED) and len(args) <= len(_PAGED)
    if not known or given.get("clean_logits"):
        return None
    rest = (given[name] for name in ("cache", "weights", "lengths", "table", "columns"))
    return own.paged(topk, q, *rest)


def own_dense(topk: Topk, q: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Compute the logits of ``fp8_mqa_logits`` ourselves; None: the call has another form.

    Only with ``max_seqlen_k``, as SGLang calls it: rows begin at column zero then.
    """
    given = dict(zip(_DENSE, args, strict=False)) | kwargs
    known = set(given) == set(_DENSE) and len(args) <= len(_DENSE)
    if not known or given["clean_logits"] or not given["max_seqlen_k"]:
        return None
    rest = (given[name] for name in ("keys", "weights", "starts", "ends", "max_seqlen_k"))
    return own.dense(topk, q, *rest)


def logits(
    float32: Callable[..., Any],
    asked: Callable[..., Any] | None,
    ours: Callable[..., torch.Tensor | None],
) -> Callable[..., Any]:
    """Wrap a DeepGEMM function: below a forward that wants it bfloat16 or ours, else as it was."""

    def with_dtype(q: Any, *args: Any, **kwargs: Any) -> Any:
        topk = _scope.topk
        if topk is None:
            return float32(q, *args, **kwargs)
        if topk.logits == "own" and not plan.is_off("topk"):
            try:
                out = ours(topk, q, *args, **kwargs)
            except Exception as error:
                own.failed(error)
                out = None
                if plan.is_off("topk"):
                    _scope.topk = None
            if out is not None:
                return out
        elif topk.ask and asked and not plan.is_off("topk") and isinstance(q, torch.Tensor):
            try:
                out = asked((q, None), *args, logits_dtype=torch.bfloat16, **kwargs)
            except Exception as error:
                if plan.current().strict:
                    raise
                plan.switch_off("topk", error)
                _scope.topk = None
            else:
                state.count("logits.bf16")
                state.peak("logits.saved_mib", saved_mib(out))
                return out
        state.count("logits.upstream")
        return float32(q, *args, **kwargs)

    with_dtype.__doc__ = float32.__doc__
    with_dtype.__wrapped__ = float32  # type: ignore[attr-defined]
    return with_dtype


_V1 = ("seq_lens", "page_tables", "out_page_indices", "page_size", "out_raw_indices")
_V2 = (*_V1[:-1], "metadata", _V1[-1])


def topk_v1(original: Callable[..., None], scores: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Select by the fused page table, in the form without a plan.

    Why: SGLang's kernels read float32 only, and ties are not theirs to order. May go when they
    read bfloat16, are exact, break ties by the lowest index and are not slower.
    """
    _transform(_V1, original, scores, args, kwargs)


def topk_v2(original: Callable[..., None], scores: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Select by the fused page table, in the form with SGLang's plan, which ours does not need."""
    _transform(_V2, original, scores, args, kwargs)


def _transform(
    names: tuple[str, ...],
    original: Callable[..., None],
    scores: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    def upstream() -> None:  # with what came, and nothing that the caller did not pass
        plain = widen(scores) if isinstance(scores, torch.Tensor) else scores
        original(plain, *args, **kwargs)

    given = {**dict(zip(names, args, strict=False)), **kwargs}

    def again(**into: torch.Tensor) -> None:  # the same call with other outputs
        placed = [into.pop(n, v) for n, v in zip(names, args, strict=False)]
        original(widen(scores), *placed, **{**kwargs, **into})

    if not _scope.inside or not set(_V1[:-1]) <= set(given):
        upstream()  # another model's call of the same names
        return
    _paged(
        scores,
        given["seq_lens"],
        given["page_tables"],
        given["out_page_indices"],
        given["page_size"],
        given.get("out_raw_indices"),
        upstream,
        again,
    )


def _paged(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    page_tables: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    raw: torch.Tensor | None,
    upstream: Callable[[], None],
    again: Callable[..., None],
) -> None:
    rows = scores.shape[0]
    readable = (
        not plan.is_off("topk")
        and is_matrix(scores)
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

    def ours(topk: Topk) -> None:
        ops.topk(
            scores,
            seq_lens.reshape(-1),
            out.shape[1],
            page_table=page_tables,
            page_size=page_size,
            out=out,
            out_raw=raw,
            backend=topk.backend,
        )

    def beside() -> None:
        if raw is None:  # a page has one slot range: sets of slots are sets of columns
            shadow.watch("paged", out, lambda scratch: again(out_page_indices=scratch))
            return
        shadow.watch(
            "paged",
            raw,
            lambda scratch: again(out_page_indices=torch.empty_like(out), out_raw_indices=scratch),
            scores,
            lambda: seq_lens.reshape(-1),
        )

    serve("paged", _scope.topk if readable else None, scores.dtype, ours, upstream, beside)


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
    """Select for V3.2 and GLM where the call is decode-shaped and PAGED; all else is SGLang's.

    Why: as for V4, exact float32 with ties to the lowest index. May go for the same reasons.
    """
    given = {**dict(zip(_DSA_REST, args, strict=False)), **kwargs}
    result: list[torch.Tensor] = []

    def theirs() -> torch.Tensor:
        return original(
            self, logits, lengths, topk, topk_transform_method, attn_metadata, *args, **kwargs
        )

    def upstream() -> None:
        result.append(theirs())

    decided = None
    if _decode_shaped(logits, lengths, topk, topk_transform_method, attn_metadata, given):
        decided = policy.for_dsa(self, topk, logits.device)
        if decided is not None and not install.intact("topk.dsa"):
            decided = None

    def ours(chosen: Topk) -> None:
        result.append(
            ops.topk(
                logits,
                lengths,
                topk,
                page_table=attn_metadata.real_page_table,
                page_size=attn_metadata.page_size,
                out=logits.new_empty((logits.shape[0], topk), dtype=torch.int32),
                backend=chosen.backend,
            )
        )

    def beside() -> None:  # it allocates what it returns
        shadow.watch("dsa", result[0], lambda _: theirs())

    serve("dsa", decided, logits.dtype, ours, upstream, beside)
    return result[0]


def _decode_shaped(
    logits: Any, lengths: Any, k: Any, method: Any, metadata: Any, given: dict[str, Any]
) -> bool:
    """Whether one row is one request's query and the page table has a row for each."""
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


def _fused() -> bool:
    """Whether SGLang wants pool slots; unfused it wants the indices themselves."""
    from sglang.srt.environ import envs

    switch = getattr(envs, "SGLANG_DSA_FUSE_TOPK", None)
    return bool(switch is None or switch.get())
