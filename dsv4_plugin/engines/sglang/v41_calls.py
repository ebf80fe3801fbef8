"""A call of an index layer of DeepSeek-V4.1, scored and selected by the plugin's ops.

SGLang passes the same kinds of objects to all its layers (``DecodeInputs``, ``PrefillInputs``).
This module turns them into the arguments of the plugin's ops, without a read of the device. The
lengths come from the positions, the pages from SGLang's tables, the sizes from SGLang's values on
the host.

* **a plain layer** scores every key that a row sees and selects.
* **the source** scores every key once, with the maxima of the blocks. It publishes each row's best
  blocks in ascending order, and selects.
* **a consumer** scores the keys of its candidates and selects among them.

If a row sees no more keys than its candidate blocks hold, every block is a candidate. Then source
and consumers select as plain layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_plugin.engines.sglang.policy import V41_K
from dsv4_plugin.engines.sglang.v41_published import Published, every_block, published
from dsv4_plugin.engines.sglang.v41_rows import Part, Run, parts_of
from dsv4_plugin.engines.shared import decision
from dsv4_plugin.engines.shared.candidates import PIECE, WHOLE_COLUMNS
from dsv4_plugin.engines.shared.decision import DTYPES, Selection
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.kernels.arguments import MAX_K
from dsv4_plugin.ops import candidates as ops
from dsv4_plugin.ops.logits import new_logits, paged_logits
from dsv4_plugin.ops.topk import topk

__all__ = ["PAGE", "Call", "Layers", "decode", "prefill", "unfit"]

PAGE = 64  # slots a page of the index cache
SLOT_BYTES = 68  # 64 of FP4 pairs, 4 scales
# Decode: the plugin keeps scores of at most this many bytes. Of larger ones it keeps only the
# blocks' maxima and scores the keys of the best blocks a second time: the k best keys of a row are
# in its k + 1 best blocks. Prefill: the scores of a part take at most this many bytes.
KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class Layers:
    """The facts that all calls share: SGLang's pool and tables, and the choice of candidates.

    ``held``: candidate blocks of a row; 0 if the model has none.
    """

    pool: Any
    req_to_token: torch.Tensor
    held: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the index cache."""
        return self.req_to_token.device


def unfit(held: int, piece: int) -> list[str]:
    """Return why the plugin does not choose ``held`` blocks of ``piece`` keys a row."""
    why = []
    if piece != PIECE:
        why.append(f"candidate blocks have {piece} keys, not {PIECE}")
    if not 1 <= held <= MAX_K or held * PIECE < V41_K:
        why.append(f"{held} candidate blocks a row, not {V41_K} keys' worth and at most {MAX_K}")
    return why


