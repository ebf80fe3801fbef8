"""What runs in place of vLLM's functions. Every wrapper ends in the original when in doubt.

The counters (``dsv4_plugin.status()``) count calls of these Python functions. Under full CUDA
graphs vLLM runs Python while it captures and not while it replays, so a counter above zero says
that the kernel is in the graphs, and it stands still while the server decodes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import ops
from dsv4_plugin.engines.shared import logits, plan, shadow
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.plan import Topk
from dsv4_plugin.engines.shared.tensors import LENGTHS, is_matrix, is_output, saved_mib, widen
from dsv4_plugin.engines.vllm import fill, slots
from dsv4_plugin.engines.vllm.engine_calls import by_name
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.kernels.reference import row_lengths
from dsv4_plugin.state import state

__all__ = [
    "as_fp32_logits",
    "asking",
    "decode_topk",
    "dense_logits",
    "gather",
    "paged_logits",
    "plain",
    "prefill_chunks",
    "prefill_topk",
]

# Set on the very tensor that the indexer's logits function returned. Top-k calls of other callers
# (GLM's pooled indexer, V4.1's specialised decode) reach the same patched names without it.
_TAG = "_dsv4_index_logits"
# Set beside it on prefill logits whose rows begin at column zero though the caller passes where
# they begin among all keys: ours, in the releases to 0.32.
_SHIFTED = "_dsv4_shifted_rows"


class _Request(threading.local):
    """Whether the DeepGEMM call below this frame shall write bfloat16; vLLM may use threads."""

    bf16 = False


asking = _Request()


def _tagged(tensor: Any) -> bool:
    return getattr(tensor, _TAG, False)


def plain(value: Any) -> Any:
    """Return what upstream's float32 kernels can read: our logits widened, all else as is."""
    return widen(value) if _tagged(value) else value


_PAGED = (
    "q", "kv_cache", "weights", "context_lens", "block_tables", "schedule_metadata",
    "max_model_len",
)  # fmt: skip
_DENSE = ("q", "kv", "weights", "cu_seqlen_ks", "cu_seqlen_ke", "max_seqlen_k")


