"""Calls the index logits and the chain for the cases of :mod:`.logits`, and checks the answers.

The run compares scores with float64 (:mod:`kits.exact_scores`), and, bit for bit, with the scores
of rows that are computed alone and in a reversed batch. The chain must give what the top-k gives on
the paged logits. What lies past a row's length in ``out`` must stay as it was. Keys that no row
sees may be NaN. Guard zones lie around all inputs and outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from kits import exact_scores
from kits.inputs import FP4_SCALES

from dsv4_plugin.cli.checks import exact
from dsv4_plugin.cli.checks.oracles import same_bits
from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.ops.dispatch import Call, choose
from tests.fuzz.logits import DTYPES, PagedLogitsCase, RaggedLogitsCase, SelectCase
from tests.fuzz.tensors import (
    Parts,
    Requests,
    Tensors,
    bits,
    check_form,
    check_indices,
    dirty,
    page_view,
    raise_wrong,
    run_parts,
)

__all__ = ["problem_of", "run"]

_NOWHERE = (-1, (1 << 31) - 1, -(1 << 31))  # no pages of any cache

# ---- The tensors of a case -----------------------------------------------------------------------


class _Problem(Tensors):
    """The tensors of a case that scores keys.

    The two kinds of calls have in common: ``arguments()`` and ``keywords()`` of the call, its
    result left out; ``take(rows, next_n)``, the arguments of a call of some rows;
    ``exact(columns)``, scores and magnitudes of so many columns at least; ``counts(columns)``, how
    many scores each row has in a result of so many.
    """

    rows: int
    next_n: int
    keys: torch.Tensor  # where keys are read

    def _queries(self) -> None:
        case = self.case
        self.fp4 = bool(getattr(case, "fp4", 0))
        size = case.heads * case.head * (2 if self.fp4 else 1)
        self.bytes = self.guarded("q", self.rows, size, torch.uint8, stride=size + case.q_gap)
        self.weights = self.guarded(
            "weights", self.rows, case.heads, torch.bfloat16 if self.fp4 else torch.float32,
            stride=case.heads + case.w_gap,
        )  # fmt: skip

    def scratch(self) -> torch.Tensor | None:
        """Make the tensor that scores are written to; None if none is given."""
        case = self.case
        if case.out < 0:
            return None
        columns = case.out or case.out_columns
        return self.output(
            "out", self.rows, columns, DTYPES[case.dtype],
            stride=columns + case.gap, offset=case.offset,
        )  # fmt: skip

    def _begin(self, step: int) -> tuple[int, torch.Generator, random.Random]:
        """Draw the queries and weights of a step; returns what the rest of it is drawn from."""
        case, seed = self.case, self.case.seed + step
        r = random.Random(f"content {seed}")
        g = torch.Generator(device=self.device).manual_seed(seed)
        rows, first = getattr(case, case.unit) * case.each, case.kept[0] * case.each
        drawn = exact.codes((rows, case.heads * case.head), case.content, g)
        weights = torch.randn(rows, case.heads, generator=g, device=self.device) * 0.1
        if case.nan:
            nan = r.randrange(rows), r.randrange(drawn.shape[1])
            if self.fp4:
                drawn[nan] = torch.nan
            else:
                drawn.view(torch.uint8)[nan] = 0x7F
            weights[r.randrange(rows), r.randrange(case.heads)] = torch.nan
        self.bytes.copy_(drawn.view(torch.uint8)[first : first + self.rows])
        self.weights.copy_(weights[first : first + self.rows])
        return seed, g, r

    def _draw_keys(self, g: torch.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw bytes and scales of keys: powers of two, as engines write them, and odd ones."""
        some: Any = {"generator": g, "device": self.device}
        if self.fp4:
            values, scales = self.case.key_bytes
            low, high = FP4_SCALES[self.case.content]
            codes = torch.randint(0, 256, (n, values), **some).to(torch.uint8)
            return codes, torch.randint(low, high + 1, (n, scales), **some).to(torch.uint8)
        codes = exact.codes((n, self.case.head), self.case.kind, g).view(torch.uint8)
        scale = torch.exp2(torch.randint(-12, 4, (n,), **some).float())
        odd = torch.rand(n, **some) < 0.5
        return codes, scale * torch.rand(n, **some).where(odd, 1.0)

    def typed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return bytes as they are handed over."""
        if self.fp4:
            return codes.view(torch.bfloat16)
        return codes if self.case.codes else codes.view(torch.float8_e4m3fn)

    def served(self) -> str:
        """Return the implementation that the case calls."""
        case = self.case
        call = Call(
            "paged_logits" if case.op == "select" else case.op,
            self.bytes.device, DTYPES[case.dtype], head_dim=case.head, heads=case.heads,
            block_size=getattr(case, "block", 64), piece=getattr(case, "piece", 8),
            candidates=getattr(case, "held", 0), fp4=self.fp4,
            alignment=alignment(self.keys, self.bytes),
        )  # fmt: skip
        return choose(call, case.backend)


class _PagedProblem(_Problem, Requests):
    def __init__(self, case: PagedLogitsCase, device: str) -> None:
        super().__init__(case, device)
        self._queries()
        size = case.block * sum(case.key_bytes)
        self.pages = self.guarded(
            "the cache", case.pages, size, torch.uint8, stride=size + case.pad
        )
        self.keys = self.pages
        self.cache = page_view(self.pages, case.view, case.block)
        self.table = self.guarded(
            "block_table", self.batch, case.width, torch.int32, stride=case.width + case.table_gap
        )
        self.page_table: torch.Tensor | None = None
        if isinstance(case, SelectCase) and case.page:
            pages = -(-case.columns // case.page)
            own = case.page > 0
            self.page_table = self.table_of("page_table", pages) if own else self.table
        self.fill(0)

    def fill(self, step: int) -> None:
        case = self.case
        seed, g, r = self._begin(step)
        less = None
        if case.loose:
            shape = (case.requests, case.next_n)
            less = torch.randint(0, 71, shape, generator=torch.Generator().manual_seed(seed))
        self.fill_lengths(step, less)
        self._draw_table(torch.Generator().manual_seed(seed))
        value_bytes, scale_bytes = case.key_bytes
        split = case.block * value_bytes
        codes, scale = self._draw_keys(g, case.pages * case.block)
        self.pages[:, :split].copy_(codes.view(case.pages, split))
        some = scale.view(torch.uint8).reshape(case.pages, scale_bytes * case.block)
        self.pages[:, split:].copy_(some)
        values = self.pages[:, :split].unflatten(1, (case.block, value_bytes))
        scales = self.pages[:, split:].unflatten(1, (case.block, scale_bytes))
        if case.nan and case.pages:
            at = r.randrange(case.pages), r.randrange(case.block)
            values[at][r.randrange(value_bytes)] = 0xFF
            scales[r.randrange(case.pages), r.randrange(case.block)] = 0xFF
        if case.poison and case.pages:
            unseen = torch.arange(case.block, device=self.device) >= self._seen()[:, None]
            values.masked_fill_(unseen[:, :, None], 0x7F)
            scales.masked_fill_(unseen[:, :, None], 0xFF)
        if self.page_table is not None and self.page_table is not self.table:
            self.fill_table(self.page_table, torch.Generator().manual_seed(seed))
        self.remember(step)

    def _needed(self) -> torch.Tensor:
        """Return how many keys of each entry of the table some row sees."""
        case = self.case
        n = self.counts(case.limit)
        most = n.view(self.batch, self.next_n).amax(1)
        first = torch.arange(case.width, device=self.device) * case.block
        return (most[:, None] - first).clamp(0, case.block)

    def _seen(self) -> torch.Tensor:
        """Return how many keys of each page some row sees."""
        page = self.table.long()
        there = (page >= 0) & (page < self.case.pages)
        seen = torch.zeros(self.case.pages, dtype=torch.int64, device=self.device)
        return seen.scatter_reduce_(0, page[there], self._needed()[there], "amax")

    def _draw_table(self, g: torch.Generator) -> None:
        case = self.case
        pages, shape = max(case.pages, 1), (case.requests, case.width)
        at = torch.arange(case.requests * case.width).view(shape) % pages
        if case.table == "shuffled":
            at = torch.randperm(pages, generator=g)[at]
        elif case.table != "ordered":
            at = torch.randint(0, pages, shape, generator=g)
        if case.table == "same":
            at = at[:1].expand(shape).clone()
        if case.gone:
            none = torch.tensor((*_NOWHERE, case.pages, case.pages + 5))
            drawn = none[torch.randint(0, len(none), shape, generator=g)]
            at = torch.where(torch.rand(shape, generator=g) < 0.2, drawn, at)
        self.table.copy_(at[case.kept[0] :][: self.batch])
        if case.padding != "valid":
            nowhere = _NOWHERE[("none", "far", "low").index(case.padding)]
            self.table.masked_fill_(self._needed() == 0, nowhere)

    def _typed_queries(self) -> torch.Tensor:
        case, stride = self.case, self.bytes.stride(0)
        size = self.bytes.shape[1] // case.heads
        shape = self.batch, case.next_n, case.heads, size
        steps = case.next_n * stride, stride, size, 1
        q = self.bytes.as_strided(shape, steps, self.bytes.storage_offset())
        return self.typed(q[:, 0] if case.flat else q)

    def arguments(self) -> tuple[Any, ...]:
        return self._typed_queries(), self.cache, self.weights, self.lengths, self.table

    def keywords(self) -> dict[str, Any]:
        return {"block_size": self.case.block}

    def take(self, rows: torch.Tensor, next_n: int) -> tuple[Any, ...]:
        q = self.bytes[rows].unflatten(1, (self.case.heads, -1)).unflatten(0, (-1, next_n))
        table = self.table[rows[::next_n] // self.next_n]
        return self.typed(q), self.cache, self.weights[rows], self.per_row[rows], table

    def exact(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        q = self.typed(self.bytes.contiguous())
        q = q.view(self.batch, case.next_n, case.heads, case.head)
        return exact_scores.paged(q, self.pages, self.weights, self.table, case.block, columns)

    def counts(self, columns: int) -> torch.Tensor:
        return self.per_row.clamp(0, columns)


class _RaggedProblem(_Problem):
    def __init__(self, case: RaggedLogitsCase, device: str) -> None:
        super().__init__(case, device)
        self.batch = self.rows = case.kept[1]
        self.next_n = 1
        self._queries()
        keys, size = case.keys, case.keys * case.head
        held = self.guarded("k", 1, size, torch.uint8, offset=case.k_offset)
        self.k = self.keys = held.view(keys, case.head)
        self.scale = self.guarded("k_scale", 1, keys, torch.float32)[0]
        self.starts, self.ends = (
            self.guarded(name, 1, self.rows, self.index)[0] for name in ("row_starts", "row_ends")
        )
        self.fill(0)

    def fill(self, step: int) -> None:
        case = self.case
        _, g, r = self._begin(step)
        starts, ends = case.windows(step)
        self.starts.copy_(torch.tensor(starts))
        self.ends.copy_(torch.tensor(ends))
        codes, scale = self._draw_keys(g, case.keys)
        self.k.copy_(codes)
        self.scale.copy_(scale)
        if case.nan and case.keys:
            self.k[r.randrange(case.keys), r.randrange(case.head)] = 0xFF
            self.scale[r.randrange(case.keys)] = torch.nan
        if case.poison and case.keys:
            n = self.counts(case.limit)
            edge = torch.zeros(case.keys + 1, dtype=torch.int64, device=self.device)
            begin = self.starts.long()
            end = (begin + n).clamp(0, case.keys)
            one = torch.ones_like(n)
            edge.scatter_add_(0, begin.clamp(0, case.keys), one).scatter_add_(0, end, -one)
            unseen = edge.cumsum(0)[:-1] == 0
            self.k.masked_fill_(unseen[:, None], 0x7F)
            self.scale.masked_fill_(unseen, torch.nan)
        self.remember(step)

    def keywords(self) -> dict[str, Any]:
        return {"one_request": True} if self.case.one_request else {}

    def arguments(self) -> tuple[Any, ...]:
        return self._of(self.bytes, self.weights, self.starts, self.ends)

    def _of(self, codes: torch.Tensor, *more: torch.Tensor) -> tuple[Any, ...]:
        q = self.typed(codes.unflatten(1, (self.case.heads, self.case.head)))
        return q, self.typed(self.k), self.scale, *more

    def take(self, rows: torch.Tensor, next_n: int) -> tuple[Any, ...]:
        return self._of(
            self.bytes[rows], *(x[rows] for x in (self.weights, self.starts, self.ends))
        )

    def exact(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.bytes.contiguous().unflatten(1, (self.case.heads, self.case.head))
        windows = self.starts, self.ends
        return exact_scores.ragged(q, self.k, self.scale, self.weights, *windows, columns)[:2]

    def counts(self, columns: int) -> torch.Tensor:
        return (self.ends.long() - self.starts.long()).clamp(0, columns)


# ---- Running and checking ------------------------------------------------------------------------


def problem_of(case: Any, device: str) -> Any:
    """Make the tensors of a case."""
    kind = _RaggedProblem if isinstance(case, RaggedLogitsCase) else _PagedProblem
    return kind(case, device)


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = problem_of(case, device)
    run_parts(problem, (_select if isinstance(case, SelectCase) else _logits)(problem, op))


def _logits(problem: Any, op: Callable[..., Any]) -> Parts:
    case = problem.case
    dtype = DTYPES[case.dtype]
    out = problem.scratch()
    shape = problem.rows, case.columns if out is None else out.shape[1]

    def call() -> torch.Tensor:
        return op(
            *problem.arguments(), dtype=dtype, out=out, backend=case.backend, **problem.keywords()
        )

    def check(got: torch.Tensor) -> None:
        check_form(got, shape, dtype)
        n = problem.counts(shape[1])
        inside = torch.arange(shape[1], device=got.device) < n[:, None]
        if out is not None:
            untouched = dirty(torch.empty_like(got, memory_format=torch.contiguous_format))
            changed = ~inside & (bits(got) != bits(untouched))
            raise_wrong(changed, "a score past a row's length was written")
        _against_float64(problem, got, inside)
        _against_itself(problem, op, got, inside)

    return call, (), check


def _against_float64(problem: Any, got: torch.Tensor, inside: torch.Tensor) -> None:
    columns = got.shape[1]
    score, size = problem.exact(columns)
    served = problem.served()
    wrong, low, high = exact.outside(
        got, score[:, :columns], size[:, :columns],
        exact.TOLERANCE[served, problem.case.content],
    )  # fmt: skip

    def values(row: int, column: int) -> str:
        ends = float(low[row, column]), float(high[row, column])
        return f"{float(got[row, column])}, not {ends[0]} to {ends[1]}"

    raise_wrong(wrong & inside, "a score is not the one of float64", values)


def _against_itself(
    problem: Any, op: Callable[..., Any], got: torch.Tensor, inside: torch.Tensor
) -> None:
    """Hold rows computed alone, and the batch reversed, against the scores, bit for bit."""
    case, rows = problem.case, problem.rows
    more = {"backend": problem.served(), **problem.keywords()}

    def again(some: torch.Tensor, next_n: int) -> torch.Tensor:
        fresh = torch.zeros(len(some), got.shape[1], dtype=got.dtype, device=got.device)
        return op(*problem.take(some, next_n), dtype=got.dtype, out=fresh, **more)

    every = torch.arange(rows, device=got.device)
    if problem.batch > 1:
        order = every.view(-1, problem.next_n).flip(0).reshape(-1)
        turned = again(order, problem.next_n)[order]  # reversing twice is no change
        raise_wrong(inside & ~same_bits(turned, got), "another score in a reversed batch")
    if rows > 1:
        drawn = random.Random(f"alone {case.seed}").randrange(rows)
        some = sorted({0, drawn, rows - 1})
        alone = torch.cat([again(every[row : row + 1], 1) for row in some])
        different = torch.zeros_like(inside)
        different[some] = ~same_bits(alone, got[some])
        raise_wrong(inside & different, "another score where a row is alone")


def _select(problem: Any, op: Callable[..., Any]) -> Parts:
    case = problem.case
    dtype = DTYPES[case.dtype]
    scratch = problem.scratch()
    rows, k = problem.rows, case.k
    columns = min(case.columns, case.columns if scratch is None else scratch.shape[1])

    def indices(name: str) -> torch.Tensor:
        stride = k + max(0, case.picked)
        return problem.output(name, rows, k, torch.int32, stride=stride)

    out = indices("the indices") if case.picked >= 0 or case.graph else None
    raw = indices("out_raw") if case.raw else None
    paging = {
        "page_table": problem.page_table, "page_size": case.block if case.page < 0 else
        case.page or 64, "sort": bool(case.sort), "backend": case.backend,
    }  # fmt: skip

    def call() -> torch.Tensor:
        return op(
            *problem.arguments(), k, dtype=dtype, out=out, out_raw=raw, logits=scratch,
            **paging, **problem.keywords(),
        )  # fmt: skip

    def check(got: torch.Tensor) -> None:
        from dsv4_plugin import paged_logits, topk

        check_form(got, (rows, k), torch.int32)
        logits = dirty(torch.empty(rows, columns, dtype=dtype, device=got.device))
        paged_logits(*problem.arguments(), out=logits, backend=case.backend, **problem.keywords())
        check_indices(problem, logits, got if problem.page_table is None else raw)
        want_raw = None if raw is None else torch.empty_like(raw)
        want = topk(logits, problem.lengths, k, next_n=case.next_n, out_raw=want_raw, **paging)
        for name, a, b in (("an index", got, want), ("a raw index", raw, want_raw)):
            if a is not None and b is not None:
                raise_wrong(a != b, f"{name} is not that of the two ops")

    return call, (raw, scratch), check