@dataclass
class Call:
    """One call: ``rows`` queries ``[rows, heads, 128]`` bfloat16, and the parts of the call.

    ``weights`` ``[rows, heads]`` bfloat16. ``lengths`` int32 ``[rows]``: the keys that a row sees.
    ``cache`` uint8 ``[pages, 64 · 68]``. ``tables`` int32 ``[requests, pages]``: a request's pages.
    ``columns``: the most keys of a row. ``slots``, ``raw``: int32 ``[rows, k]`` to fill with pool
    slots and positions; one of them may be None. At decode ``next_n`` is the number of rows of
    every request. At prefill it is 0, and ``rows_per_request`` has the number for each request.
    ``requests`` int64 ``[rows]`` is the request of each row, if a part needs it.
    """

    selection: Selection
    layers: Layers
    q: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    parts: tuple[Part, ...]
    columns: int
    k: int
    slots: torch.Tensor | None
    raw: torch.Tensor | None
    next_n: int = 0
    rows_per_request: Sequence[int] = ()
    requests: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scores."""
        return DTYPES[self.selection.dtype]

    # --- the three kinds of layers -------------------------------------------------------------

    def plain(self) -> None:
        """Select among all keys."""
        for part in self.parts:
            self._among_all(part)

    def source(self) -> Published:
        """Select among all keys, and publish the best blocks."""
        rows, held = len(self.lengths), self.layers.held
        candidates = None
        if self.columns > held * PIECE:
            candidates = torch.empty(rows, held, dtype=torch.int32, device=self.q.device)
        for part in self.parts:
            if candidates is None or self._all_are_candidates(part):
                self._among_all(part)
                if candidates is not None:
                    blocks = every_block(self.lengths[part.rows], held, PIECE)
                    candidates[part.rows] = blocks
            else:
                self._publish(part, candidates[part.rows])
        rows_per_request = None if self.next_n else list(self.rows_per_request)
        return published(candidates, self.lengths, self.columns, PIECE, rows_per_request)

    def consumer(self, published: Published) -> None:
        """Select among the keys of the candidates."""
        if len(published.lengths) != len(self.lengths):
            had = len(published.lengths)
            raise UnmetError(_WHAT, [f"the source had {had} rows, not {len(self.lengths)}"])
        for part in self.parts:
            if published.candidates is None or self._all_are_candidates(part):
                self._among_all(part)
                continue
            candidates = published.candidates[part.rows]
            if not self.next_n and part.columns <= WHOLE_COLUMNS:
                scores = self._scores(part, whole_blocks=True)
                self._select_candidates(part, candidates, _of_blocks(scores, candidates))
            else:
                self._among(part, candidates)

    def _all_are_candidates(self, part: Part) -> bool:
        return part.columns <= self.layers.held * PIECE

    # --- a part --------------------------------------------------------------------------------

    def _among_all(self, part: Part) -> None:
        rows = part.rows.stop - part.rows.start
        if rows * part.columns * self.dtype.itemsize <= KEPT_BYTES or rows == 1:
            self._select(part, self._scores(part))
        else:
            held = min(self.k + PIECE, -(-part.columns // PIECE))
            candidates = torch.empty(rows, held, dtype=torch.int32, device=self.q.device)
            self._publish(part, candidates)

    def _publish(self, part: Part, candidates: torch.Tensor) -> None:
        """Write the best blocks of every row to ``candidates``, and select among all keys."""
        rows, held = candidates.shape
        maxima = new_logits(rows, -(-part.columns // PIECE), self.dtype, self.q.device)
        keep = held <= self.k or rows * part.columns * self.dtype.itemsize <= KEPT_BYTES
        scores = new_logits(rows, part.columns, self.dtype, self.q.device) if keep else None
        for run in part.runs:
            at = _within(part, run)
            ops.block_maxima(
                *self._arguments(run), block_size=PAGE, out=maxima[at],
                logits=None if scores is None else scores[at], backend=self.selection.backend,
            )  # fmt: skip
        ops.select_blocks(
            maxima, self.lengths[part.rows], held, next_n=self._next_n(part),
            out=candidates, backend=self.selection.backend,
        )  # fmt: skip
        if scores is not None:
            self._select(part, scores)
        else:
            self._among(part, candidates)

    # --- the ops on a part ---------------------------------------------------------------------

    def _scores(self, part: Part, whole_blocks: bool = False) -> torch.Tensor:
        """Return the scores of all keys; with ``whole_blocks`` in rows of whole blocks."""
        rows = part.rows.stop - part.rows.start
        columns = -(-part.columns // PIECE) * PIECE if whole_blocks else part.columns
        out = new_logits(rows, max(columns, 1), self.dtype, self.q.device)
        for run in part.runs:
            paged_logits(
                *self._arguments(run), block_size=PAGE, out=out[_within(part, run)],
                backend=self.selection.backend,
            )  # fmt: skip
        return out

    def _scores_of(self, part: Part, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores of the candidates' keys; unseen columns may hold any value."""
        rows, held = candidates.shape
        out = new_logits(rows, held * PIECE, self.dtype, self.q.device)
        # No op reads it; with it, the op does not write columns past a row's visible keys.
        visible = torch.empty(rows, dtype=torch.int32, device=self.q.device)
        for run in part.runs:
            at = _within(part, run)
            q, cache, weights, lengths, table = self._arguments(run)
            ops.candidate_logits(
                q, cache, weights, candidates[at], lengths, table, block_size=PAGE, out=out[at],
                out_lengths=visible[at], backend=self.selection.backend,
            )  # fmt: skip
        return out

    def _arguments(self, run: Run) -> tuple[torch.Tensor, ...]:
        rows = slice(run.begin, run.end)
        n = self.next_n or run.end - run.begin
        table = self.tables if self.next_n else self.tables[run.request : run.request + 1]
        q = self.q[rows].unflatten(0, (-1, n))
        return q, self.cache, self.weights[rows], self.lengths[rows], table

    def _select(self, part: Part, scores: torch.Tensor) -> None:
        rows, out, raw = part.rows, self._into(self.slots, part), self._into(self.raw, part)
        if out is None:
            assert raw is not None
            topk(scores, self.lengths[rows], self.k, out=raw, backend=self.selection.backend)
            return
        topk(
            scores, self.lengths[rows], self.k, next_n=self._next_n(part), out=out, out_raw=raw,
            page_table=self._table(part), page_size=PAGE, backend=self.selection.backend,
        )  # fmt: skip

    def _among(self, part: Part, candidates: torch.Tensor) -> None:
        """Score the keys of the candidates, and select among them."""
        if len(part.runs) > 1:
            self._select_candidates(part, candidates, self._scores_of(part, candidates))
            return
        q, cache, weights, lengths, table = self._arguments(part.runs[0])
        slots = self._into(self.slots, part)
        ops.candidate_select(
            q, cache, weights, candidates, lengths, table, self.k, block_size=PAGE,
            dtype=self.dtype, page_table=None if slots is None else table, page_size=PAGE,
            out=self._into(self.raw, part), out_slots=slots, backend=self.selection.backend,
        )  # fmt: skip

    def _select_candidates(
        self, part: Part, candidates: torch.Tensor, scores: torch.Tensor
    ) -> None:
        slots = self._into(self.slots, part)
        ops.select_candidates(
            scores, candidates, self.lengths[part.rows], self.k, next_n=self._next_n(part),
            out=self._into(self.raw, part), out_slots=slots, page_size=PAGE,
            block_table=None if slots is None else self._table(part),
            backend=self.selection.backend,
        )  # fmt: skip

    def _into(self, out: torch.Tensor | None, part: Part) -> torch.Tensor | None:
        return None if out is None else out[part.rows, : self.k]

    def _next_n(self, part: Part) -> int:
        """Return how many rows of the part share a row of its table."""
        if self.next_n:
            return self.next_n
        return part.rows.stop - part.rows.start if len(part.runs) == 1 else 1

    def _table(self, part: Part) -> torch.Tensor:
        """Return the pages of the part's rows: one row of pages for a request, or for each row."""
        if self.next_n:
            return self.tables
        if len(part.runs) == 1:
            request = part.runs[0].request
            return self.tables[request : request + 1]
        assert self.requests is not None
        return self.tables.index_select(0, self.requests[part.rows])


