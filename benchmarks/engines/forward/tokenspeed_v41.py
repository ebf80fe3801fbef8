"""TokenSpeed's ``dsv41.index_topk``: DeepSeek-V4.1's index layers, decode and prefill.

The op is called as ``select_global`` of TokenSpeed's backend calls it. The plugin's answers, as
ordered lists, must equal stable sorts of the scores of all keys.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from kits.engine_tensors import ARENA, PAGE, plane
from kits.oracles import fp8_keys
from kits.tokenspeed_v41 import BLOCKS, HEADS, LAYERS, PIECE, V41, K, OnGpu

import dsv4_plugin as ops
from benchmarks.engines.forward.parts import agreement, measured
from benchmarks.engines.forward.variants import OFF
from benchmarks.engines.kernels.cells import backend_for, recall
from benchmarks.engines.part import Row
from dsv4_plugin.cli.bench.cells import DIRTY
from dsv4_plugin.engines.shared.candidates import WHOLE_COLUMNS

__all__ = ["MODE", "Layers"]

MODE = "dsv41_index_topk"
CAPACITY = {"cuda": 2048, "cpu": BLOCKS}  # candidate blocks a row
DECODE = {
    "cuda": [(r, c << 10) for c in (16, 64, 256, 1024) for r in (1, 4, 16, 64)],
    "cpu": [(2, 1500)],
}
PREFILL = {"cuda": [(1024, 8 << 10), (1024, 32 << 10), (1024, 128 << 10), (256, 1 << 20)],
           "cpu": [(3, 1300)]}  # fmt: skip
POOL = 1 << 18  # pages, 2.4 GB: keys come from memory
TRUTH_ROWS = 2  # rows whose scores are computed in float64
LAUNCHES = 1 << 22  # positions in a graph of a call's launches, at most --launches of them


@dataclasses.dataclass
class _Step:
    """The rows of a step: queries of two layers, and the keys of both."""

    q: list[torch.Tensor]
    weights: list[torch.Tensor]
    cache: torch.Tensor
    table: torch.Tensor  # rows of no stride in prefill
    visible: torch.Tensor

    @classmethod
    def make(cls, rows: int, columns: int, prefill: bool, device: str) -> _Step:
        """Draw the tensors; every decode row and the last prefill row see ``columns`` keys."""
        g = torch.Generator(device=device).manual_seed(rows + columns)
        cache, pages = _pool(device), -(-columns // PAGE)
        order = [torch.randperm(len(cache) - 1, generator=g, device=device)[:pages]
                 for _ in range(1 if prefill else rows)]  # fmt: skip
        table = 1 + torch.stack(order).int()
        visible = torch.full((rows,), columns, dtype=torch.int32, device=device)
        if prefill:
            table = table.expand(rows, -1)
            visible -= torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device)
        draw = functools.partial(torch.randn, generator=g, device=device)
        return cls(
            [draw(rows, HEADS, 128).bfloat16() for _ in range(2)],
            [draw(rows, HEADS).mul(0.02).bfloat16() for _ in range(2)],
            cache, table, visible,
        )  # fmt: skip

    @property
    def prefill(self) -> bool:
        """Whether all rows are of one request."""
        return self.table.stride(0) == 0 and len(self.table) > 1


@functools.lru_cache(maxsize=1)
def _pool(device: str) -> torch.Tensor:
    pages = POOL if device == "cuda" else 64
    flat = plane(pages, ARENA, device)
    return flat.as_strided((pages, PAGE, 132), (flat.stride(0), 132, 1))


class Layers:
    """The cells of V4.1 for the driver's ``Side``, which loads and unloads the plugin."""

    def __init__(self, engine: Any, arguments: argparse.Namespace) -> None:
        self.v41, self.engine, self.arguments = V41(engine), engine, arguments
        self.device, self.held = arguments.device, CAPACITY[arguments.device]
        self.off: dict[str, torch.Tensor] = {}
        self._step: tuple[Any, _Step] | None = None

    def cells(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each cell, and the function that runs it for a variant."""
        arguments = self.arguments
        decode = [(False, *s) for s in arguments.shapes or DECODE[self.device]]
        prefill = [(True, *s) for s in arguments.prefill or PREFILL[self.device]]
        for phase, rows, columns in (*decode, *prefill):
            for layer in LAYERS:
                name = f"v41 {layer} {'prefill' if phase else 'decode'} {rows}x{columns}"
                yield name, functools.partial(self._run, name, layer, phase, rows, columns)

    def _step_of(self, rows: int, columns: int, prefill: bool) -> _Step:
        shape = rows, columns, prefill
        if self._step is None or self._step[0] != shape:
            self._step = None
            self._step = shape, _Step.make(rows, columns, prefill, self.device)
        return self._step[1]

    def _run(
        self, name: str, layer: str, prefill: bool, rows: int, columns: int, variant: str
    ) -> list[Row]:
        t, consumer = self._step_of(rows, columns, prefill), layer == "consumer"
        q, weights = t.q[consumer], t.weights[consumer]
        width = t.table.shape[1] * PAGE
        held = min(self.held, width // PIECE) if layer == "source" else 0
        candidates = self._candidates(t) if consumer else None
        posed = q.as_subclass(OnGpu) if self.device == "cpu" else q
        make = functools.partial(torch.empty, dtype=torch.int32, device=self.device)
        out = make(rows, K), make(rows), make(rows, held), make(rows)

        def call() -> None:
            self.v41.facade.index_topk(
                posed, weights, t.cache, t.table, t.visible, candidates, K, held, PIECE,
                1024 if prefill else 256, 256, None, out, None,
            )  # fmt: skip

        def soil() -> None:
            for tensor in out:
                tensor.fill_(DIRTY)

        def judge(found: torch.Tensor) -> Row:
            row: Row = {"kernel": self.engine.chosen(MODE)}
            by_plugin = row["kernel"].startswith("dsv4_plugin")
            row |= recall(*self._truth(t, q, weights, candidates), out[0])
            row["right"] = by_plugin != (variant == OFF)
            if by_plugin:
                dtype = {"b": torch.bfloat16, "f": torch.float32}[variant[0]]
                want = self._expected(t, consumer, dtype, candidates, held)
                same = [torch.equal(a, b) for a, b in zip(out, want, strict=True)]
                row["exact"] = all(same)
                row["right"] &= row["exact"]
                if not row["exact"]:
                    row["why"] = f"rows, lengths, blocks, block lengths are right: {same}"
            return row

        mine = copy.copy(self.arguments)
        mine.launches = max(2, min(mine.launches, LAUNCHES // (rows * columns)))
        row, found = measured(
            call, soil, lambda: torch.cat((out[0], out[2]), 1), judge, mine, plugin=variant != OFF
        )
        if variant == OFF:
            self.off[name] = found
        elif name in self.off:
            by_engine = self.off[name]
            row |= agreement(by_engine[:, :K], found[:, :K])
            if held:
                shared = agreement(by_engine[:, K:], found[:, K:])
                row["agreement_blocks"] = shared["agreement"]
        return [{"part": name, "variant": variant, "launches": mine.launches, **row}]

    # --- what is right -----------------------------------------------------------------------

    def _scores(self, t: _Step, which: int, dtype: torch.dtype, whole: bool) -> torch.Tensor:
        """Return the plugin's scores of all keys, -inf where a row does not see one."""
        q, weights = self.v41.triton.quantize_index_queries(t.q[which], t.weights[which])
        out = torch.full((len(q), t.table.shape[1] * PAGE), -torch.inf, dtype=dtype,
                         device=self.device)  # fmt: skip
        backend = backend_for(self.device)
        if whole:
            ends = torch.tensor([0, out.shape[1]], dtype=torch.int32, device=self.device)
            values, scales = ops.gather_indexer_cache(
                t.cache, t.table[:1], ends, block_size=PAGE, backend=backend
            )
            starts = torch.zeros_like(t.visible)
            ops.ragged_logits(
                q, values, scales, weights, starts, t.visible, out=out, backend=backend
            )
        else:
            ops.paged_logits(
                q[:, None], t.cache, weights, t.visible, t.table, block_size=PAGE, out=out,
                backend=backend,
            )  # fmt: skip
        return out + 0.0  # of zeros of both signs

    def _candidates(self, t: _Step) -> torch.Tensor:
        """Return candidate blocks by a stable sort: those of the first queries."""
        scores = self._scores(t, 0, torch.bfloat16, t.prefill)
        return _blocks(scores, t.visible, min(self.held, scores.shape[1] // PIECE))[0]

    def _expected(
        self, t: _Step, which: int, dtype: torch.dtype, candidates: torch.Tensor | None, held: int
    ) -> tuple[torch.Tensor, ...]:
        columns = t.table.shape[1] * PAGE
        few = candidates is not None and columns > WHOLE_COLUMNS
        scores = self._scores(t, which, dtype, t.prefill and not few)
        seen = t.visible
        if candidates is not None:
            scores.masked_fill_(~_marked(candidates, scores.shape[1]), -torch.inf)
            seen = (scores > -torch.inf).sum(1)
        rows = _best(scores, seen, K)
        blocks, counts = _blocks(scores, t.visible, held)
        return rows, (rows >= 0).sum(1).int(), blocks, counts

    def _truth(
        self, t: _Step, q: torch.Tensor, weights: torch.Tensor, candidates: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Return the float64 scores of some rows, of queries that are not rounded."""
        rows = torch.linspace(0, len(q) - 1, min(len(q), TRUTH_ROWS)).long().unique().tolist()
        found = []
        for row in rows:
            at = torch.arange(int(t.visible[row]), device=self.device)
            flat = t.cache.as_strided((len(t.cache), PAGE * 132), (t.cache.stride(0), 1))
            keys = fp8_keys(flat, t.table[row].long()[at // PAGE], at % PAGE, PAGE, 128)[2]
            scores = at.new_empty(len(at), dtype=torch.float64)
            for part in at.split(1 << 18):
                dots = (q[row].double() @ keys[part].double().T).clamp_(min=0)
                scores[part] = weights[row].double() @ dots
            if candidates is not None:
                scores.masked_fill_(~_marked(candidates[row][None], len(at))[0], -torch.inf)
            found.append(scores)
        return found, rows


def _marked(candidates: torch.Tensor, columns: int) -> torch.Tensor:
    """Bool [rows, columns]: the keys of the candidates."""
    blocks = -(-columns // PIECE)
    marks = torch.zeros(len(candidates), blocks + 1, dtype=torch.bool, device=candidates.device)
    marks.scatter_(1, candidates.where(candidates >= 0, blocks).long(), True)
    return marks[:, :blocks].repeat_interleave(PIECE, 1)[:, :columns]


def _best(scores: torch.Tensor, seen: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ``k`` best of the ``seen`` best columns of every row, ascending, then -1."""
    parts = []
    for some, n in zip(scores.split(64), seen.split(64), strict=True):
        order = some.sort(dim=1, descending=True, stable=True).indices[:, :k]
        last = scores.shape[1]
        rank = torch.arange(order.shape[1], device=scores.device)
        order = order.masked_fill(rank >= n[:, None], last).sort(dim=1).values
        order = order.masked_fill(order == last, -1).int()
        parts.append(torch.nn.functional.pad(order, (0, k - order.shape[1]), value=-1))
    return torch.cat(parts)


def _blocks(
    scores: torch.Tensor, visible: torch.Tensor, held: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the candidate blocks of every row, and how many it has."""
    best = scores.unflatten(1, (-1, PIECE)).amax(2)
    newest = torch.div(visible - 1, PIECE, rounding_mode="floor").clamp_min(0)
    best.scatter_(1, newest.long()[:, None], torch.inf)
    blocks = _best(best, torch.div(visible + PIECE - 1, PIECE, rounding_mode="floor"), held)
    return blocks, (blocks >= 0).sum(1).int()
