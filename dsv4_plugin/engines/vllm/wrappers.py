"""The functions that replace vLLM's. Every wrapper calls the original when in doubt.

The counters (``dsv4_plugin.status()``) count calls of these Python functions. Under full CUDA
graphs vLLM runs Python while it captures and not while it replays. So a counter above zero says
that the kernel is in the graphs, and the counter does not grow while the server decodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin.engines.shared import adapter, aside, logits, shadow
from dsv4_plugin.engines.shared.adapter import Adapter
from dsv4_plugin.engines.shared.decision import DTYPES, KS, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.tensors import (
    LENGTHS,
    is_matrix,
    is_output,
    rows_of,
    saved_mib,
    widen,
)  # fmt: skip
from dsv4_plugin.engines.vllm import adapter as vllm_adapter
from dsv4_plugin.engines.vllm import candidates, fill
from dsv4_plugin.engines.vllm.context import LogitsTag, Requests, by_name, tag_logits, tag_of
from dsv4_plugin.engines.vllm.deferred import Gather
from dsv4_plugin.engines.vllm.probe import TO_SLOTS_TAKES
from dsv4_plugin.engines.vllm.slots import select_into
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.kernels.reference import row_lengths
from dsv4_plugin.state import state

__all__ = [
    "as_fp32_logits", "decode_topk", "dense_logits", "gather", "paged_logits", "prefill_chunks",
    "prefill_topk", "take_slots", "topk_op_by_engine", "with_logits_dtype",
]  # fmt: skip

_PAGED = (
    "q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata",
    "max_model_len",
)  # fmt: skip
_DENSE = ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke", "max_seqlen_k")
_PAGED_NEEDS, _DENSE_NEEDS = frozenset(_PAGED), frozenset(_DENSE[:-1])
_PAGED_KNOWS = _PAGED_NEEDS | {"clean_logits", "indices"}
_DENSE_KNOWS = frozenset(_DENSE) | {"clean_logits"}
_SLOTS = frozenset(TO_SLOTS_TAKES)


# --- logits ----------------------------------------------------------------------------------


def paged_logits(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the logits of decode: with the plugin if the decision says so, else with DeepGEMM.

    The plugin's kernel needs no schedule. It does not write columns past a row's length; nor does
    DeepGEMM in the form in which vLLM calls it.
    """
    now = adapter.current()
    selection = now.in_force().selection
    if selection is None:
        return original(*args, **kwargs)
    given, out = _by_request(by_name(_PAGED, args, kwargs), now.call.requests), None
    if _by_plugin(now, selection) and _plain_form(given, _PAGED_NEEDS, _PAGED_KNOWS):
        values = tuple(given[name] for name in _PAGED if name != "schedule_metadata")
        if selection.candidates:
            engine = functools.partial(_by_engine, now, original, args, kwargs)
            out = candidates.defer_paged(selection, engine, *values)
        else:
            out = _computed(logits.paged, selection, *values)
    if out is None:
        out = _by_engine(now, original, args, kwargs)
    tag = tag_of(out)
    if tag is not None and selection.slots and given.get("indices") is None:
        table, cache = given.get("block_tables"), given.get("kv_cache")
        if isinstance(table, torch.Tensor) and isinstance(cache, torch.Tensor) and cache.dim() >= 3:
            tag.table, tag.page_size = table, cache.shape[1]
            requests = now.call.requests
            if requests and requests.table is not None and given["q"][0].shape[1] == requests.rows:
                tag.table, tag.next_n = requests.table, requests.rows
    return out


def _by_request(given: dict[str, Any], requests: Requests | None) -> dict[str, Any]:
    """Return the arguments with the rows of a request together, so that its keys are read once.

    The kernel scores 128 heads in one pass over the keys. An odd row of 64 heads would fill half of
    a pass, and its cost was not measured.
    """
    if requests is None or not _plain_form(given, _PAGED_NEEDS, _PAGED_KNOWS):
        return given
    (q, scale), lengths, table = (given[x] for x in ("q", "context_lens", "block_tables"))
    if not (q.shape[1] == 1 and len(q) == lengths.numel() == len(table)):
        return given
    if q.shape[2] > 32 and requests.rows % 2:
        return given
    shape = (-1, requests.rows)
    return {
        **given,
        "q": (q.squeeze(1).unflatten(0, shape), scale),
        "context_lens": lengths.reshape(shape),
        "block_tables": table[:: requests.rows],
    }


