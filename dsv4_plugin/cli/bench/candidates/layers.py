"""What ``bench candidates`` times: each op, and the chains of a layer and of a step.

The implementation ``dsv4`` is the plugin's ops. ``full width`` does what an engine does without
them. It uses the plugin's float32 logits of all keys and the plugin's float32 top-k over the row.
Between them it masks the whole buffer, or it computes block scores and runs ``torch.topk`` over the
whole buffer (:mod:`.full_width`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import dsv4_plugin as ops
from dsv4_plugin.cli.bench.candidates import full_width
from dsv4_plugin.cli.bench.candidates.problem import PIECE, Group, Pool, Prefill, candidate_lists
from dsv4_plugin.cli.checks import candidate_oracles as oracle
from dsv4_plugin.cli.checks.oracles import same_bits
from dsv4_plugin.ops.logits import new_logits

__all__ = ["FullWidth", "PluginOps", "PrefillFullWidth", "PrefillPluginOps"]

HALF_LAYERS, CONSUMERS = 3, 4  # layers of ratio 2, and layers that use candidates

Call = Callable[[Group], None]


class PluginOps:
    """The plugin's ops on ``rows`` rows of ``columns`` keys, in buffers of the pool's width.

    ``next_n``: rows per request; ``width``: of the buffers, if it is not the pool's.
    """

    name = "dsv4"

    def __init__(
        self, pool: Pool, rows: int, columns: int, held: int, k: int, dtype: torch.dtype,
        backend: str, next_n: int = 1, width: int = 0,
    ) -> None:  # fmt: skip
        self.pool, self.rows, self.columns, self.k, self.backend = pool, rows, columns, k, backend
        device = torch.device(pool.device)
        self.held, self.dtype = held, dtype
        self.lengths = torch.full((rows,), columns, dtype=torch.int32, device=device)
        self.half_lengths = self.lengths // 2
        width = width or pool.width
        self.dense = new_logits(rows, width, dtype, device)
        self.maxima = new_logits(rows, width // PIECE, dtype, device)
        self.scored = new_logits(rows, held * PIECE, dtype, device)
        self.chosen = torch.empty(rows, held, dtype=torch.int32, device=device)
        self.out = torch.empty(rows, k, dtype=torch.int32, device=device)
        self.lists = {}
        self.fixed = candidate_lists(rows, columns, held, 1, pool.device)
        self.groups = pool.groups(rows, next_n)
        for i, group in enumerate(self.groups):
            self.lists[id(group)] = candidate_lists(rows, columns, held, i, pool.device)

    @property
    def ops(self) -> dict[str, Call]:
        """Return what is timed, by name."""
        return {
            "paged_logits": self.paged_logits,
            "block_maxima": lambda g: self.block_maxima(g, self.dense),
            "block_maxima alone": lambda g: self.block_maxima(g, None),
            "select_blocks": lambda g: self.select_blocks(),
            "candidate_logits": self.candidate_logits,
            "select_candidates": self.select_candidates,
            "consumer": self.consumer,
            "source": self.source,
            "source by candidates": self.source_by_candidates,
            "step": self.step,
        }

    def paged_logits(self, g: Group) -> None:
        """Score all keys."""
        ops.paged_logits(g.q, self.pool.cache, g.weights, self.lengths, g.table, out=self.dense,
                          backend=self.backend)  # fmt: skip

    def block_maxima(self, g: Group, logits: torch.Tensor | None) -> None:
        """Score the blocks, with or without the scores of all keys."""
        ops.block_maxima(g.q, self.pool.cache, g.weights, self.lengths, g.table, out=self.maxima,
                          logits=logits, backend=self.backend)  # fmt: skip

    def select_blocks(self) -> None:
        """Select the best blocks."""
        ops.select_blocks(self.maxima, self.lengths, self.held, out=self.chosen,
                           backend=self.backend)  # fmt: skip

    def candidate_logits(self, g: Group) -> None:
        """Score the keys of the candidates."""
        ops.candidate_logits(g.q, self.pool.cache, g.weights, self.lists[id(g)], self.lengths,
                              g.table, out=self.scored, backend=self.backend)  # fmt: skip

    def select_candidates(self, g: Group) -> None:
        """Select the best of these keys."""
        ops.select_candidates(self.scored, self.lists[id(g)], self.lengths, self.k, out=self.out,
                               backend=self.backend)  # fmt: skip

    def _among(self, g: Group, candidates: torch.Tensor) -> None:
        ops.candidate_select(
            g.q, self.pool.cache, g.weights, candidates, self.lengths, g.table, self.k,
            dtype=self.dtype, out=self.out, backend=self.backend,
        )  # fmt: skip

    def consumer(self, g: Group) -> None:
        """Run a layer that uses candidates."""
        self._among(g, self.lists[id(g)])

    def source(self, g: Group) -> None:
        """Run the layer that chooses the candidates."""
        self.block_maxima(g, self.dense)
        self.select_blocks()
        ops.topk(self.dense, self.lengths, self.k, out=self.out, backend=self.backend)

    def source_by_candidates(self, g: Group) -> None:
        """Run it without scores of all keys: the best k keys lie in the best k + 1 blocks."""
        self.block_maxima(g, None)
        self.select_blocks()
        self._among(g, self.chosen)

    def step(self, g: Group) -> None:
        """Run all index layers of a decode step."""
        for _ in range(HALF_LAYERS):
            ops.paged_logits(
                g.q, self.pool.half_cache, g.weights, self.half_lengths, g.half_table,
                block_size=self.pool.form.half_page, out=self.dense, backend=self.backend,
            )  # fmt: skip
            ops.topk(self.dense, self.half_lengths, self.k, out=self.out, backend=self.backend)
        self.source(g)
        for _ in range(CONSUMERS):
            self._among(g, self.chosen)

    def why_wrong(self) -> str:
        """Return what the oracles find wrong with the answers, or an empty string."""
        g = self.groups[0]
        self.dense.fill_(-torch.inf)
        self.paged_logits(g)
        scores = self.dense.clone()
        n, lists = self.lengths, self.lists[id(g)]
        self.dense.fill_(torch.nan)
        self.block_maxima(g, self.dense)
        if not torch.equal(self.dense[:, : self.columns], scores[:, : self.columns]):
            return "block_maxima: other scores than paged_logits"
        blocks = -(-self.columns // PIECE)
        want = oracle.maxima(scores[:, : self.columns], n)
        if not torch.equal(self.maxima[:, :blocks], want):
            return "block_maxima: other maxima"
        self.maxima.fill_(torch.nan)
        self.source_by_candidates(g)
        if not torch.equal(self.maxima[:, :blocks], want):
            return "block_maxima alone: other maxima"
        if not torch.equal(self.chosen, oracle.blocks(want, n, self.held)):
            return "select_blocks: other blocks"
        by_candidates = self.out.clone()
        self.source(g)
        if not torch.equal(self.out, by_candidates):
            return "source by candidates: other indices"
        self.scored.fill_(torch.nan)
        self.candidate_logits(g)
        masked = oracle.scores(scores, lists, n)
        if not bool(same_bits(self.scored, masked).all()):
            return "candidate_logits: other scores than paged_logits"
        best = oracle.selection(masked, lists, n, self.k)
        for op, call in (
            ("select_candidates", self.select_candidates),
            ("consumer", self.consumer),
        ):
            self.out.fill_(-7)
            call(g)
            if not torch.equal(self.out, best):
                return f"{op}: other indices"
        return ""


class FullWidth:
    """The same layers without the candidate ops, in float32."""

    name = "full width"

    def __init__(self, layers: PluginOps) -> None:
        self.of = layers
        device = torch.device(layers.pool.device)
        rows, width = layers.rows, layers.pool.width
        self.dense = new_logits(rows, width, torch.float32, device)
        self.dense.zero_()
        self.keep = torch.zeros(rows, width // PIECE + 1, dtype=torch.uint8, device=device)
        self.best = torch.empty(rows, width // PIECE, device=device)
        self.chosen = torch.empty_like(layers.chosen)
        self.out = torch.empty_like(layers.out)
        self.groups = layers.groups

    @property
    def ops(self) -> dict[str, Call]:
        """Return what is timed, by name."""
        return {
            "paged_logits": self.paged_logits,
            "mask": lambda g: self.mask(self.of.fixed),
            "block selection": lambda g: self.block_selection(),
            "consumer": lambda g: self.consumer(g, self.of.lists[id(g)]),
            "source": self.source,
            "step": self.step,
        }

    def paged_logits(self, g: Group) -> None:
        """Score all keys."""
        of = self.of
        ops.paged_logits(g.q, of.pool.cache, g.weights, of.lengths, g.table, out=self.dense,
                          backend=of.backend)  # fmt: skip

    def mask(self, candidates: torch.Tensor) -> None:
        """Write -inf outside the candidates, in the whole buffer."""
        full_width.mask(self.dense, candidates, self.keep)

    def block_selection(self) -> None:
        """Select the best blocks in the whole buffer."""
        full_width.block_scores(self.dense, self.of.lengths, self.best)
        value, index = self.best.topk(self.chosen.shape[1], dim=1)
        self.chosen.copy_(torch.where(value == -torch.inf, -1, index))

    def _topk(self, lengths: torch.Tensor) -> None:
        ops.topk(self.dense, lengths, self.of.k, out=self.out, backend=self.of.backend)

    def consumer(self, g: Group, candidates: torch.Tensor) -> None:
        """Run a layer that uses candidates."""
        self.paged_logits(g)
        self.mask(candidates)
        self._topk(self.of.lengths)

    def source(self, g: Group) -> None:
        """Run the layer that chooses the candidates."""
        self.paged_logits(g)
        self.block_selection()
        self._topk(self.of.lengths)

    def step(self, g: Group) -> None:
        """Run all index layers of a decode step."""
        of = self.of
        for _ in range(HALF_LAYERS):
            ops.paged_logits(
                g.q, of.pool.half_cache, g.weights, of.half_lengths, g.half_table,
                block_size=of.pool.form.half_page, out=self.dense, backend=of.backend,
            )  # fmt: skip
            self._topk(of.half_lengths)
        self.source(g)
        for _ in range(CONSUMERS):
            self.consumer(g, self.chosen)

    def why_wrong(self) -> str:
        """Return what is wrong with the answers, or an empty string; for float32 only."""
        g = self.groups[0]
        self.source(g)
        self.of.source(g)
        if not torch.equal(self.out, self.of.out):
            return "source: other indices than those of the plugin in float32"
        of = oracle.maxima(self.dense[:, : self.of.columns], self.of.lengths)
        full, plugin = (
            of.gather(1, x.clamp(min=0).long()).masked_fill(x < 0, -torch.inf).sort(1).values
            for x in (self.chosen, self.of.chosen)
        )
        if not torch.equal(full, plugin):  # up to ties
            return "source: other blocks than those of the plugin in float32"
        self.consumer(g, self.of.lists[id(g)])
        self.of.consumer(g)
        if not torch.equal(self.out, self.of.out):
            return "consumer: other indices than those of the plugin in float32"
        return ""


class PrefillPluginOps:
    """A chunk of prefill rows in a layer that uses candidates, by the plugin's ops."""

    name = "dsv4"

    def __init__(
        self, problem: Prefill, held: int, k: int, dtype: torch.dtype, backend: str
    ) -> None:
        device = problem.q.device
        self.p, self.k, self.backend = problem, k, backend
        self.lists = candidate_lists(problem.rows, problem.columns, held, 3, str(device))
        self.scored = new_logits(problem.rows, held * PIECE, dtype, device)
        self.out = torch.empty(problem.rows, k, dtype=torch.int32, device=device)

    @property
    def ops(self) -> dict[str, Callable[[], None]]:
        """Return what is timed, by name."""
        return {
            "candidate_logits_ragged": self.candidate_logits,
            "select_candidates": self.select_candidates,
            "consumer": self.consumer,
        }

    def candidate_logits(self) -> None:
        """Score the keys of the candidates."""
        p = self.p
        ops.candidate_logits_ragged(p.q, p.k, p.k_scale, p.weights, self.lists, p.starts, p.ends,
                                     out=self.scored, backend=self.backend)  # fmt: skip

    def select_candidates(self) -> None:
        """Select the best of these keys."""
        ops.select_candidates(self.scored, self.lists, self.p.ends, self.k, out=self.out,
                               backend=self.backend)  # fmt: skip

    def consumer(self) -> None:
        """Run both."""
        self.candidate_logits()
        self.select_candidates()


