"""The pool slots that our decode top-k writes beside its indices, for the attention that follows.

vLLM's C4A attention turns the indices of its layer into slots of the KV cache, and counts them, in
a kernel of its own after every top-k. Ours writes both while it has the indices at hand. They are
taken in place of that kernel's if what it would be called with is, by address and shape, what the
top-k was called with, in the same forward pass and with nothing in between; else it runs. All of
this is asked of the host: nothing waits for the GPU.

**Why the same answer.** Row ``r`` of the top-k belongs to request ``r // next_n``. The attention's
rows are those of as many requests in the same order; where it has as many rows of as many
requests, every request has ``next_n``, so its map from rows to requests is the same. A row that
pads a CUDA graph has length zero, hence no index, no slot and the count zero in both.

**Whose memory.** One pair of buffers for each buffer of indices, as vLLM has one of these for all
of its layers, allocated when the first layer is built: the address is the same in every captured
graph, and whatever orders the writing of indices by one layer and the reading by the next one,
over streams too, orders these. A tensor made at the call would belong to the stream of the indexer,
which to 0.32 is not the attention's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_plugin.engines.shared import plan
from dsv4_plugin.engines.vllm.engine_calls import by_name, forward_pass
from dsv4_plugin.engines.vllm.probe import TO_SLOTS_TAKES
from dsv4_plugin.state import state

__all__ = ["Paged", "beside", "forget", "mark", "passed_on", "prepare", "taken", "void", "wrote"]

# Set on index logits: the block table and page size of the cache they were scored on.
_PAGES = "_dsv4_index_pages"
# So many calls without anybody who asks for slots are a model whose attention does without.
_PATIENCE = 64


@dataclass(frozen=True)
class _Side:
    """What lies beside one buffer of indices."""

    buffer: weakref.ref[torch.Tensor]
    slots: torch.Tensor  # [rows, k] int32
    counts: torch.Tensor  # [rows] int32


@dataclass(frozen=True)
class Paged:
    """Where one call of the top-k writes: what it needs beside ``out_raw``, the indices."""

    table: torch.Tensor
    page_size: int
    slots: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class _Note:
    """Slots that are there to be taken, and the call they stand for."""

    context: weakref.ref[Any]
    indices: tuple[Any, ...]
    table: tuple[Any, ...]
    paged: Paged


class _Last(threading.local):
    """The note of the last top-k of this thread."""

    note: _Note | None = None


_last = _Last()
_sides: dict[int, _Side] = {}
_others: set[int] = set()  # tables of an indexer that are not its attention's
_unread = 0  # notes since one was asked for


def forget() -> None:
    """Forget everything; the buffers are freed."""
    global _unread
    _last.note = None
    _sides.clear()
    _others.clear()
    _unread = 0


def void() -> None:
    """Say that a top-k begins: what was noted before does not describe the indices any more."""
    _last.note = None


def prepare(buffer: torch.Tensor, rows: int) -> None:
    """Allocate, once, what lies beside a buffer of indices ``[tokens, k]``, for ``rows`` of it."""
    for place in [place for place, side in _sides.items() if side.buffer() is None]:
        del _sides[place]
    side = _sides.get(buffer.data_ptr())
    if side is not None and side.slots.shape[0] >= rows and side.slots.shape[1] == buffer.shape[1]:
        return
    _sides[buffer.data_ptr()] = _Side(
        weakref.ref(buffer),
        torch.empty(rows, buffer.shape[1], dtype=torch.int32, device=buffer.device),
        torch.empty(rows, dtype=torch.int32, device=buffer.device),
    )


def mark(logits: torch.Tensor, table: Any, cache: Any) -> None:
    """Let the top-k that reads ``logits`` know the pages they were scored on."""
    if isinstance(table, torch.Tensor) and isinstance(cache, torch.Tensor) and cache.dim() >= 3:
        setattr(logits, _PAGES, (table, cache.shape[1]))


def passed_on(old: torch.Tensor, new: torch.Tensor) -> None:
    """Keep the mark where logits are replaced by the same in another dtype."""
    pages = getattr(old, _PAGES, None)
    if pages is not None:
        setattr(new, _PAGES, pages)


def beside(scores: torch.Tensor, out: torch.Tensor, next_n: int) -> Paged | None:
    """Return where slots and counts of ``out``, the indices, go; None: there is no use for them."""
    table, page_size = getattr(scores, _PAGES, (None, 0))
    side = _sides.get(out.data_ptr())
    rows, k = out.shape
    if (
        table is None
        or side is None
        or _unread >= _PATIENCE
        or rows > side.slots.shape[0]
        or k != side.slots.shape[1]
        or table.dtype != torch.int32
        or table.dim() != 2
        or (table.shape[1] > 1 and table.stride(1) != 1)
        or table.device != out.device
        or table.shape[0] * next_n != rows
        or table.data_ptr() in _others
    ):
        return None
    return Paged(table, page_size, side.slots[:rows], side.counts[:rows])


def wrote(paged: Paged, out: torch.Tensor) -> None:
    """Note that slots and counts of ``out`` are written, for the attention of the same pass."""
    global _unread
    context = forward_pass()
    if context is None:
        return
    _unread += 1
    _last.note = _Note(weakref.ref(context), _place(out), _place(paged.table), paged)
    state.count("topk.slots")


def taken(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return slots and counts: those of the top-k just before, else ``original``'s."""
    global _unread
    note, _last.note = _last.note, None
    now = plan.current()
    _unread = 0
    if note is not None and now.topk is not None and now.topk.slots:
        given = by_name(TO_SLOTS_TAKES, args, kwargs)
        if set(given) == set(TO_SLOTS_TAKES) and _fits(note, given):
            state.count("topk.slots.taken")
            return note.paged.slots, note.paged.counts
    if now.enabled:
        state.count("topk.slots.upstream")
    return original(*args, **kwargs)


def _fits(note: _Note, given: dict[str, Any]) -> bool:
    """Whether the call asks for what was noted."""
    context = forward_pass()
    indices, table = given["topk_indices"], given["block_table"]
    if (
        context is None
        or note.context() is not context
        or not isinstance(indices, torch.Tensor)
        or not isinstance(table, torch.Tensor)
        or _place(indices) != note.indices
        or given["block_size"] != note.paged.page_size
    ):
        return False
    if _place(table) == note.table:
        return True
    if table.data_ptr() != note.paged.table.data_ptr():
        _others.add(note.paged.table.data_ptr())
    return False


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
