"""DeepSeek-V4.1's indexer: one op of TokenSpeed's registry scores, and selects blocks and keys.

A *plain* layer selects keys. The *source* also selects candidate blocks of 8 keys. A *consumer*
selects among the keys of the candidates that it gets. The op is called with the rows of one step.
In prefill these are rows of one request, and the op gets its page table once (with row stride 0).

The queries are rounded to FP8 as TokenSpeed's own kernel for Hopper rounds them. A consumer scores
only the keys of its candidates. Scratch memory is bounded for any rows and context. A call that
does not fit is divided into parts. A selection whose logits would not fit scores blocks first, and
then the keys of the best blocks a second time (``k`` keys lie in ``k + 1`` blocks).

There is no host synchronisation and no control flow that depends on data, so decode can be
captured.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin.engines.shared import logits as shared_logits
from dsv4_plugin.engines.shared.candidates import PIECE, WHOLE_COLUMNS, maxima_of
from dsv4_plugin.engines.shared.decision import DTYPES, Selection
from dsv4_plugin.engines.tokenspeed.kernels import HEAD_DIM, KEY_BYTES, logits_of, quantise
from dsv4_plugin.kernels.arguments import MAX_K
from dsv4_plugin.ops.logits import new_logits
from dsv4_plugin.state import state

__all__ = ["LOGITS_OPS", "TRITON", "index_topk", "is_prefill", "layer_of", "unfit"]

PAGE = 64
TRITON = "tokenspeed_kernel.ops.attention.dsv41.triton"
# The memory that the logits of a call may take. TokenSpeed's own kernel has the same budgets: 32
# and 128 MiB, and as much again for its cleaned copy.
DECODE_BYTES = 64 << 20
PREFILL_BYTES = 256 << 20
# The ops that must be able to write a dtype before the plugin serves a layer in it.
LOGITS_OPS = {
    "plain": ("paged_logits", "ragged_logits", "block_maxima", "select_blocks",
              "candidate_select"),
    "source": ("block_maxima", "select_blocks", "candidate_select", "ragged_logits"),
    "consumer": ("candidate_select", "ragged_logits", "select_candidates"),
}  # fmt: skip


def layer_of(given: Mapping[str, Any]) -> str:
    """Return the kind of the calling layer: ``plain``, ``source`` or ``consumer``."""
    if given["candidate_blocks"] is not None:
        return "consumer"
    return "source" if given["candidate_topk"] else "plain"


def is_prefill(given: Mapping[str, Any]) -> bool:
    """Whether all rows of a call are of one request."""
    return given["page_table"].stride(0) == 0 and len(given["page_table"]) > 1


def unfit(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why the plugin cannot serve a call; an empty tuple if it can."""
    why = []
    q, cache = given["index_q"], given["index_cache"]
    if given["process_group"] is not None:
        why.append("the indexer's heads are divided among ranks")
    elif q.dim() != 3 or q.shape[1] not in (32, 64) or q.shape[2] != HEAD_DIM:
        why.append(f"index_q is {list(q.shape)}, not [rows, 32 or 64, {HEAD_DIM}]")
    if given["candidate_block_size"] != PIECE:
        why.append(f"candidate blocks have {given['candidate_block_size']} keys, not {PIECE}")
    if cache.dtype != torch.uint8 or tuple(cache.shape[1:]) != (PAGE, KEY_BYTES):
        why.append(
            f"the index cache is {cache.dtype} {list(cache.shape)}, not the FP8 form "
            f"[pages, {PAGE}, {KEY_BYTES}]"
        )
    elif cache.stride()[1:] != (KEY_BYTES, 1):
        why.append(f"the pages of the index cache are not contiguous (strides {cache.stride()})")
    for name in ("page_table", "candidate_blocks"):
        table = given[name]
        if table is not None and (
            table.dtype != torch.int32
            or table.dim() != 2
            or (table.shape[1] > 1 and table.stride(1) != 1)
        ):
            why.append(f"{name} is {table.dtype} with strides {table.stride()}, not int32 rows")
    return tuple(why)


