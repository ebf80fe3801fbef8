"""The pool slots that the plugin's decode top-k writes beside its indices, for the attention.

vLLM's attention turns the indices of its layer into slots of the KV cache, and counts them, in a
kernel of its own. It takes the slots of the top-k instead if its arguments are, by address and
shape, those of the top-k, in the same forward pass and with no other top-k in between. The host
knows all of this. ``docs/development/vllm.md`` says why the answer is the same, and which buffers
hold it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin.engines.vllm.context import LogitsTag, forward_pass

__all__ = ["PATIENCE", "Note", "Paged", "SlotStore", "select_into"]

# After this many unread results the plugin stops writing slots: the model's attention reads none.
PATIENCE = 64


@dataclass(frozen=True)
class _Buffers:
    """The slots ``[rows, k]`` and counts ``[rows]``, int32, of one buffer of indices."""

    indices: weakref.ref[torch.Tensor]
    slots: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Paged:
    """The outputs for slots and counts of one call of the top-k, and its pages."""

    table: torch.Tensor
    page_size: int
    slots: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Note:
    """Slots that the attention can take, and the call of the top-k that wrote them."""

    context: weakref.ref[Any]
    indices: tuple[Any, ...]
    table: tuple[Any, ...]
    paged: Paged
    followers: bool


def select_into(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    out: torch.Tensor,
    paged: Paged | None,
    **how: Any,
) -> None:
    """Select the indices ``out``, and write slots and counts to ``paged`` if given."""
    if paged is None:
        ops.topk(scores, lengths, k, out=out, **how)
    else:
        ops.topk(
            scores, lengths, k, page_table=paged.table, page_size=paged.page_size,
            out=paged.slots, out_raw=out, out_counts=paged.counts, **how,
        )  # fmt: skip


class SlotStore:
    """The buffers of one adapter, and the facts that it has learned about their readers."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffers] = {}
        self._foreign: set[int] = set()  # tables of an indexer that its attention does not use
        self._unread = 0

    def prepare(self, indices: torch.Tensor, rows: int) -> None:
        """Allocate, once, the buffers for ``rows`` rows of ``indices`` ``[tokens, k]``."""
        for place in [p for p, found in self._buffers.items() if found.indices() is None]:
            del self._buffers[place]
        found = self._buffers.get(indices.data_ptr())
        k = indices.shape[1]
        if found is None or found.slots.shape[0] < rows or found.slots.shape[1] != k:
            self._buffers[indices.data_ptr()] = _Buffers(
                weakref.ref(indices),
                torch.empty(rows, k, dtype=torch.int32, device=indices.device),
                torch.empty(rows, dtype=torch.int32, device=indices.device),
            )

    def places(self, tag: LogitsTag, out: torch.Tensor, next_n: int) -> Paged | None:
        """Return the outputs for slots and counts of the indices ``out``; None without a reader."""
        table = tag.table
        found = self._buffers.get(out.data_ptr())
        rows, k = out.shape
        if (
            table is None
            or found is None
            or self._unread >= PATIENCE
            or rows > found.slots.shape[0]
            or k != found.slots.shape[1]
            or table.dtype != torch.int32
            or table.dim() != 2
            or (table.shape[1] > 1 and table.stride(1) != 1)
            or table.device != out.device
            or table.shape[0] * next_n != rows
            or table.data_ptr() in self._foreign
        ):
            return None
        return Paged(table, tag.page_size, found.slots[:rows], found.counts[:rows])

    def note(self, paged: Paged, out: torch.Tensor, followers: bool) -> Note | None:
        """Return a record that slots and counts of ``out`` are written; None outside of a pass.

        ``followers``: the attention of several layers asks for them.
        """
        context = forward_pass()
        if context is None:
            return None
        self._unread += 1
        return Note(weakref.ref(context), _place(out), _place(paged.table), paged, followers)

    def asked(self) -> None:
        """Record that the attention reads slots."""
        self._unread = 0

    def fits(self, note: Note, indices: Any, table: Any, page_size: Any) -> bool:
        """Whether the attention's request matches the recorded call."""
        context = forward_pass()
        if (
            context is None
            or note.context() is not context
            or not isinstance(indices, torch.Tensor)
            or not isinstance(table, torch.Tensor)
            or _place(indices) != note.indices
            or page_size != note.paged.page_size
        ):
            return False
        if _place(table) == note.table:
            return True
        if table.data_ptr() != note.paged.table.data_ptr():
            self._foreign.add(note.paged.table.data_ptr())
        return False


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
