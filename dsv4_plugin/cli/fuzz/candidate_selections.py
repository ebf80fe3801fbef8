"""Random calls of the selections among blocks, and among the keys of candidate blocks.

Scores are drawn and not computed. An answer must be that of a stable sort
(:mod:`~dsv4_plugin.cli.checks.candidate_oracles`), index by index in its order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsv4_plugin.cli.checks import candidate_oracles as oracle
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS, scores
from dsv4_plugin.cli.checks.oracles import Wrong, slots_of
from dsv4_plugin.cli.fuzz.candidates import CHOSEN, candidates_of
from dsv4_plugin.cli.fuzz.case import RequestsCase, flag, number, numbers, one_of
from dsv4_plugin.cli.fuzz.logits import DTYPES
from dsv4_plugin.cli.fuzz.tensors import Parts, Tensors, dirty, raise_wrong, run_parts
from dsv4_plugin.cli.fuzz.topk import EACH_ROW, FORMS, lengths_tensor, smaller

__all__ = [
    "SelectBlocksCase",
    "SelectCandidatesCase",
    "draw_blocks",
    "draw_candidates",
    "problem_of",
    "run",
]

_POISON = {"nan": float("nan"), "inf": float("inf"), "low": float("-inf"), "none": 0.0}


@dataclass(frozen=True)
class _Selection(RequestsCase):
    requests: int = number(1, 1, 1 << 16, "requests that are drawn")
    next_n: int = number(1, 1, 64, "rows of a request")
    keep: str = numbers(("",), "first and last request that are called with, a/b")
    k: int = number(512, 1, 2048, "k")
    piece: int = number(8, 1, 64, "keys a block")
    dtype: str = one_of(tuple(DTYPES), "of the scores")
    kind: str = one_of(tuple(DISTRIBUTIONS), "distribution of the scores")
    lengths: str = numbers(("full", "any"), "of the requests that are kept, in keys")
    form: str = one_of(FORMS, "shape of lengths")
    wide: int = flag("lengths are int64")
    gap: int = number(0, 0, 4096, "elements between two rows of the scores")
    offset: int = number(0, 0, 4096, "elements before the first row of the scores")
    out: int = number(0, -1, 4096, "columns that out is wider than k; -1: no out is given")
    counts: int = flag("out_counts")
    poison: str = one_of(tuple(_POISON), "what lies past a row's scores")
    graph: int = number(0, 0, 64, "replays of a CUDA graph with other scores and lengths")

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        raise NotImplementedError

    @property
    def context(self) -> int:
        """Keys of a full row."""
        raise NotImplementedError

    def requests_of(self, step: int) -> list[int]:
        """Return the lengths of the requests that are kept; ``step`` counts replays."""
        first, count = self.kept
        most = self.context
        if self.lengths == "full":
            return [most] * count
        if self.lengths != "any":
            return [int(x) for x in self.lengths.split("/")]
        r = random.Random(f"lengths {self.seed} {step}")
        near = (0, 1, self.piece, self.k, self.k * self.piece, 8 * self.piece)
        drawn = [
            r.choice((most, most + 9, r.randint(-1, most), r.randint(0, most),
                      r.choice(near) + r.randint(-2, 2)))
            for _ in range(self.requests)
        ]  # fmt: skip
        return drawn[first : first + count]

    def _plain(self) -> dict[str, Any]:
        return {
            "graph": 0, "wide": 0, "form": "rows", "gap": 0, "offset": 0, "out": 0, "counts": 0,
            "poison": "none", "next_n": 1, "piece": 8, "backend": "auto", "dtype": "float32",
        }  # fmt: skip

    def _narrower(self) -> Iterator[Any]:
        raise NotImplementedError

    def simpler(self, rows: list[int]) -> Iterator[Any]:
        """Yield simpler cases, the simplest first."""
        lengths = self.requests_of(0)
        yield from self.fewer(rows, lengths)
        for name, value in self._plain().items():
            if getattr(self, name) != value:
                yield self.but(**{name: value})
        for kind in ("all_equal", "ascending", "two_values", "normal"):
            if kind == self.kind:
                break
            yield self.but(kind=kind)
        for k in smaller(self.k):
            yield self.but(k=k)
        yield from self._narrower()
        if len(lengths) == 1 and self.lengths not in ("full", "any"):
            for n in smaller(max(lengths[0], 0)):
                yield self.but(lengths=str(n))
        if self.seed > 1:
            yield self.but(seed=1)


@dataclass(frozen=True)
class SelectBlocksCase(_Selection):
    """One call of the selection of blocks."""

    op: ClassVar[str] = "select_blocks"
    blocks: int = number(128, 1, 1 << 22, "blocks, columns of the scores")

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        return self.blocks

    @property
    def context(self) -> int:
        """Keys of a full row."""
        return self.blocks * self.piece

    def _narrower(self) -> Iterator[Any]:
        for blocks in smaller(self.blocks):
            yield self.but(blocks=blocks)


@dataclass(frozen=True)
class SelectCandidatesCase(_Selection):
    """One call of the selection among candidates."""

    op: ClassVar[str] = "select_candidates"
    held: int = number(64, 1, 4096, "candidates a row")
    keys: int = number(1024, 0, 1 << 24, "keys of a full row")
    chosen: str = one_of(
        CHOSEN, "some of the blocks that a row sees, its first ones, or any numbers"
    )
    c_gap: int = number(0, 0, 4096, "elements between the candidates of two rows")
    pages: int = number(0, 0, 4096, "keys of a page of block_table; 0: no slots")
    table: int = number(0, 0, 64, "pages that the table is too short")
    per_row: int = flag("a table row for every row, not every request")

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        return self.held * self.piece

    @property
    def context(self) -> int:
        """Keys of a full row."""
        return self.keys

    def _plain(self) -> dict[str, Any]:
        return super()._plain() | {"pages": 0, "table": 0, "per_row": 0, "c_gap": 0}

    def _narrower(self) -> Iterator[Any]:
        for held in smaller(self.held):
            yield self.but(held=held)
        for keys in smaller(self.keys):
            fit = self.lengths
            if fit not in ("full", "any"):
                fit = "/".join(str(min(n, keys)) for n in self.requests_of(0))
            yield self.but(keys=keys, lengths=fit)
        if self.chosen == "visible":
            yield self.but(chosen="all")


# ---- Drawing -------------------------------------------------------------------------------------


def _drawn(
    r: random.Random, columns: int, device: str, backends: tuple[str, ...]
) -> dict[str, Any]:
    """Draw what both have."""
    most = 4_000_000 if device == "cuda" else 20_000
    next_n = r.choice((1, 1, 1, 2, 4, 6))
    requests = r.choice((1, 2, 5, 33, 133, 400) if device == "cuda" else (1, 2, 5))
    backend = r.choice([b for b in ("auto", *backends) if b != "triton"])
    return {
        "seed": r.randint(0, (1 << 31) - 1), "backend": backend, "next_n": next_n,
        "requests": max(1, min(requests, most // (columns * next_n))),
        "k": r.choice((512, 512, 2048, 1, 7, 64, r.randint(1, 2048))),
        "dtype": r.choice(list(DTYPES)), "kind": r.choice(list(DISTRIBUTIONS)),
        "lengths": r.choice(("full", "any", "any", "any")), "form": r.choice(FORMS),
        "wide": r.randint(0, 1), "gap": r.choice((0, 0, 1, 8, 60)),
        "offset": r.choice((0, 0, 1, 7, 8)), "out": r.choice((-1, 0, 0, 5)),
        "counts": r.randint(0, 1), "poison": r.choice(list(_POISON)),
        "graph": r.choice((0, 0, 0, 0, 0, 1, 3)),
    }  # fmt: skip


def _piece(r: random.Random, backend: str, backends: tuple[str, ...]) -> int:
    any_form = backend == "torch" or "cuda" not in backends
    return r.choice((8, 8, 1, 3, 16)) if any_form else 8


def draw_blocks(seed: int, device: str, backends: tuple[str, ...]) -> SelectBlocksCase:
    """Draw a selection of blocks; on a GPU some million scores, elsewhere some ten thousand."""
    r = random.Random(f"select_blocks {seed}")
    most = 140_000 if device == "cuda" else 5000
    near = r.choice((64, 512, 2048, 8192, 16_384)) + r.randint(-3, 3)
    blocks = min(most, r.choice((near, near, int(2 ** r.uniform(0, 17)))))
    drawn = _drawn(r, blocks, device, backends)
    return SelectBlocksCase(**drawn, blocks=blocks, piece=_piece(r, drawn["backend"], backends))


def draw_candidates(seed: int, device: str, backends: tuple[str, ...]) -> SelectCandidatesCase:
    """Draw a selection among candidates, of as many scores."""
    r = random.Random(f"select_candidates {seed}")
    held = r.choice((2048, 2048, 1, 65, 512, r.randint(1, 2048)) if device == "cuda" else
                    (1, 2, 9, 65, 200))  # fmt: skip
    drawn = _drawn(r, held * 8, device, backends)
    piece = _piece(r, drawn["backend"], backends)
    edge = held * piece
    keys = r.choice((edge + r.randint(-9, 9), 4 * edge, 30 * edge, r.randint(0, edge)))
    return SelectCandidatesCase(
        **drawn, held=held, piece=piece, keys=max(0, keys),
        chosen=r.choice(("visible", "visible", "all", "any")), c_gap=r.choice((0, 0, 1, 3)),
        pages=r.choice((0, 0, 1, 7, 32, 64)), table=r.choice((0, 0, 1)), per_row=r.randint(0, 1),
    )  # fmt: skip


# ---- The tensors of a case -----------------------------------------------------------------------


class _Problem(Tensors):
    def __init__(self, case: Any, device: str) -> None:
        super().__init__(case, device)
        self.batch = case.kept[1]
        self.rows = rows = self.batch * case.next_n
        dtype = DTYPES[case.dtype]
        self.scores = self.guarded(
            "the scores", rows, case.columns, dtype,
            stride=case.columns + case.gap, offset=case.offset,
        )  # fmt: skip
        index = torch.int64 if case.wide else torch.int32
        self.lengths = lengths_tensor(case.form, self.batch, case.next_n, index, device)
        self.inputs["lengths"] = self.lengths
        self.per_row = torch.zeros(rows, dtype=torch.int64, device=device)
        self.chosen = self.table = None
        if isinstance(case, SelectCandidatesCase):
            self.chosen = self.guarded(
                "candidates", rows, case.held, torch.int32, stride=case.held + case.c_gap
            )
            if case.pages:
                pages = max(0, -(-case.keys // case.pages) - case.table)
                self.table = self.guarded(
                    "block_table", rows if case.per_row else self.batch, pages, torch.int32,
                    stride=pages + 3,
                )  # fmt: skip
        self.fill(0)

    def fill(self, step: int) -> None:
        case, device = self.case, self.device
        lengths = torch.tensor(case.requests_of(step), dtype=torch.int64, device=device)
        ahead = torch.arange(1 - case.next_n, 1, device=device)
        self.per_row.copy_((lengths[:, None] + ahead).reshape(-1))
        each = case.form in EACH_ROW
        self.lengths.copy_((self.per_row if each else lengths).view(self.lengths.shape))
        whole, first = case.requests * case.next_n, case.kept[0] * case.next_n
        drawn = scores(
            case.kind, whole, case.columns, self.scores.dtype, seed=case.seed + step, device=device
        )
        self.scores.copy_(drawn[first : first + self.rows])
        if self.chosen is not None:
            n = self.per_row.clamp(min=0).tolist()
            self.chosen.copy_(candidates_of(case, n, first, step))
        if self.table is not None:
            rows = whole if case.per_row else case.requests
            at = first if case.per_row else case.kept[0]
            g = torch.Generator().manual_seed(case.seed + step)
            pages = torch.randint(-1, 10_000, (rows, self.table.shape[1]), generator=g).int()
            self.table.copy_(pages[at : at + self.table.shape[0]])
        if case.poison != "none":
            column = torch.arange(case.columns, device=device)
            self.scores.masked_fill_(column >= self.seen()[:, None], _POISON[case.poison])
        self.remember(step)

    def seen(self) -> torch.Tensor:
        """Return how many columns of its scores each row sees, by candidates that ascend."""
        if self.chosen is None:
            return -(-self.per_row // self.case.piece)
        return oracle.visible(self.chosen, self.per_row, self.case.piece)


def problem_of(case: Any, device: str) -> Any:
    """Make the tensors of a case."""
    return _Problem(case, device)


# ---- Running and checking ------------------------------------------------------------------------


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = _Problem(case, device)
    run_parts(problem, _parts(problem, op))


def _parts(problem: _Problem, op: Callable[..., Any]) -> Parts:
    case, rows, k = problem.case, problem.rows, problem.case.k

    def indices(name: str) -> torch.Tensor:
        return problem.output(name, rows, k, torch.int32, stride=k + max(0, case.out))

    out = indices("out") if case.out >= 0 or case.graph else None
    slots = indices("out_slots") if problem.table is not None else None
    counts = problem.vector("out_counts", rows) if case.counts else None
    given: tuple[Any, ...] = (problem.scores, problem.lengths, k)
    more: dict[str, Any] = {}
    if problem.chosen is not None:
        given = (problem.scores, problem.chosen, problem.lengths, k)
        more = {
            "block_table": problem.table, "page_size": case.pages or 64, "out_slots": slots
        }  # fmt: skip

    def call() -> torch.Tensor:
        return op(
            *given, piece=case.piece, next_n=case.next_n, out=out, out_counts=counts,
            backend=case.backend, **more,
        )  # fmt: skip

    def clean() -> None:
        for tensor in (slots, counts):
            if tensor is not None:
                dirty(tensor)

    def check(got: torch.Tensor, context: str) -> None:
        if (tuple(got.shape), got.dtype) != ((rows, k), torch.int32):
            raise Wrong(f"{context}the answer is {got.dtype} {tuple(got.shape)}")
        if problem.table is not None and slots is not None:
            want = slots_of(got, problem.table, case.pages, case.next_n)
            raise_wrong(slots.ne(want), f"{context}a slot is not the page's")
        if problem.chosen is not None and case.chosen == "any":
            seen = (got == -1) | ((got >= 0) & (got < problem.per_row[:, None]))
            raise_wrong(~seen, f"{context}a position that the row does not see")
            if counts is not None:
                fits = (counts >= 0) & (counts <= k)
                raise_wrong(~fits[:, None], f"{context}a count is none of up to k")
            return
        if problem.chosen is None:
            want = oracle.blocks(problem.scores, problem.per_row, k, case.piece)
        else:
            n = problem.per_row
            want = oracle.selection(problem.scores, problem.chosen, n, k, case.piece)
        raise_wrong(got.ne(want), f"{context}not what a stable sort selects")
        if counts is not None:
            right = counts.eq((want >= 0).sum(1))
            raise_wrong(~right[:, None], f"{context}a count is not the row's")

    return call, clean, check