def _within(part: Part, run: Run) -> slice:
    """Return the rows of a run within its part."""
    first = part.rows.start
    return slice(run.begin - first, run.end - first)


def _of_blocks(scores: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Return the scores of the candidates' keys; ``scores`` are rows of whole blocks, packed."""
    words = PIECE * scores.dtype.itemsize // 16  # one or two numbers hold a block
    wide = scores.view(torch.complex128).unflatten(1, (-1, words))
    at = candidates.clamp(min=0).to(torch.int64)[:, :, None].expand(-1, -1, words)
    return wide.gather(1, at).flatten(1).view(scores.dtype)


# --- from SGLang's inputs ------------------------------------------------------------------------


def decode(selection: Selection, layers: Layers, inputs: Any) -> Call:
    """Return a call of decode or verification: one row for each request, or for each draft token.

    Raises:
        UnmetError: the call has another form.
    """
    rows, metadata = len(inputs.positions), inputs.paged_metadata
    columns = min(
        metadata.max_compressed_seq_len, layers.req_to_token.shape[1] // inputs.compress_ratio
    )
    # From 0.5.23 on SGLang says how many rows each request has. Without this number every row
    # counts as a request of its own. The answer is the same, but no two rows share the read of a
    # key.
    next_n = getattr(metadata, "rows_per_request", 1)
    next_n = next_n if rows % next_n == 0 else 1
    tables = metadata.page_table[:rows:next_n, : -(-columns // PAGE)]
    parts = (Part((Run(0, 0, rows),), columns),)
    return _call(
        selection, layers, inputs, metadata.compressed_page_size, tables, parts, columns,
        (inputs.out_page_indices, None), next_n=next_n,
    )  # fmt: skip


def prefill(selection: Selection, layers: Layers, inputs: Any) -> Call:
    """Return a call of prefill: the rows of one request after the other.

    Under context parallelism a rank has some rows of each request, and the whole index cache.

    Raises:
        UnmetError: the call has another form.
    """
    ratio, rows = inputs.compress_ratio, len(inputs.positions)
    counts, lengths = inputs.rows_per_request, inputs.seq_lens_cpu
    if counts is None or lengths is None or len(counts) != len(lengths) or sum(counts) != rows:
        raise UnmetError(_WHAT, ["the host has no lengths of the call's rows"])
    keys = [n // ratio for n in lengths]
    # A page of the index cache holds the keys of 64 · ratio tokens in a row.
    tokens = min(max(keys) * ratio, layers.req_to_token.shape[1])
    tables = torch.div(
        layers.req_to_token[:, : tokens : PAGE * ratio].index_select(
            0, inputs.req_pool_indices.to(torch.int64)
        ),
        PAGE * ratio,
        rounding_mode="floor",
    )
    most = KEPT_BYTES // DTYPES[selection.dtype].itemsize
    parts = tuple(parts_of(counts, keys, most, layers.held * PIECE))
    requests = None
    if inputs.out_page_indices is not None and any(len(part.runs) > 1 for part in parts):
        requests = torch.repeat_interleave(
            torch.arange(len(counts), device=tables.device),
            inputs.rows_per_request_device.to(torch.int64),
            output_size=rows,
        )
    return _call(
        selection, layers, inputs, layers.pool.get_index_k_page_size(ratio), tables, parts,
        max(keys), (inputs.out_page_indices, inputs.out_raw_indices),
        rows_per_request=counts, requests=requests,
    )  # fmt: skip


_WHAT = "the indexer of DeepSeek-V4.1"


def _call(
    selection: Selection,
    layers: Layers,
    inputs: Any,
    page_size: int,
    tables: torch.Tensor,
    parts: tuple[Part, ...],
    columns: int,
    outputs: tuple[torch.Tensor | None, torch.Tensor | None],
    **more: Any,
) -> Call:
    indexer, positions = inputs.indexer, inputs.positions
    rows, k = len(positions), indexer.index_topk
    cache = layers.pool.get_index_k_with_scale_buffer(inputs.layer_id)
    unmet = decision.unfit_k(k)
    if page_size != PAGE or cache.dim() != 2 or cache.shape[1] != PAGE * SLOT_BYTES:
        unmet.append(f"the index cache has pages of {page_size} slots, {tuple(cache.shape)}")
    if indexer.n_heads != indexer.n_local_heads:
        unmet.append("the index heads are spread over ranks")
    for out in outputs:
        if out is not None and not (out.dim() == 2 and len(out) >= rows and out.shape[1] >= k):
            unmet.append(f"an output has the shape {tuple(out.shape)}, not [{rows}, {k}] or more")
    if unmet:
        raise UnmetError(_WHAT, unmet)
    for out in outputs:  # SGLang's own code leaves -1 in all slots that it does not fill
        if out is not None:
            _fill_rest(out, rows, k)
    slots, raw = (None if out is None else out[:rows, :k] for out in outputs)
    return Call(
        selection=selection,
        layers=layers,
        q=indexer.queries(inputs.q_lora, inputs.freqs_cis[positions]),
        weights=indexer.head_weights(inputs.x).to(torch.bfloat16),
        lengths=torch.div(positions + 1, inputs.compress_ratio, rounding_mode="floor").int(),
        cache=cache,
        tables=tables,
        parts=parts,
        columns=columns,
        k=k,
        slots=slots,
        raw=raw,
        **more,
    )


def _fill_rest(out: torch.Tensor, rows: int, k: int) -> None:
    if len(out) > rows:
        out[rows:].fill_(-1)
    if out.shape[1] > k:
        out[:rows, k:].fill_(-1)