def dense_logits(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the logits of prefill: with the plugin if the decision says so, else with DeepGEMM.

    In the plugin's logits every row begins at column zero, as in vLLM from 0.33 on
    (``max_seqlen_k``). Up to 0.32 vLLM's columns are those of all keys; the tag tells
    :func:`prefill_topk` that the rows are shifted.
    """
    now = adapter.current()
    selection, gather = now.in_force().selection, now.call.gather
    given, out = by_name(_DENSE, args, kwargs), None
    width = given.get("max_seqlen_k", 0)  # a bool here is clean_logits of older releases
    if (
        selection is not None
        and _by_plugin(now, selection)
        and type(width) is int
        and _plain_form(given, _DENSE_NEEDS, _DENSE_KNOWS)
    ):
        values = tuple(given[name] for name in _DENSE[:-1])
        if selection.candidates:
            engine = functools.partial(_by_engine, now, original, args, kwargs)
            out = candidates.defer_gathered(selection, engine, width, gather, *values)
        else:
            out = _computed(logits.dense, selection, *values, width, shifted=not width)
    if out is None:
        if gather is not None:
            gather()
        out = _by_engine(now, original, args, kwargs)
    return out


def _by_plugin(now: Adapter, selection: Selection) -> bool:
    if selection.candidates:
        return candidates.readers_in_place(now)
    return selection.logits == "plugin" and _readers_in_place(now)


def _plain_form(given: dict[str, Any], needs: frozenset[str], knows: frozenset[str]) -> bool:
    """Whether a call has the arguments that the plugin needs, no unknown ones, and FP8 queries."""
    q = given.get("q")
    return (
        needs <= given.keys() <= knows
        and not given.get("clean_logits")
        and given.get("indices") is None
        and isinstance(q, tuple)
        and len(q) == 2
        and q[1] is None  # a scale of its own: MXFP4 or MXFP8
    )


def _computed(
    compute: Callable[..., torch.Tensor | None],
    selection: Selection,
    q: Any,
    *rest: Any,
    shifted: bool = False,
) -> torch.Tensor | None:
    """Return the plugin's logits, tagged; None if the call has another form or the op failed."""
    try:
        out = compute(selection, q[0], *rest)
    except Exception as error:
        logits.failed(error)
        return None
    return None if out is None else tag_logits(out, LogitsTag(shifted))


def _by_engine(
    now: Adapter, original: Callable[..., torch.Tensor], args: Any, kwargs: Any
) -> torch.Tensor:
    """Compute index logits with vLLM's function, in bfloat16 if the decision says so."""
    selection = now.in_force().selection
    if selection is None:
        return original(*args, **kwargs)
    if selection.request_bf16 and _readers_in_place(now):
        now.call.request_bf16 = True
        try:
            out = original(*args, **kwargs)
        except Exception as error:
            if now.decision.strict:
                raise
            now.switch_off("topk", error)
            now.call.request_bf16 = False
            return original(*args, **kwargs)
        finally:
            now.call.request_bf16 = False
    else:
        out = original(*args, **kwargs)
    if out.dtype == torch.bfloat16:
        state.count("logits.bf16", out.shape[0])
        state.peak("logits.saved_mib", saved_mib(out))
    else:
        state.count("logits.upstream", out.shape[0])
    return tag_logits(out, LogitsTag())


def with_logits_dtype(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Ask DeepGEMM for bfloat16 in the calls that come from the indexer; leave all others."""
    if adapter.current().call.request_bf16:
        kwargs["logits_dtype"] = torch.bfloat16
    return original(*args, **kwargs)


def _readers_in_place(now: Adapter) -> bool:
    """Whether vLLM will still call both top-k patches.

    vLLM's kernels cannot read bfloat16, so logits in bfloat16 must not be written once other code
    has replaced their reader.
    """
    return now.intact("topk.decode") and now.intact("topk.prefill")


def as_fp32_logits(
    original: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Keep bfloat16 logits for the plugin's top-k; let vLLM widen all others."""
    tag = tag_of(tensor)
    if tag is None:
        return original(tensor, *args, **kwargs)
    if tag.deferred is not None:
        return tensor
    selection = adapter.current().in_force().selection
    if selection is not None and selection.dtype != "fp32":
        return tensor
    return tag_logits(original(tensor, *args, **kwargs), tag)


# --- top-k -----------------------------------------------------------------------------------


def plain(scores: Any) -> Any:
    """Return logits that vLLM's float32 kernels can read: widen tagged ones, keep all others."""
    return scores if tag_of(scores) is None else widen(scores)


def _select(
    kind: str,
    scores: torch.Tensor,
    lengths: Callable[[], torch.Tensor],
    starts: torch.Tensor | None,
    out: torch.Tensor,
    k: int,
    next_n: int,
    engine: Callable[[torch.Tensor, torch.Tensor], None],
    readable: bool,
    longest: int,
    again: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Run the plugin's top-k on tagged logits, or ``engine`` on the same arguments.

    ``engine(scores, out)`` reads float32. ``longest`` is what a row can have at most.
    ``again(scores, out)`` is the same as ``engine`` for the shadow, where a call can be cut into
    parts.
    """
    now = adapter.current()
    now.call.slots = None  # an earlier record does not describe the indices any more
    tag = tag_of(scores)
    deferred = None if tag is None else tag.deferred
    next_n = next_n if tag is None else max(next_n, tag.next_n)
    selection = now.in_force().selection
    if tag is None or not readable or k not in KS or (deferred and not deferred.ready):
        selection = None

    def by_plugin(selection: Selection) -> None:
        paged, store = None, vllm_adapter.current().slots
        if selection.slots and kind == "decode" and tag is not None:
            paged = store.places(tag, out, next_n)
        if deferred is not None:
            candidates.select(deferred, k, out, paged)
        else:
            how = {"next_n": next_n, "row_starts": starts, "backend": selection.backend}
            select_into(scores, lengths(), k, out, paged, **how)
        if paged is not None:
            now.call.slots = store.note(paged, out, selection.followers)
            if now.call.slots is not None:
                state.count("topk.slots")

    def watch() -> None:
        @functools.cache
        def every() -> torch.Tensor:
            return scores if deferred is None else candidates.every_score(deferred)

        def beside(scratch: torch.Tensor) -> None:
            if again is None:
                engine(widen(every()), scratch)
            else:
                again(every(), scratch)

        shadow.watch(
            kind,
            out,
            beside,
            every,
            lambda: row_lengths(lengths(), scores.shape[0], next_n),
            starts,
        )

    def by_engine() -> None:
        fill.fill_skipped_rows(out)
        engine(plain(scores if deferred is None else deferred.engine_logits()), out)

    dtype = scores.dtype if deferred is None else DTYPES[deferred.selection.dtype]
    rows = scores.shape[0]
    left = selection is not None and aside.faster(
        selection, kind, k, rows, longest, scores.shape[-1]
    )
    serve(kind, selection, dtype, by_plugin, by_engine, watch, rows, left)


def decode_topk(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    next_n: int,
    out: torch.Tensor,
    k: int,
    engine: Callable[[torch.Tensor, torch.Tensor], None],
    max_seq_len: Any = None,
) -> None:
    """Select at decode: rows = batch · next_n, ``seq_lens`` one a row or one a request.

    ``engine(scores, out)`` is vLLM's own selection of float32 scores into ``out``. ``max_seq_len``:
    no row is longer, as vLLM tells its kernels; in a captured graph the longest that the server
    takes.
    """
    readable = (
        (is_matrix(scores) or candidates.deferred_of(scores) is not None)
        and is_output(out, scores.shape[0], k)
        and isinstance(seq_lens, torch.Tensor)
        and seq_lens.dtype in LENGTHS
        and seq_lens.device == scores.device
        and next_n > 0
        and seq_lens.numel() in (scores.shape[0], scores.shape[0] // next_n)
        and scores.shape[0] % next_n == 0
    )

    def lengths() -> torch.Tensor:
        return seq_lens.reshape(-1) if seq_lens.numel() == scores.shape[0] else seq_lens

    longest = scores.shape[-1] if isinstance(scores, torch.Tensor) else 0
    if type(max_seq_len) is int:
        longest = min(longest, max_seq_len)
    _select("decode", scores, lengths, None, out, k, next_n, engine, readable, longest)


def topk_op_by_engine(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one of vLLM's compiled top-k ops on a call of a form that the plugin does not know."""
    now = adapter.current()
    now.call.slots = None
    fill.fill_skipped_rows(args[2] if len(args) > 2 else kwargs.get("output"))
    if args:
        args = (plain(args[0]), *args[1:])
    if now.decision.enabled:
        state.count("topk.decode.upstream", rows_of(args[0] if args else None))
    return op(*args, **kwargs)


def prefill_topk(
    original: Callable[..., None],
    scores: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    rows: int,
    stride0: int,
    stride1: int,
    k: int,
) -> None:
    """Select at prefill: row ``i`` has the columns ``starts[i] … ends[i]``, indices from there.

    One rule for both forms of the logits: absolute columns (to 0.32), and rows shifted to column
    zero (from 0.33), where the caller passes zeros as ``starts``. The plugin's logits are always
    shifted; to 0.32 their tag says so.
    """
    tag = tag_of(scores)
    shifted = tag is not None and tag.shifted
    deferred = tag is not None and tag.deferred is not None
    readable = (
        (deferred or (is_matrix(scores) and (scores.stride(0), stride1) == (stride0, 1)))
        and is_output(out, scores.shape[0], k)
        and scores.shape[0] == rows == starts.numel() == ends.numel()
        and starts.dtype in LENGTHS
        and ends.dtype in LENGTHS
        and starts.dim() == ends.dim() == 1
    )

    def run(plain: torch.Tensor, rows: slice, from_zero: bool, into: torch.Tensor) -> None:
        first, last = starts[rows], ends[rows]
        if from_zero:
            first, last = torch.zeros_like(first), last - first
        original(plain, first, last, into, len(plain), plain.stride(0), plain.stride(1), k)

    def engine(plain: torch.Tensor, into: torch.Tensor) -> None:
        run(plain, slice(None), shifted, into)

    def again(every: torch.Tensor, scratch: torch.Tensor) -> None:
        for rows in shadow.parts(every):
            run(widen(every[rows]), rows, shifted or deferred, scratch[rows])

    begin = None if shifted or deferred else starts
    _select(
        "prefill", scores, lambda: ends - starts, begin, out, k, 1, engine, readable,
        scores.shape[-1], again,
    )  # fmt: skip


def take_slots(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return slots and counts: those of the last top-k if they match, else ``original``'s."""
    now = adapter.current()
    note = now.call.slots
    if note is None or not note.followers:
        now.call.slots = None
    if now.decision.enabled:
        store = vllm_adapter.current().slots
        store.asked()
        if note is not None:
            given = by_name(TO_SLOTS_TAKES, args, kwargs)
            if given.keys() == _SLOTS and store.fits(
                note, given["topk_indices"], given["block_table"], given["block_size"]
            ):
                state.count("topk.slots.taken")
                return note.paged.slots, note.paged.counts
        indices = args[0] if args else kwargs.get("topk_indices")
        state.count("topk.slots.upstream", rows_of(indices))
    return original(*args, **kwargs)


# --- prefill's chunks and keys ---------------------------------------------------------------


def prefill_chunks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Plan the prefill chunks of a step: a budget of bytes holds twice as many bfloat16 logits.

    vLLM counts four bytes for each logit, so twice the bytes give the rows that fit. If the
    bfloat16 logits fail at a later call, the chunks of that step are float32 and take twice the
    budget. So does a chunk whose call has a form that the plugin's kernel does not take.
    """
    now = adapter.current()
    chosen = now.narrow_selections()
    if chosen:
        unasked = all(not s.request_bf16 and s.logits == "engine" for s in chosen)
        if unasked or _readers_in_place(now):
            if "max_logits_bytes" in kwargs:
                kwargs = {**kwargs, "max_logits_bytes": 2 * kwargs["max_logits_bytes"]}
            else:
                args = (*args[:3], 2 * args[3], *args[4:])
            state.count(f"budget.{chosen[0].dtype}")
    return original(*args, **kwargs)


def gather(
    original: Callable[..., None],
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
) -> None:
    """Gather the quantised keys of a prefill chunk; leave all but FP8 pages to vLLM.

    If the logits are deferred, the gather waits for a reader. A consumer of wide chunks has none.
    """
    now = adapter.current()
    decision = now.in_force()
    selection, fp8 = decision.selection, _is_fp8_cache(kv_cache, dst_k, dst_scale)

    def run() -> None:
        if decision.gather is not None and fp8:
            try:
                ops.gather_indexer_cache(
                    kv_cache, block_table, cu_seq_lens, block_size=kv_cache.shape[1],
                    head_dim=dst_k.shape[1], out=(dst_k, dst_scale), backend=decision.gather,
                )  # fmt: skip
            except Exception as error:
                if decision.strict:
                    raise
                if not isinstance(error, UnmetError):  # which is about this call's form only
                    now.switch_off("gather", error)
            else:
                state.count("gather", dst_k.shape[0])
                state.count(f"gather.{decision.gather}", dst_k.shape[0])
                return
        if decision.enabled:
            state.count("gather.upstream", rows_of(dst_k))
        original(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens)

    now.call.gather = None
    if fp8 and selection is not None and selection.candidates and _by_plugin(now, selection):
        now.call.gather = Gather(run, kv_cache, block_table, cu_seq_lens)
    else:
        run()


def _is_fp8_cache(kv_cache: torch.Tensor, dst_k: torch.Tensor, dst_scale: torch.Tensor) -> bool:
    return (
        kv_cache.dim() == 3
        and kv_cache.dtype == torch.uint8
        and dst_k.dim() == dst_scale.dim() == 2
        and dst_k.dtype == torch.float8_e4m3fn
        and dst_scale.dtype == torch.uint8
        and dst_scale.shape[1] == 4
        and kv_cache.shape[2] == dst_k.shape[1] + 4
    )