@dataclass(frozen=True)
class _Call:
    """The rows of a call, or some of them; only a consumer has ``candidates``."""

    chosen: Selection
    q: torch.Tensor  # e4m3 [rows, heads, 128]
    weights: torch.Tensor  # float32 [rows, heads]
    cache: torch.Tensor
    table: torch.Tensor
    visible: torch.Tensor
    candidates: torch.Tensor | None
    k: int
    rows: torch.Tensor  # int32 [rows, k]
    lengths: torch.Tensor
    blocks: torch.Tensor  # int32 [rows, K]; without columns if the layer is no source
    block_lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, row_bytes: int, budget: int, most: int) -> Iterator[_Call]:
        """Divide the call into parts whose logits, ``row_bytes`` a row, fit into ``budget``."""
        step = max(1, min(most, budget // row_bytes))
        if step >= len(self):
            yield self
            return
        for first in range(0, len(self), step):
            at = slice(first, first + step)
            yield replace(
                self, q=self.q[at], weights=self.weights[at], table=self.table[at],
                visible=self.visible[at], rows=self.rows[at], lengths=self.lengths[at],
                blocks=self.blocks[at], block_lengths=self.block_lengths[at],
                candidates=None if self.candidates is None else self.candidates[at],
            )  # fmt: skip

    def scratch(self, columns: int) -> torch.Tensor:
        """Return uninitialised scores."""
        return new_logits(len(self), columns, DTYPES[self.chosen.dtype], self.q.device)

    @property
    def columns(self) -> int:
        """The keys that the page table has room for: whole blocks."""
        return self.table.shape[1] * PAGE


def index_topk(
    chosen: Selection,
    index_q: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    page_table: torch.Tensor,
    visible_lens: torch.Tensor,
    candidate_blocks: torch.Tensor | None,
    topk: int,
    candidate_topk: int,
    candidate_block_size: int,
    query_chunk_size: int,
    score_chunk_size: int,
    process_group: Any,
    out: tuple[torch.Tensor, ...] | None,
) -> tuple[torch.Tensor, ...]:
    """Select the best keys of every row, and the source's candidate blocks.

    It keeps the contract of TokenSpeed's ``dsv41.index_topk``, and ties go to the lowest position.
    A key whose page is missing never has a better score than another key, but a row with fewer
    other keys than ``topk`` may name it. TokenSpeed leaves it out of its own answer. TokenSpeed's
    attention skips it, because it has no slot.
    """
    n, device = len(index_q), index_q.device
    if out is None:
        shapes = ((n, topk), (n,), (n, candidate_topk), (n,))
        out = tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
    rows, lengths, blocks, block_lengths = out
    if not candidate_topk:
        block_lengths.zero_()
    if n == 0:
        return out
    if page_table.shape[1] == 0:
        for tensor in (rows, blocks):
            tensor.fill_(-1)
        for tensor in (lengths, block_lengths):
            tensor.zero_()
        return out
    on_gpu = index_q.is_cuda  # TokenSpeed's own kernels run only there
    rounds = _engine_kernel("quantize_index_queries") if on_gpu else None
    query, folded = rounds(index_q, weights) if rounds else quantise(index_q, weights, 1.0)
    call = _Call(
        chosen, query, folded, index_cache, page_table, visible_lens, candidate_blocks, topk,
        rows, lengths, blocks, block_lengths,
    )  # fmt: skip
    if page_table.stride(0) == 0 and n > 1:
        # All keys are scored only if TokenSpeed's kernel that picks the candidates' scores is
        # there.
        whole = call.columns <= WHOLE_COLUMNS
        scores = _engine_kernel("candidate_scores") if on_gpu and whole else None
        _prefill(call, query_chunk_size, scores)
    else:
        _decode(call, query_chunk_size)
    if candidate_blocks is not None:
        state.count("candidates.consumer", n)
    elif candidate_topk:
        state.count("candidates.source", n)
    return out


def _engine_kernel(name: str) -> Any:
    """Return a kernel of TokenSpeed's own, or None if the release has none.

    ``quantize_index_queries`` rounds the queries and multiplies their scales into the weights in
    one launch. So the plugin and TokenSpeed score the same queries.
    """
    try:
        return getattr(importlib.import_module(TRITON), name, None)
    except ImportError:
        return None


def _decode(call: _Call, most: int) -> None:
    width = DTYPES[call.chosen.dtype].itemsize
    if call.candidates is not None:
        row_bytes = call.candidates.shape[1] * PIECE * width
        for part in call.parts(row_bytes, DECODE_BYTES, most):
            _among(part, part.candidates)
        return
    # Each of a row's k best keys lies in one of its k + 1 best blocks.
    held = call.blocks.shape[1] or min(call.k + 1, MAX_K)
    enough = held > call.k or held * PIECE >= call.columns
    if enough and len(call) * call.columns * width > DECODE_BYTES:
        row_bytes = (call.columns // PIECE + held * PIECE) * width
        for part in call.parts(row_bytes, DECODE_BYTES, most):
            _by_blocks(part, held)
        return
    for part in call.parts(call.columns * width, DECODE_BYTES, most):
        if part.blocks.shape[1]:
            scores = part.scratch(part.columns)
            _select_blocks(part, _maxima(part, scores), part.blocks, part.block_lengths)
        else:
            scores = logits_of(shared_logits.paged(
                part.chosen, part.q[:, None], part.cache, part.weights, part.visible, part.table,
                part.columns,
            ))  # fmt: skip
        _topk(part, scores)


def _prefill(call: _Call, most: int, pick: Any) -> None:
    """Select for rows of one request; ``pick`` takes the candidates' scores out of all scores."""
    width = DTYPES[call.chosen.dtype].itemsize
    if call.candidates is not None and pick is None:
        row_bytes = call.candidates.shape[1] * PIECE * width
        for part in call.parts(row_bytes, PREFILL_BYTES, most):
            _among(part, part.candidates)
        return
    keys = _gather(call)
    starts = torch.zeros_like(call.visible)
    for part in call.parts(call.columns * width, PREFILL_BYTES, most):
        scores = logits_of(shared_logits.dense(
            part.chosen, part.q, keys, part.weights, starts[: len(part)], part.visible,
            part.columns,
        ))  # fmt: skip
        if part.candidates is not None:
            ops.select_candidates(
                pick(scores, part.candidates), part.candidates, part.visible, part.k,
                out=part.rows, out_counts=part.lengths, backend=part.chosen.backend,
            )  # fmt: skip
            continue
        if part.blocks.shape[1]:
            maxima = part.scratch(part.columns // PIECE)
            maxima_of(scores, part.visible, maxima)
            _select_blocks(part, maxima, part.blocks, part.block_lengths)
        _topk(part, scores)


def _gather(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the keys of the one request of a call."""
    columns, device = call.columns, call.q.device
    values = torch.empty(columns, HEAD_DIM, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(columns, dtype=torch.float32, device=device)
    ends = torch.arange(0, 2 * columns, columns, dtype=torch.int32, device=device)  # no copy
    ops.gather_indexer_cache(
        call.cache, call.table[:1], ends, block_size=PAGE, head_dim=HEAD_DIM,
        out=(values, scales), backend=call.chosen.backend,
    )  # fmt: skip
    return values, scales


def _maxima(call: _Call, scores: torch.Tensor | None) -> torch.Tensor:
    """Return the best score of every block; write the score of every key to ``scores``."""
    maxima = call.scratch(call.columns // PIECE)
    return ops.block_maxima(
        call.q[:, None], call.cache, call.weights, call.visible, call.table, block_size=PAGE,
        out=maxima, logits=scores, backend=call.chosen.backend,
    )  # fmt: skip


def _select_blocks(
    call: _Call, maxima: torch.Tensor, out: torch.Tensor, counts: torch.Tensor | None
) -> None:
    ops.select_blocks(
        maxima, call.visible, out.shape[1], out=out, out_counts=counts, backend=call.chosen.backend
    )


def _topk(call: _Call, scores: torch.Tensor) -> None:
    ops.topk(
        scores, call.visible, call.k, out=call.rows, out_counts=call.lengths,
        backend=call.chosen.backend,
    )  # fmt: skip


def _by_blocks(call: _Call, held: int) -> None:
    """Select among the keys of the best blocks, which the source publishes."""
    source = call.blocks.shape[1] > 0
    blocks = call.blocks if source else torch.empty(
        len(call), held, dtype=torch.int32, device=call.q.device
    )  # fmt: skip
    _select_blocks(call, _maxima(call, None), blocks, call.block_lengths if source else None)
    _among(call, blocks)


def _among(call: _Call, candidates: torch.Tensor | None) -> None:
    """Score the keys of candidates, and select among them."""
    assert candidates is not None
    ops.candidate_select(
        call.q[:, None], call.cache, call.weights, candidates, call.visible, call.table, call.k,
        block_size=PAGE, dtype=DTYPES[call.chosen.dtype], out=call.rows, out_counts=call.lengths,
        backend=call.chosen.backend,
    )  # fmt: skip
