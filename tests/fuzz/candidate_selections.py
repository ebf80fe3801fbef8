"""Random calls of the selections among blocks, and among the keys of candidate blocks.

Scores are drawn and not computed. An answer must equal that of a stable sort
(:mod:`~dsv4_plugin.cli.checks.candidate_oracles`), index by index and in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kits.oracles import slots_of

from dsv4_plugin.cli.checks import candidate_oracles as oracle
from dsv4_plugin.cli.checks.inputs import scores
from tests.fuzz.candidates import candidates_of, chosen_field, piece_field, piece_of
from tests.fuzz.case import RequestsCase, backend_of, flag, number, one_of
from tests.fuzz.logits import DTYPES
from tests.fuzz.tensors import Parts, Requests, check_form, raise_wrong, run_parts
from tests.fuzz.topk import KINDS, PLAIN_KINDS, POISON

__all__ = ["SelectBlocksCase", "SelectCandidatesCase", "problem_of", "run"]


@dataclass(frozen=True)
class _Selection(RequestsCase):
    k: int = number(512, 1, 2048, "k", (512, 512, 2048, 1, 7, 64, range(1, 2049)), plain=1)
    piece: int = piece_field()
    dtype: str = one_of(tuple(DTYPES), "of the scores", plain=("float32",))
    kind: str = one_of(KINDS, "distribution of the scores", plain=PLAIN_KINDS)
    gap: int = number(0, 0, 4096, "elements between two rows of the scores", (0, 0, 1, 8, 60))
    offset: int = number(0, 0, 4096, "elements before the first row of the scores", (0, 0, 1, 7, 8))
    out: int = number(
        0, -1, 4096, "columns that out is wider than k; -1: no out is given", (-1, 0, 0, 5)
    )
    counts: int = flag("out_counts")
    poison: str = one_of(
        ("nan", "inf", "low", "none"), "what lies past a row's scores", plain=("none",)
    )

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        raise NotImplementedError

    def length(self, r: random.Random) -> int:
        """Draw the length of a request, in keys."""
        most = self.context
        near = r.choice((0, 1, self.piece, self.k, self.k * self.piece, 8 * self.piece))
        return r.choice(
            (most, most + 9, r.randint(-1, most), r.randint(0, most), near + r.randint(-2, 2))
        )

    @classmethod
    def _some(
        cls, r: random.Random, gpu: bool, backends: tuple[str, ...], columns: int
    ) -> dict[str, Any]:
        """Draw what both have; on a GPU some million scores, elsewhere some ten thousand."""
        most = 4_000_000 if gpu else 20_000
        next_n = r.choice((1, 1, 1, 2, 4, 6))
        requests = r.choice((1, 2, 5, 33, 133, 400) if gpu else (1, 2, 5))
        backend = backend_of(r, backends)
        return {
            "backend": backend, "piece": piece_of(r, backend, backends), "next_n": next_n,
            "requests": max(1, min(requests, most // (columns * next_n))),
        }  # fmt: skip


@dataclass(frozen=True)
class SelectBlocksCase(_Selection):
    """One call of the selection of blocks."""

    op: ClassVar[str] = "select_blocks"
    blocks: int = number(128, 1, 1 << 22, "blocks, columns of the scores", plain=1)

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        return self.blocks

    @property
    def context(self) -> int:
        """Keys of a full row."""
        return self.blocks * self.piece

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        near = r.choice((64, 512, 2048, 8192, 16_384)) + r.randint(-3, 3)
        blocks = min(140_000 if gpu else 5000, r.choice((near, near, int(2 ** r.uniform(0, 17)))))
        return cls.drawn(r, **cls._some(r, gpu, backends, blocks), blocks=blocks)


@dataclass(frozen=True)
class SelectCandidatesCase(_Selection):
    """One call of the selection among candidates."""

    op: ClassVar[str] = "select_candidates"
    held: int = number(64, 1, 4096, "candidates a row", plain=1)
    keys: int = number(1024, 0, 1 << 24, "keys of a full row", plain=1)
    chosen: str = chosen_field()
    c_gap: int = number(0, 0, 4096, "elements between the candidates of two rows", (0, 0, 1, 3))
    pages: int = number(
        0, 0, 4096, "keys of a page of block_table; 0: no slots", (0, 0, 1, 7, 32, 64)
    )
    table: int = number(0, 0, 64, "pages that the table is too short", (0, 0, 1))
    per_row: int = flag("a table row for every row, not every request")

    @property
    def columns(self) -> int:
        """Columns of the scores."""
        return self.held * self.piece

    @property
    def context(self) -> int:
        """Keys of a full row."""
        return self.keys

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        anywhere = r.randint(1, 2048)
        held = r.choice((2048, 2048, 1, 65, 512, anywhere) if gpu else (1, 2, 9, 65, 200))
        some = cls._some(r, gpu, backends, held * 8)
        edge = held * some["piece"]
        keys = r.choice((edge + r.randint(-9, 9), 4 * edge, 30 * edge, r.randint(0, edge)))
        return cls.drawn(r, **some, held=held, keys=max(0, keys))


# ---- The tensors of a case -----------------------------------------------------------------------


class _Problem(Requests):
    def __init__(self, case: Any, device: str) -> None:
        super().__init__(case, device)
        self.scores = self.guarded(
            "the scores", self.rows, case.columns, DTYPES[case.dtype],
            stride=case.columns + case.gap, offset=case.offset,
        )  # fmt: skip
        self.chosen = self.table = None
        if isinstance(case, SelectCandidatesCase):
            self.chosen = self.guarded(
                "candidates", self.rows, case.held, torch.int32, stride=case.held + case.c_gap
            )
            if case.pages:
                pages = -(-case.keys // case.pages) - case.table
                self.table = self.table_of("block_table", pages, case.per_row)
        self.fill(0)

    def fill(self, step: int) -> None:
        case, device, seed = self.case, self.device, self.case.seed + step
        self.fill_lengths(step)
        whole, dtype = case.requests * case.next_n, self.scores.dtype
        drawn = scores(case.kind, whole, case.columns, dtype, seed=seed, device=device)
        self.scores.copy_(self.of_rows(drawn))
        if self.chosen is not None:
            n = self.per_row.clamp(min=0).tolist()
            self.chosen.copy_(candidates_of(case, n, case.kept[0] * case.next_n, step))
        if self.table is not None:
            self.fill_table(self.table, torch.Generator().manual_seed(seed), case.per_row)
        if case.poison != "none":
            column = torch.arange(case.columns, device=device)
            self.scores.masked_fill_(column >= self.seen()[:, None], POISON[case.poison])
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

    def check(got: torch.Tensor) -> None:
        check_form(got, (rows, k), torch.int32)
        if problem.table is not None and slots is not None:
            want = slots_of(got, problem.table, case.pages, case.next_n)
            raise_wrong(slots.ne(want), "a slot is not the page's")
        if problem.chosen is not None and case.chosen == "any":
            seen = (got == -1) | ((got >= 0) & (got < problem.per_row[:, None]))
            raise_wrong(~seen, "a position that the row does not see")
            if counts is not None:
                fits = (counts >= 0) & (counts <= k)
                raise_wrong(~fits[:, None], "a count is none of up to k")
            return
        if problem.chosen is None:
            want = oracle.blocks(problem.scores, problem.per_row, k, case.piece)
        else:
            n = problem.per_row
            want = oracle.selection(problem.scores, problem.chosen, n, k, case.piece)
        raise_wrong(got.ne(want), "not what a stable sort selects")
        if counts is not None:
            right = counts.eq((want >= 0).sum(1))
            raise_wrong(~right[:, None], "a count is not the row's")

    return call, (slots, counts), check
