"""DeepSeek-V4.1's candidate blocks: the plugin computes the logits when it knows which are needed.

When vLLM asks for the logits of a layer with candidates, the plugin computes nothing. It returns a
tensor of their shape that holds the call (:class:`.deferred.Deferred`). The following calls decide
what is computed:

* a source computes the maxima of the blocks (and the logits, if they are small), and publishes
  the best blocks in ascending order;
* a consumer scores only the keys of its candidates;
* vLLM's own code gets vLLM's own logits, if it has to serve after all.

Between these calls vLLM reads only shape and strides of the logits. The plugin defers logits only
while every reader of the logits is its own patch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.engines.shared import logits, shadow
from dsv4_plugin.engines.shared.adapter import Adapter
from dsv4_plugin.engines.shared.candidates import PIECE, WHOLE_COLUMNS, maxima_of
from dsv4_plugin.engines.shared.decision import DTYPES, Selection
from dsv4_plugin.engines.shared.tensors import widen
from dsv4_plugin.engines.vllm.adapter import current
from dsv4_plugin.engines.vllm.context import (
    LogitsTag,
    by_name,
    forward_pass,
    tag_logits,
    tag_of,
)
from dsv4_plugin.engines.vllm.deferred import Deferred, Gather
from dsv4_plugin.engines.vllm.probe import APPLY_MASK, SELECT_BLOCKS
from dsv4_plugin.engines.vllm.slots import Paged, select_into
from dsv4_plugin.kernels.reference import row_lengths
from dsv4_plugin.ops import candidates as ops
from dsv4_plugin.ops.logits import new_logits, paged_logits, ragged_logits
from dsv4_plugin.state import state

__all__ = [
    "PIECE", "READERS", "apply_mask", "defer_gathered", "defer_paged", "deferred_of",
    "every_score", "readers_in_place", "select", "select_blocks",
]  # fmt: skip

READERS = ("candidates", "topk.decode", "topk.prefill")  # the seams that read deferred logits
# A source whose logits take at most this many bytes keeps them for its own top-k. A larger source
# scores the keys of its candidates a second time: the k best keys of a row are in its k + 1 best
# blocks.
KEPT_BYTES = 256 << 20


def deferred_of(scores: Any) -> Deferred | None:
    """Return the call that deferred index logits hold; None for computed logits."""
    tag = tag_of(scores)
    return None if tag is None else tag.deferred


def defer_paged(
    selection: Selection,
    engine: Callable[[], torch.Tensor],
    q: Any,
    cache: Any,
    weights: Any,
    lengths: Any,
    table: Any,
    columns: int,
) -> torch.Tensor | None:
    """Return deferred logits of decode; None for a call of another form.

    ``engine`` computes vLLM's own logits.
    """
    if not logits.is_paged(q[0], cache, weights, lengths, table):
        return None
    return _defer(
        Deferred(selection, columns, q[0], cache, None, weights, lengths, table, None, None, engine)
    )


def defer_gathered(
    selection: Selection,
    engine: Callable[[], torch.Tensor],
    width: int,
    gather: Gather | None,
    q: Any,
    keys: Any,
    weights: Any,
    starts: Any,
    ends: Any,
) -> torch.Tensor | None:
    """Return deferred logits of prefill; None for a call of another form.

    ``width`` 0 means a column for every key, as in vLLM up to 0.32. ``gather`` is the gather of the
    keys.
    """
    if not logits.is_gathered(q[0], keys, weights, starts, ends):
        return None
    values, scales = keys
    columns, lengths = width or values.shape[0], ends - starts
    return _defer(
        Deferred(
            selection, columns, q[0], values, scales.reshape(-1), weights, lengths, None,
            (starts, ends), gather, engine,
        )
    )  # fmt: skip


def _defer(call: Deferred) -> torch.Tensor:
    """Return a tensor of the shape of the logits that holds one element."""
    one = torch.empty(1, 1, dtype=torch.float32, device=call.q.device)
    shaped = one.expand(call.weights.shape[0], call.columns)
    return tag_logits(shaped, LogitsTag(deferred=call))


def readers_in_place(now: Adapter) -> bool:
    """Whether every reader of deferred logits is the plugin's."""
    return all(map(now.intact, READERS))


# --- the source ------------------------------------------------------------------------------