class PrefillFullWidth:
    """The same chunk by the scores of all keys, in float32."""

    name = "full width"

    def __init__(self, layers: PrefillPluginOps) -> None:
        self.of = layers
        p = layers.p
        self.dense = new_logits(p.rows, p.columns, torch.float32, p.q.device)
        blocks = p.columns // PIECE + 1
        self.keep = torch.zeros(p.rows, blocks, dtype=torch.uint8, device=p.q.device)
        self.out = torch.empty_like(layers.out)

    @property
    def ops(self) -> dict[str, Callable[[], None]]:
        """Return what is timed, by name."""
        return {"ragged_logits": self.logits, "consumer": self.consumer}

    def logits(self) -> None:
        """Score all keys."""
        p = self.of.p
        ops.ragged_logits(p.q, p.k, p.k_scale, p.weights, p.starts, p.ends, out=self.dense,
                           backend=self.of.backend)  # fmt: skip

    def consumer(self) -> None:
        """Run scores, mask and top-k."""
        self.logits()
        full_width.mask(self.dense, self.of.lists, self.keep)
        ops.topk(self.dense, self.of.p.ends, self.of.k, out=self.out, backend=self.of.backend)

    def why_wrong(self) -> str:
        """Return what is wrong with the answers, or an empty string; for float32 only."""
        self.consumer()
        self.of.consumer()
        at = self.of.lists.long().repeat_interleave(PIECE, 1) * PIECE
        at += torch.arange(at.shape[1], device=at.device) % PIECE
        there = self.of.lists.repeat_interleave(PIECE, 1) >= 0
        want = self.dense.gather(1, at.clamp(min=0)).masked_fill(~there, -torch.inf)
        if not bool(same_bits(self.of.scored, want).all()):
            return "candidate_logits_ragged: other scores than ragged_logits"
        if not torch.equal(self.out, self.of.out):
            return "consumer: other indices than those of the plugin in float32"
        return ""