def paged_logits(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the logits of decode: ours where that is the plan, else DeepGEMM's.

    Ours need no schedule. Columns past a row's length are left as they are, as by DeepGEMM in the
    form in which vLLM calls it.
    """
    topk, given, out = _own(), by_name(_PAGED, args, kwargs), None
    if topk is not None and _plain_form(given, {"clean_logits", "indices"}, _PAGED):
        values = tuple(given[name] for name in _PAGED if name != "schedule_metadata")
        out = _ours(logits.paged, topk, *values)
    if out is None:
        out = _theirs(original, *args, **kwargs)
    now = plan.current().topk
    if now is not None and now.slots and given.get("indices") is None:
        slots.mark(out, given.get("block_tables"), given.get("kv_cache"))
    return out


def dense_logits(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the logits of prefill: ours where that is the plan, else DeepGEMM's.

    In ours every row begins at column zero, as vLLM has it from 0.33 on (``max_seqlen_k``). To 0.32
    columns are those of all keys, so ours carry a second mark, for :func:`prefill_topk`.
    """
    topk, given = _own(), by_name(_DENSE, args, kwargs)
    width = given.get("max_seqlen_k", 0)  # a bool there would be the clean_logits of old
    known = {"clean_logits", "max_seqlen_k"}
    if topk is not None and type(width) is int and _plain_form(given, known, _DENSE[:-1]):
        out = _ours(logits.dense, topk, *(given[name] for name in _DENSE[:-1]), width)
        if out is not None:
            setattr(out, _SHIFTED, not width)
            return out
    return _theirs(original, *args, **kwargs)


def _plain_form(given: dict[str, Any], known: set[str], required: tuple[str, ...]) -> bool:
    """Whether a call has every argument ours need, none of an unknown meaning, and FP8 queries."""
    q = given.get("q")
    return (
        set(required) <= set(given) <= {*required, *known}
        and not given.get("clean_logits")
        and given.get("indices") is None
        and isinstance(q, tuple)
        and len(q) == 2
        and q[1] is None  # a scale of its own: MXFP4 or MXFP8
    )


def _own() -> Topk | None:
    topk = plan.current().topk
    if topk is None or topk.logits != "own" or not _readers_in_place():
        return None
    return topk


def _ours(compute: Callable[..., torch.Tensor | None], topk: Topk, q: Any, *rest: Any) -> Any:
    """Return marked logits of ours, or None where the call has another form or they failed."""
    try:
        out = compute(topk, q[0], *rest)
    except Exception as error:
        logits.failed(error)
        return None
    if out is not None:
        setattr(out, _TAG, True)
    return out


def _theirs(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute index logits by upstream's function, in bfloat16 where that is the plan."""
    now = plan.current()
    if now.topk is None:
        return original(*args, **kwargs)
    if now.topk.ask and _readers_in_place():
        asking.bf16 = True
        try:
            out = original(*args, **kwargs)
        except Exception as error:
            if now.strict:
                raise
            plan.switch_off("topk", error)
            asking.bf16 = False
            return original(*args, **kwargs)
        finally:
            asking.bf16 = False
    else:
        out = original(*args, **kwargs)
    setattr(out, _TAG, True)
    if out.dtype == torch.bfloat16:
        state.count("logits.bf16")
        state.peak("logits.saved_mib", saved_mib(out))
    else:
        state.count("logits.upstream")
    return out


def _readers_in_place() -> bool:
    """Whether both top-k patches are still what vLLM will call.

    Upstream's kernels cannot read bfloat16, so logits in bfloat16 must not be written once
    somebody else has replaced their reader.
    """
    from dsv4_plugin.engines.vllm import install

    return install.intact("topk.decode") and install.intact("topk.prefill")


def as_fp32_logits(
    original: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Keep bfloat16 logits that our top-k reads; let upstream widen all others."""
    if not _tagged(tensor):
        return original(tensor, *args, **kwargs)
    topk = plan.current().topk
    if topk is not None and topk.dtype != "fp32":
        return tensor
    out = original(tensor, *args, **kwargs)
    setattr(out, _TAG, True)
    slots.passed_on(tensor, out)
    return out


def _select(
    kind: str,
    scores: torch.Tensor,
    lengths: Callable[[], torch.Tensor],
    starts: torch.Tensor | None,
    out: torch.Tensor,
    k: int,
    next_n: int,
    upstream: Callable[[torch.Tensor, torch.Tensor], None],
    readable: bool,
    again: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Run our top-k on logits we know, or ``upstream`` on the same arguments.

    ``upstream(scores, out)`` reads float32. ``again(out)`` is the same for the shadow, where a call
    can be cut into parts.
    """
    slots.void()
    topk = plan.current().topk
    if not (_tagged(scores) and readable and k in plan.KS):
        topk = None

    def ours(topk: Topk) -> None:
        paged = slots.beside(scores, out, next_n) if kind == "decode" and topk.slots else None
        if paged is None:
            ops.topk(
                scores, lengths(), k, next_n=next_n, row_starts=starts, out=out,
                backend=topk.backend,
            )  # fmt: skip
            return
        ops.topk(
            scores, lengths(), k, next_n=next_n, page_table=paged.table,
            page_size=paged.page_size, out=paged.slots, out_raw=out, out_counts=paged.counts,
            backend=topk.backend,
        )  # fmt: skip
        slots.wrote(paged, out)

    def beside() -> None:
        shadow.watch(
            kind,
            out,
            again or (lambda scratch: upstream(plain(scores), scratch)),
            scores,
            lambda: row_lengths(lengths(), scores.shape[0], next_n),
            starts,
        )

    def theirs() -> None:
        fill.make_up(out)
        upstream(plain(scores), out)

    serve(kind, topk, scores.dtype, ours, theirs, beside)


def decode_topk(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    next_n: int,
    out: torch.Tensor,
    k: int,
    upstream: Callable[[torch.Tensor, torch.Tensor], None],
) -> None:
    """Select at decode: rows = batch · next_n, ``seq_lens`` one a row or one a request.

    ``upstream(scores, out)`` is vLLM's own selection of float32 scores into ``out``.
    """
    readable = (
        is_matrix(scores)
        and is_output(out, scores.shape[0], k)
        and isinstance(seq_lens, torch.Tensor)
        and seq_lens.dtype in LENGTHS
        and seq_lens.device == scores.device
        and next_n > 0
        and seq_lens.numel() in (scores.shape[0], scores.shape[0] // next_n)
        and scores.shape[0] % next_n == 0
    )
    _select("decode", scores, lambda: seq_lens, None, out, k, next_n, upstream, readable)


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
    zero (from 0.33), where the caller passes zeros as ``starts``. Our own logits are always
    shifted; to 0.32 they say so themselves.
    """
    shifted = getattr(scores, _SHIFTED, False)
    readable = (
        is_matrix(scores)
        and is_output(out, scores.shape[0], k)
        and scores.shape[0] == rows == starts.numel() == ends.numel()
        and (scores.stride(0), stride1) == (stride0, 1)
        and starts.dtype in LENGTHS
        and ends.dtype in LENGTHS
        and starts.dim() == ends.dim() == 1
    )

    def upstream(plain: torch.Tensor, into: torch.Tensor) -> None:
        _prefill(plain, starts, ends, into)

    def again(scratch: torch.Tensor) -> None:
        for part in shadow.parts(scores):
            _prefill(widen(scores[part]), starts[part], ends[part], scratch[part])

    def _prefill(
        plain: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, into: torch.Tensor
    ) -> None:
        if shifted:
            plain = _unshifted(plain, starts)
        original(plain, starts, ends, into, len(plain), plain.stride(0), plain.stride(1), k)

    begin = None if shifted else starts
    _select("prefill", scores, lambda: ends - starts, begin, out, k, 1, upstream, readable, again)


def _unshifted(scores: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Move every row back to the columns of all keys; what is outside of a window is anything."""
    column = torch.arange(scores.shape[1], device=scores.device) - starts[:, None]
    return scores.gather(1, column.clamp_min(0))


def prefill_chunks(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Plan the prefill chunks of a step: a budget of bytes holds twice as many bfloat16 logits.

    vLLM counts four bytes each, so twice the bytes are the rows that fit. Where the bfloat16 logits
    fail at a later call, the chunks of that one step are float32 and take twice the budget; so does
    a chunk whose call has a form that our kernel does not take.
    """
    topk = plan.current().topk
    if topk is not None and topk.dtype != "fp32":
        unasked = not topk.ask and topk.logits == "host"
        if unasked or _readers_in_place():
            if "max_logits_bytes" in kwargs:
                kwargs = {**kwargs, "max_logits_bytes": 2 * kwargs["max_logits_bytes"]}
            else:
                args = (*args[:3], 2 * args[3], *args[4:])
            state.count(f"budget.{topk.dtype}")
    return original(*args, **kwargs)


def gather(
    original: Callable[..., None],
    kv_cache: torch.Tensor,
    dst_k: torch.Tensor,
    dst_scale: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
) -> None:
    """Gather the quantised keys of a prefill chunk; anything but FP8 pages goes upstream."""
    now = plan.current()
    if now.gather is not None and _is_fp8_cache(kv_cache, dst_k, dst_scale):
        try:
            ops.gather_indexer_cache(
                kv_cache,
                block_table,
                cu_seq_lens,
                block_size=kv_cache.shape[1],
                head_dim=dst_k.shape[1],
                out=(dst_k, dst_scale),
                backend=now.gather,
            )
        except Exception as error:
            if now.strict:
                raise
            if not isinstance(error, UnmetError):  # that one is about this call's form only
                plan.switch_off("gather", error)
        else:
            state.count("gather")
            state.count(f"gather.{now.gather}")
            return
    if now.enabled:
        state.count("gather.upstream")
    original(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens)


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