def select_blocks(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Publish the candidate blocks of every row; the plugin does it if the logits are deferred."""
    given = by_name(SELECT_BLOCKS.takes, args, kwargs)
    call = deferred_of(given.get("logits"))
    if call is None:
        return original(*args, **kwargs)
    out = given["out"]
    if _takes(call, given["block_size"], out):
        try:
            maxima = _publish(call, out)
        except Exception as error:
            logits.failed(error)
            call.scores = None
        else:
            call.candidates = out
            current().published = _place(out)
            state.count("candidates.source", len(out))
            _watch_blocks(original, given, call, maxima)
            return None
    state.count("candidates.source.engine", len(out))
    return original(**{**given, "logits": call.engine_logits()})


def _takes(call: Deferred, block_size: Any, blocks: Any) -> bool:
    return (
        block_size == PIECE
        and isinstance(blocks, torch.Tensor)
        and blocks.dtype == torch.int32
        and blocks.dim() == 2
        and blocks.shape[0] == call.weights.shape[0]
        and blocks.stride(1) == 1
    )


def _publish(call: Deferred, out: torch.Tensor) -> torch.Tensor:
    """Write the candidate blocks; return the blocks' scores."""
    rows, device = out.shape[0], out.device
    dtype, backend = DTYPES[call.selection.dtype], call.selection.backend
    maxima = new_logits(rows, -(-call.columns // PIECE), dtype, device)
    if call.table is None:
        call.scores = _every_score(call)
        maxima_of(call.scores, call.lengths, maxima)
    else:
        if rows * call.columns * dtype.itemsize <= KEPT_BYTES:
            call.scores = new_logits(rows, call.columns, dtype, device)
        ops.block_maxima(
            call.q, call.keys, call.weights, call.lengths, call.table,
            block_size=call.keys.shape[1], out=maxima, logits=call.scores, backend=backend,
        )  # fmt: skip
    ops.select_blocks(
        maxima, call.lengths, out.shape[1], next_n=call.next_n, out=out, backend=backend
    )
    return maxima


def _watch_blocks(
    original: Callable[..., None], given: dict[str, Any], call: Deferred, maxima: torch.Tensor
) -> None:
    """Let the shadow compare the blocks with vLLM's selection on the same scores."""
    rows = len(maxima)

    def engine(scratch: torch.Tensor) -> None:
        scores = widen(every_score(call))
        original(**{**given, "logits": scores, "out": scratch, **_from_zero(call)})

    def lengths() -> torch.Tensor:
        return (row_lengths(call.lengths, rows, call.next_n) + PIECE - 1) // PIECE

    shadow.watch("blocks", given["out"], engine, maxima, lengths)


def _every_score(call: Deferred) -> torch.Tensor:
    """Return the plugin's logits of every key; every row begins at column zero."""
    blocks, backend = -(-call.columns // PIECE), call.selection.backend
    dtype = DTYPES[call.selection.dtype]
    out = new_logits(call.weights.shape[0], blocks * PIECE, dtype, call.q.device)[:, : call.columns]
    if call.table is not None:
        return paged_logits(
            call.q, call.keys, call.weights, call.lengths, call.table,
            block_size=call.keys.shape[1], out=out, backend=backend,
        )  # fmt: skip
    assert call.scales is not None and call.window is not None
    call.gathered()
    return ragged_logits(
        call.q, call.keys, call.scales, call.weights, *call.window, out=out, backend=backend
    )


# --- the consumers ---------------------------------------------------------------------------


def apply_mask(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Record the candidates of deferred logits; mask computed logits as vLLM does."""
    given = by_name(APPLY_MASK.takes, args, kwargs)
    call = deferred_of(given.get("logits"))
    if call is None:
        return original(*args, **kwargs)
    blocks = given["candidate_blocks"]
    call.mask = lambda scores, **rows: original(**{**given, "logits": scores, **rows})
    if _takes(call, given["block_size"], blocks) and _published(blocks):
        call.candidates = blocks
    return None


def _published(blocks: torch.Tensor) -> bool:
    """Whether the plugin wrote these candidates in this forward pass; then they ascend."""
    found = _place(blocks)
    return found is not None and current().published == found


def _place(blocks: torch.Tensor) -> tuple[Any, int] | None:
    context = forward_pass()
    if context is None:
        return None
    return weakref.ref(context), blocks.untyped_storage().data_ptr()


# --- both ------------------------------------------------------------------------------------


def select(call: Deferred, k: int, out: torch.Tensor, paged: Paged | None = None) -> None:
    """Select for a ready call, from its logits or from the keys of its candidates.

    ``paged`` gets slots and counts in addition to the indices ``out``.
    """
    consumer = call.mask is not None
    # A wider chunk is scored from the cache, so that its keys need no gather. A candidate block is
    # one kilobyte in the cache and in the gathered keys, and the kernel looks up pages ahead.
    if consumer and call.window and (call.gather is None or call.columns <= WHOLE_COLUMNS):
        call.scores = every_score(call)
    elif not consumer and call.scores is None and _held(call) <= k:
        call.scores = _every_score(call)
    if call.scores is not None:
        how = {"next_n": call.next_n, "backend": call.selection.backend}
        select_into(call.scores, call.lengths, k, out, paged, **how)
    else:
        _select_among_candidates(call, k, out, paged)
    if consumer:
        state.count("candidates.consumer", len(out))


def _held(call: Deferred) -> int:
    """Return how many candidate blocks a row has."""
    return 0 if call.candidates is None else call.candidates.shape[1]


def every_score(call: Deferred) -> torch.Tensor:
    """Return the plugin's logits of every key with vLLM's mask, as vLLM's selection reads them."""
    if call.scores is not None:
        return call.scores
    scores = _every_score(call)
    # If a row has no more blocks than candidates, every block is a candidate.
    if call.mask is not None and call.columns > _held(call) * PIECE:
        call.mask(scores, **_from_zero(call))
    return scores


def _from_zero(call: Deferred) -> dict[str, Any]:
    """Return the columns of each row of the plugin's logits, if vLLM's rows have others."""
    return {} if call.window is None else {"row_ks": None, "row_ke": call.lengths}


def _select_among_candidates(
    call: Deferred, k: int, out: torch.Tensor, paged: Paged | None
) -> None:
    assert call.candidates is not None
    q, cache, table = call.q, call.keys, call.table
    if table is None:
        assert call.gather is not None and call.window is not None
        q, cache = q[:, None], call.gather.cache
        table = call.gather.tables(call.window[0], call.columns)
    ops.candidate_select(
        q, cache, call.weights, call.candidates, call.lengths, table, k,
        block_size=cache.shape[1], dtype=DTYPES[call.selection.dtype], out=out,
        page_table=None if paged is None else paged.table,
        page_size=64 if paged is None else paged.page_size,
        out_slots=None if paged is None else paged.slots,
        out_counts=None if paged is None else paged.counts,
        backend=call.selection.backend,
    )  # fmt: skip
