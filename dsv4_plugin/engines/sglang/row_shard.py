"""Shards the rows of a DeepSeek-V4 prefill among SGLang's tensor-parallel ranks.

``forward_c4_indexer`` scores and selects the rows of a batch in parts, in order. In a sharded
forward the plugin's logits and its top-k take only this rank's rows of each part. After the last
part the ranks gather, before SGLang does anything else with the indices. Another rank may have
different parts, because SGLang cuts them by free memory: only the slices matter.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from dsv4_plugin.engines.sglang.adapter import SglangAdapter
from dsv4_plugin.engines.shared import row_shard
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.row_shard import SETTING, Group, Shard, exchange
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.ops.logits import new_logits
from dsv4_plugin.state import state

__all__ = [
    "Rows", "group", "narrowed", "of_forward", "positions_of", "tagged", "unmet", "whole",
]  # fmt: skip

_RATIO = 4  # tokens for each key of the C4 indexer
_ATTRIBUTE = "_dsv4_rows"
# SGLang's options under which ranks have different rows, run two batches at once, or gather in
# another way.
_OTHERWISE = (
    "enable_dp_attention", "enable_prefill_cp", "enable_prefill_context_parallel",
    "enable_dsa_prefill_context_parallel", "enable_two_batch_overlap", "enable_pdmux",
    "enable_symm_mem", "enable_torch_symm_mem", "enable_deterministic_inference",
)  # fmt: skip


def unmet(selection: Selection | None, shadow: bool) -> list[str]:
    """Return why the rows of a prefill cannot be sharded here; the same on every rank."""
    why = []
    if selection is None:
        why.append("the plugin does not select")
    elif selection.logits != "plugin":
        why.append("the rows are narrowed in the plugin's logits, and DeepGEMM writes them")
    if shadow:
        why.append("DSV4_SHADOW=1 compares the rows of a whole batch")
    options = _options()
    if options is None:
        return [*why, "SGLang shows no server arguments"]
    if options["tp_size"] < 2:
        why.append(f"tp_size is {options['tp_size']}: there is no other rank")
    for name in ("pp_size", "attn_dp_size", "attn_cp_size", "dcp_size"):
        size = options.get(name) or 1
        why += [f"{name} is {size}, not 1"] if size != 1 else []
    why += [f"{name} is set" for name in _OTHERWISE if options.get(name)]
    if not why:
        groups = _parallel_state()
        if groups.get_tp_group().ranks != groups.get_attn_tp_group().ranks:
            why.append("the attention has a tensor-parallel group of its own")
    return why


def _options() -> dict[str, Any] | None:
    """Return the options that SGLang uses in this process, or None if it has none."""
    try:
        args: Any = importlib.import_module("sglang.srt.runtime_context").get_server_args()
        # From 0.5.19 on the object itself has the options as the user gave them.
        resolved = getattr(args, "resolved_dict", None)
        return dict(vars(args) if resolved is None else resolved())
    except Exception:  # not set: an indexer without a server around it
        return None


def _parallel_state() -> Any:
    return importlib.import_module("sglang.srt.distributed.parallel_state")


def group() -> Group:
    """Return SGLang's tensor-parallel group, once its ranks have agreed to shard.

    Raises:
        UnmetError: they have not.
    """
    return row_shard.join(_parallel_state().get_tp_group())


# --- a forward -----------------------------------------------------------------------------------


class Rows:
    """The rows of one forward of an indexer: ``cut`` has the slices, the rest is the progress.

    ``scored`` and ``selected`` count the rows of the parts so far. Ranks exchange positions. Each
    rank turns them into pool slots by its own page table, so ranks may use different pages.
    """

    def __init__(self, cut: Shard) -> None:
        self.cut = cut
        self.scored = self.selected = 0
        self._positions: torch.Tensor | None = None
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # first row, slots, pages

    def next_scored(self, rows: int) -> slice:
        """Return which rows of the next part are this rank's; the logits call it for each part."""
        begin, self.scored = self.scored, self.scored + rows
        return self.cut.within(slice(begin, self.scored))

    def next_selected(
        self, out: torch.Tensor, tables: torch.Tensor, raw: torch.Tensor | None
    ) -> tuple[slice, torch.Tensor]:
        """Return the same for the top-k, and where it writes the positions of the part's rows.

        ``out`` ``[rows, k]`` takes pool slots, ``tables`` ``[rows, pages]`` are their pages,
        ``raw`` takes positions, if SGLang wants them.

        Raises:
            RuntimeError: this is not the next part, so the plugin does not know its rows.
        """
        begin, rows = self.selected, len(out)
        self.selected += rows
        every = (self.cut.every_row.stop, out.shape[1])
        if self._positions is None:
            if raw is None:
                self._positions = out.new_empty(every)
            else:
                self._positions = raw.as_strided(every, raw.stride(), raw.storage_offset())
        first = self._parts[0][1] if self._parts else out
        there = first.data_ptr() + begin * first.stride(0) * first.element_size()
        if out.data_ptr() != there or self.scored not in (0, self.selected):
            raise RuntimeError(f"{SETTING}: SGLang does not select its rows in order")
        self._parts.append((begin, out, tables))
        positions = self._positions[begin : self.selected]
        return self.cut.within(slice(begin, self.selected)), positions

    def gather_last(self, page_size: int) -> None:
        """Gather if all parts are done, and make slots of the positions from other ranks."""
        if self.selected != self.cut.every_row.stop:
            return
        assert self._positions is not None
        exchange(self.cut, self._positions)
        for begin, out, tables in self._parts:
            own = self.cut.within(slice(begin, begin + len(out)))
            for rows in (slice(0, min(own.start, len(out))), slice(own.stop, len(out))):
                if rows.start < rows.stop:
                    positions = self._positions[begin + rows.start : begin + rows.stop]
                    out[rows].copy_(_slots(positions, tables[rows], page_size))
        state.count("shard.gather")

    def finished(self) -> None:
        """Check that this rank does not leave a forward without its gather.

        Raises:
            RuntimeError: other code selected some of the rows.
        """
        if self.selected != self.cut.every_row.stop and (self.selected or self.scored):
            raise RuntimeError(f"{SETTING}: SGLang selected rows where the plugin does not see it")


