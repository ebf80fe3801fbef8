"""Random calls of the top-k: every form of it, with all arguments.

Two oracles judge an answer: :func:`~dsv4_plugin.cli.checks.oracles.faults`, which needs no
reference, and the torch reference (a stable sort if the call was of the reference itself). The run
also checks slots by the page table, the guard zones around scores and outputs, and the inputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kits.oracles import slots_of
from kits.topk_edges import CAPACITIES, EDGES, ODD_KS, plateau

from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, scores
from dsv4_plugin.cli.checks.oracles import Ranking
from dsv4_plugin.cli.checks.topk_cases import DTYPES, KS
from dsv4_plugin.ops.dispatch import Call, choose
from tests.fuzz.case import CaseError, RequestsCase, backend_of, flag, number, one_of
from tests.fuzz.tensors import (
    Parts,
    Requests,
    check_form,
    check_in,
    check_indices,
    raise_wrong,
    run_parts,
)

__all__ = ["KINDS", "PLAIN_KINDS", "POISON", "TopkCase", "run"]

MOST_COLUMNS = 8_000_000
UNGUARDED = 1 << 28  # bytes; a larger span of scores has no guards
POISON = {
    "nan": float("nan"), "inf": float("inf"), "low": float("-inf"), "big": 1e30, "none": 0.0
}  # fmt: skip
KINDS = tuple(DISTRIBUTIONS)
PLAIN_KINDS = ("all_equal", "ascending", "two_values", "normal")
_LANES = 2  # side streams of a case with `streams`


@dataclass(frozen=True)
class TopkCase(RequestsCase):
    """One call of the top-k. Requests are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "topk"
    columns: int = number(1024, 1, MOST_COLUMNS, "columns", plain=1)
    k: int = number(512, 1, 2048, "k", (*KS, *KS, *ODD_KS, range(1, 2049)), plain=1)
    dtype: str = one_of(tuple(DTYPES), "of the scores", plain=("float32",))
    kind: str = one_of(
        (*KINDS, "mixed", "plateau"), "distribution; mixed: another for every row",
        plain=PLAIN_KINDS,
    )  # fmt: skip
    starts: int = flag("row starts", (0, 0, 1))
    pages: int = number(0, 0, 4096, "columns of a page; 0: no page table")
    table: int = number(0, 0, 64, "pages that the table is too short")
    per_row: int = flag("a page table row for every row, not every request")
    raw: int = flag("out_raw beside the page table")
    counts: int = flag("out_counts")
    sort: int = flag("sorted by value")
    stride: int = number(0, 0, 1 << 33, "elements from row to row; 0: columns")
    offset: int = number(0, 0, 4096, "elements before the first row", (0, 0, 1, 3, 7, 8))
    out: int = number(
        0, -1, 4096, "columns that out is wider; -1: no out is given", (-1, 0, 0, 1, 5)
    )
    poison: str = one_of(tuple(POISON), "what lies outside of a window", plain=("none",))
    streams: int = flag("the same call on two streams at once")

    @property
    def context(self) -> int:
        """Columns of a full row."""
        return self.columns

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.graph and self.streams:
            raise CaseError("graph and streams exclude each other")
        if self.raw and not self.pages:
            raise CaseError("raw needs pages")

    def length(self, r: random.Random) -> int:
        """Draw the length of a request: near a boundary as often as not."""
        columns, k = self.columns, self.k
        near = r.choice([x for x in EDGES if x <= columns] or [columns]) + r.randint(-5, 5)
        return r.choice((columns, r.randint(-1, columns + 5), k, k + 1, near, 2 * k, 0, -1))

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> TopkCase:
        """On a GPU up to some millions of scores, elsewhere some ten thousand."""
        most = 6_000_000 if gpu else 40_000
        if r.random() < 0.12:  # many short rows, as a prefill has them
            columns = int(2 ** r.uniform(0, 11 if gpu else 7))
            requests = r.choice((1000, 2048, 8192, 16_384) if gpu else (100, 300))
        else:
            columns = _columns(r, most)
            requests = r.choice((1, 2, 5, 8, 33, 67, 133, 300))
        next_n = r.choice((1, 1, 1, 2, 3, 5))
        requests = max(1, min(requests, most // columns // next_n))
        rows = requests * next_n
        kinds = KINDS if rows > 300 else (*KINDS, "mixed", "plateau")
        pages = r.choice((0, 0, 0, 0, 0, 0, 0, 1, 7, 48, 64, 256))
        what = r.random()
        return cls.drawn(
            r, backend=backend_of(r, backends), requests=requests, next_n=next_n, columns=columns,
            kind=r.choice(kinds), pages=pages, table=r.choice((0, 0, 1)) if pages else 0,
            per_row=r.randint(0, 1) if pages else 0, raw=int(pages > 0 and r.random() < 0.7),
            stride=_stride(r, rows, columns, gpu), graph=r.choice((1, 2, 5)) if what < 0.1 else 0,
            streams=int(0.1 <= what < 0.15),
        )  # fmt: skip


def _columns(r: random.Random, most: int) -> int:
    """Near a boundary as often as anywhere."""
    if r.random() < 0.5:
        near = [edge for edge in EDGES if edge < most]
        return max(1, min(most, r.choice(near) + r.randint(-40, 40)))
    return min(most, int(2 ** r.uniform(0, 18)))


def _stride(r: random.Random, rows: int, columns: int, gpu: bool) -> int:
    """Draw the step from row to row: some rows share memory."""
    how = r.choice((0, 0, 0, 1, 8, 999, -1, -2))
    if how > 0:
        return columns + how
    if how == -1 and rows > 1:
        return max(1, columns // r.choice((2, 3, 100)))
    far = how == -2 and gpu and 1 < rows <= 3 and r.random() < 0.2
    return (1 << 31) + 64 if far else 0  # past what 32 bits count


def _draw_scores(case: TopkCase, seed: int, device: str) -> torch.Tensor:
    """Draw the scores of all rows."""
    rows, columns, dtype = case.requests * case.next_n, case.columns, DTYPES[case.dtype]
    if case.kind == "plateau":
        r = random.Random(f"plateau {seed}")
        counts = [
            min(columns, max(0, r.choice(CAPACITIES) + r.randint(-1, 1))) for _ in range(rows)
        ]
        return plateau(counts, columns, dtype, device)
    if case.kind != "mixed":
        return scores(case.kind, rows, columns, dtype, seed=seed, device=device)
    drawn = torch.empty(rows, columns, dtype=dtype, device=device)
    for i, kind in enumerate(KINDS[:rows]):
        some = len(range(i, rows, len(KINDS)))
        drawn[i :: len(KINDS)] = scores(kind, some, columns, dtype, seed=seed + i, device=device)
    return drawn


class _Problem(Requests):
    def __init__(self, case: TopkCase, device: str) -> None:
        super().__init__(case, device)
        rows, columns, dtype = self.rows, case.columns, DTYPES[case.dtype]
        stride = case.stride or columns
        self.shared = rows > 1 and stride < columns
        span = (rows - 1) * stride + columns
        if span * dtype.itemsize > UNGUARDED:
            held = torch.empty(span + case.offset, dtype=dtype, device=device)
            self.logits = held.as_strided((rows, columns), (stride, 1), case.offset)
        elif self.shared:
            whole = self.guarded("the scores", 1, span, dtype, offset=case.offset)
            self.logits = whole.as_strided((rows, columns), (stride, 1), whole.storage_offset())
        else:
            self.logits = self.guarded(
                "the scores", rows, columns, dtype, stride=stride, offset=case.offset
            )
        self.starts = self.table = None
        if case.starts:
            self.starts = torch.zeros(rows, dtype=self.index, device=device)
            self.inputs["row_starts"] = self.starts
        if case.pages:
            pages = -(-columns // case.pages) - case.table
            self.table = self.table_of("page_table", pages, case.per_row)
        self.fill(0)

    def fill(self, step: int) -> None:
        """Draw lengths, starts, pages and scores; windows of other steps are forgotten."""
        case, device, seed = self.case, self.device, self.case.seed + step
        self.fill_lengths(step)
        g = torch.Generator().manual_seed(seed)
        if self.starts is not None:
            whole = case.requests * case.next_n
            drawn = torch.randint(-2, case.columns + 2, (whole,), generator=g)
            drawn[torch.rand(whole, generator=g) < 0.5] //= 8
            self.starts.copy_(self.of_rows(drawn))
        if self.table is not None:
            self.fill_table(self.table, g, case.per_row)
        if self.shared:
            span = (self.rows - 1) * self.logits.stride(0) + case.columns
            kind = "normal" if case.kind in ("mixed", "plateau") else case.kind
            flat = scores(kind, 1, span, self.logits.dtype, seed=seed, device=device)
            self.logits.as_strided((span,), (1,)).copy_(flat[0])
        else:
            self.logits.copy_(self.of_rows(_draw_scores(case, seed, device)))
            if case.poison != "none":
                column = torch.arange(case.columns, device=device)
                start = torch.zeros_like(self.per_row) if self.starts is None else self.starts
                inside = (column >= start[:, None]) & (column < (start + self.per_row)[:, None])
                bad = torch.tensor(POISON[case.poison]).to(self.logits.dtype)
                self.logits.masked_fill_(~inside, bad.to(device))
        self.remember(step)


def run(case: TopkCase, device: str, op: Callable[..., torch.Tensor]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = _Problem(case, device)
    if not case.streams:
        run_parts(problem, _parts(problem, op))
        return
    lanes = [_parts(problem, op) for _ in range(_LANES)]
    for _ in range(3):
        answers = _at_once([call for call, _, _ in lanes], device)
    for lane, answer in enumerate(answers):
        check_in(f"stream {lane}: ", lanes[lane][2], answer)
    problem.check_inputs()
    problem.check_guards()


def _at_once(calls: list[Callable[[], torch.Tensor]], device: str) -> list[torch.Tensor]:
    """Make each call on a stream of its own."""
    if device != "cuda":
        return [call() for call in calls]
    now = torch.cuda.current_stream()
    streams, answers = [torch.cuda.Stream() for _ in calls], []
    for call, stream in zip(calls, streams, strict=True):
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            answers.append(call())
    for stream in streams:
        now.wait_stream(stream)
    return answers


def _parts(problem: _Problem, op: Callable[..., torch.Tensor]) -> Parts:
    case, rows, k = problem.case, problem.rows, problem.case.k

    def indices(name: str) -> torch.Tensor:
        return problem.output(name, rows, k, torch.int32, stride=k + max(0, case.out))

    out = indices("out") if case.out >= 0 or case.graph or case.streams else None
    raw = indices("out_raw") if case.raw else None
    counts = problem.vector("out_counts", rows) if case.counts else None

    def call() -> torch.Tensor:
        return op(
            problem.logits, problem.lengths, k, next_n=case.next_n, row_starts=problem.starts,
            page_table=problem.table, page_size=case.pages or 64, sort=bool(case.sort), out=out,
            out_raw=raw, out_counts=counts, backend=case.backend,
        )  # fmt: skip

    def check(got: torch.Tensor) -> None:
        check_form(got, (rows, k), torch.int32)
        index = got if problem.table is None else raw
        check_indices(problem, problem.logits, index, problem.starts)
        if raw is not None and problem.table is not None:
            slots = slots_of(raw, problem.table, case.pages, case.next_n)
            raise_wrong(got != slots, "a slot is not the page's")
        want = _reference(problem)
        if counts is not None:
            wrong = counts[:, None] != (want >= 0).sum(1)[:, None]
            raise_wrong(wrong, "a count is not the row's")
        if problem.table is not None:
            want = slots_of(want, problem.table, case.pages, case.next_n)
        if not case.sort:  # what is wanted comes best first; the order was looked at above
            got, want = got.sort(1).values, want.sort(1).values
        raise_wrong(got.long() != want.long(), "not what the reference selects")

    return call, (raw, counts), check


def _reference(problem: _Problem) -> Any:
    """Return the indices by the torch reference; by a stable sort if that is what was called."""
    case = problem.case
    kind = Call("topk", problem.logits.device, problem.logits.dtype, case.k)
    if choose(kind, case.backend) == "torch":
        return Ranking(problem.logits, problem.per_row, starts=problem.starts).want(case.k)
    from dsv4_plugin import topk

    return topk(
        problem.logits, problem.lengths, case.k, next_n=case.next_n, row_starts=problem.starts,
        sort=True, backend="torch",
    )  # fmt: skip