def _slots(positions: torch.Tensor, tables: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the pool slots of positions; -1 stays -1."""
    column = torch.div(positions.clamp(min=0), page_size, rounding_mode="floor")
    slots = tables.gather(1, column.to(torch.int64)) * page_size + positions % page_size
    return torch.where(positions < 0, -1, slots)


def positions_of(slots: torch.Tensor, tables: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the positions of pool slots; of equal pages the first, later ones are padding."""
    pages, columns = tables.sort(dim=1, stable=True)
    page = torch.div(slots.clamp(min=0), page_size, rounding_mode="floor")
    at = torch.searchsorted(pages, page).clamp(max=pages.shape[1] - 1)
    positions = columns.gather(1, at) * page_size + slots % page_size
    return torch.where(slots < 0, -1, positions).to(torch.int32)


def of_forward(
    now: SglangAdapter, mixin: Any, indexer: Any, batch: Any, x: Any, lora: Any
) -> Rows | None:
    """Return the rows of a forward if it is sharded, else None.

    The answer comes from the host only, and is the same on every rank.

    Raises:
        UnmetError: other code has replaced the plugin's top-k, so this rank might not gather.
    """
    if now.group is None:
        return None
    queries, lengths = (getattr(batch, n, None) for n in ("extend_seq_lens_cpu", "seq_lens_cpu"))
    metadata = getattr(mixin.forward_metadata, "indexer_metadata", None)
    if (
        getattr(batch.forward_mode, "name", None) not in ("EXTEND", "MIXED")
        or getattr(batch, "_original_forward_mode", None) is not None
        or getattr(batch, "tbo_parent_token_range", None) is not None
        or getattr(metadata, "use_prefill_cuda_graph", False)
        or queries is None
        or lengths is None
        or len(queries) != len(lengths)
        or sum(queries) != len(x)
        or len(x) != len(lora)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    cut = _cut(now.group, tuple(map(int, queries)), tuple(map(int, lengths)), indexer.index_topk)
    if cut is None:
        return None
    if not now.intact("topk.paged"):
        raise UnmetError(SETTING, now.problems("topk.paged"))
    return Rows(cut)


@functools.lru_cache(maxsize=1)  # one for all layers of a forward
def _cut(group: Group, queries: tuple[int, ...], lengths: tuple[int, ...], k: int) -> Shard | None:
    return row_shard.shard(group, queries, lengths, _RATIO, k)


# --- logits of this rank's rows ------------------------------------------------------------------


def tagged(scores: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Mark logits as those of ``rows`` of their part, and return them."""
    if scores is not None:
        setattr(scores, _ATTRIBUTE, rows)
    return scores


def narrowed(scores: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return the logits of ``rows`` of a part; ``scores`` has these rows only, or all rows."""
    return scores if getattr(scores, _ATTRIBUTE, None) is not None else scores[rows]


def whole(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Return logits of all ``rows`` of a part, for SGLang's own top-k; other ranks' are zeros.

    SGLang's plan is for all rows. The gather overwrites what it selects for rows of other ranks.
    """
    own = getattr(scores, _ATTRIBUTE, None)
    if own is None:
        return scores
    every = new_logits(rows, scores.shape[1], torch.float32, scores.device).zero_()
    every[own].copy_(scores)
    return every
