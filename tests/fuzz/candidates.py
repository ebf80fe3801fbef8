"""Random calls of the ops that score blocks of keys, and the keys of candidate blocks.

Their tensors are those of :mod:`.logits_run`. The expected answer comes from
:mod:`~dsv4_plugin.cli.checks.candidate_oracles`, which makes it of the scores of all keys as the
dense op of the same implementation gives them (:mod:`.logits` compares these with float64). The
answer must have the same bits, without a tolerance.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kits.oracles import bits, slots_of

from dsv4_plugin.cli.checks import candidate_oracles as oracle
from dsv4_plugin.cli.checks.oracles import same_bits
from tests.fuzz.case import CaseError, flag, number, one_of
from tests.fuzz.logits import DTYPES, LogitsCase, PagedLogitsCase, RaggedLogitsCase
from tests.fuzz.logits_run import problem_of
from tests.fuzz.tensors import Parts, check_form, dirty, raise_wrong, run_parts

__all__ = [
    "BlockMaximaCase", "CandidateLogitsCase", "CandidateLogitsRaggedCase", "CandidateSelectCase",
    "candidates_of", "chosen_field", "piece_field", "piece_of", "run",
]  # fmt: skip

_WILD = (-1, -7, -(1 << 31), (1 << 31) - 1, 1 << 28, 1 << 29)  # blocks of no row


def piece_field() -> Any:
    """Declare the keys of a block."""
    return number(8, 1, 64, "keys a block")


def chosen_field() -> Any:
    """Declare what candidates there are."""
    return one_of(
        ("visible", "all", "any"),
        "some of the blocks that a row sees, its first ones, or any numbers",
        draw=("visible", "visible", "all", "any"),
        plain=("all", "visible"),
    )


def piece_of(r: random.Random, backend: str, backends: tuple[str, ...]) -> int:
    """Draw the keys of a block: others than 8 where only the torch form need take them."""
    odd = backend == "torch" or "cuda" not in backends
    return r.choice((8, 8, 1, 3, 16)) if odd else 8


@dataclass(frozen=True)
class BlockMaximaCase(PagedLogitsCase):
    """One call of the block maxima, in which ``out`` counts blocks."""

    op: ClassVar[str] = "block_maxima"
    piece: int = piece_field()
    scored: int = number(-1, -1, 1 << 24, "columns of logits; 0: all; -1: none is given")

    @property
    def out_columns(self) -> int:
        """Blocks of the table."""
        return -(-self.columns // self.piece)

    @property
    def limit(self) -> int:
        """Keys that a row's length is clipped to."""
        room = (self.out if self.out > 0 else self.out_columns) * self.piece
        return room if self.scored < 0 else min(room, self.scored or self.columns)

    blocks = (64, 64, 32)

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        case = cls._some(r, gpu, backends)
        case = case.but(piece=piece_of(r, case.backend, backends))
        blocks, columns = case.out_columns, case.columns
        return case.but(
            out=r.choice((-1, 0, 0, 0, blocks + r.choice((1, 9)), r.randint(1, blocks))),
            scored=r.choice((-1, -1, 0, 0, columns + r.choice((1, 64)), r.randint(1, columns))),
        )


@dataclass(frozen=True)
class _Candidates(LogitsCase):
    piece: int = piece_field()
    held: int = number(8, 1, 4096, "candidates a row", plain=1)
    chosen: str = chosen_field()
    counted: int = flag("out_lengths is given")
    c_gap: int = number(0, 0, 4096, "elements between the candidates of two rows", (0, 0, 1, 3, 60))

    @property
    def out_columns(self) -> int:
        """Columns of the candidates."""
        return self.held * self.piece

    @property
    def limit(self) -> int:
        """Keys that a row's length is clipped to."""
        return self.columns

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.out > 0:
            raise CaseError(f"out must be 0 or -1, as wide as the candidates, got {self.out}")

    blocks = (64, 64, 32)

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        case = cls._some(r, gpu, backends)
        piece = piece_of(r, case.backend, backends)
        most = 400_000 if gpu else 4000
        held = r.choice((1, 2, 9, 64, 512, 2048) if gpu else (1, 2, 5, 9, 33))
        held = max(1, min(held, most // (case.rows * piece)))
        return case.but(piece=piece, held=held, out=r.choice((-1, 0, 0)))


@dataclass(frozen=True)
class CandidateLogitsCase(_Candidates, PagedLogitsCase):
    """One call of the candidates' logits on pages."""

    op: ClassVar[str] = "candidate_logits"


@dataclass(frozen=True)
class CandidateSelectCase(_Candidates, PagedLogitsCase):
    """One call of the chain to indices, in which ``counted`` means out_counts."""

    op: ClassVar[str] = "candidate_select"
    k: int = number(512, 1, 2048, "k", (512, 512, 2048, 1, 7, 64), plain=1)
    slots: int = flag("out_slots, by the block table")


@dataclass(frozen=True)
class CandidateLogitsRaggedCase(_Candidates, RaggedLogitsCase):
    """One call of the candidates' logits on gathered keys."""

    op: ClassVar[str] = "candidate_logits_ragged"
    one_request: int = number(0, 0, 0, "the op is told nothing of the rows", (0,))


def candidates_of(case: Any, n: list[int], first: int, step: int) -> torch.Tensor:
    """Draw the candidates of rows from ``first`` on, which see ``n`` keys: int32 on the CPU."""
    rows = torch.full((len(n), case.held), -1, dtype=torch.int64)
    for row, keys in enumerate(n):
        r = random.Random(f"candidates {case.seed} {step} {first + row}")
        blocks = -(-keys // case.piece)
        most = min(blocks, case.held)
        if case.chosen == "any":
            drawn = [
                r.choice(_WILD) if r.random() < 0.3 else r.randint(-2, blocks + 2)
                for _ in range(case.held)
            ]
        elif case.chosen == "all":
            drawn = list(range(most))
        else:
            drawn = sorted(r.sample(range(blocks), r.choice((most, most, r.randint(0, most)))))
        rows[row, : len(drawn)] = torch.tensor(drawn, dtype=torch.int64)
    return rows.int()


# ---- Running and checking ------------------------------------------------------------------------


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = problem_of(case, device)
    parts = {BlockMaximaCase: _maxima, CandidateSelectCase: _selected}.get(type(case), _scored)
    run_parts(problem, parts(problem, op))


def _dense(problem: Any, columns: int = 0) -> torch.Tensor:
    """Return the scores of all keys and of ``columns`` at least, -inf past what a row sees."""
    from dsv4_plugin import paged_logits, ragged_logits

    case = problem.case
    dense = ragged_logits if isinstance(case, RaggedLogitsCase) else paged_logits
    shape, dtype = (problem.rows, max(case.columns, columns)), DTYPES[case.dtype]
    out = torch.full(shape, -torch.inf, dtype=dtype, device=problem.device)
    if out.numel():
        dense(*problem.arguments(), out=out, backend=problem.served(), **problem.keywords())
    return out


def _keys_seen(problem: Any) -> torch.Tensor:
    """Return how many keys each row sees: of gathered ones those of a window that exist."""
    case = problem.case
    if not isinstance(case, RaggedLogitsCase):
        return problem.counts(case.limit)
    start = problem.starts.long()
    n = problem.ends.long().clamp(max=case.keys) - start
    return n.clamp(min=0).masked_fill(start < 0, 0)


def _past(got: torch.Tensor, inside: torch.Tensor, why: str) -> None:
    """Raise :class:`Wrong` if anything was written outside."""
    clean = dirty(torch.empty_like(got, memory_format=torch.contiguous_format))
    raise_wrong(~inside & (bits(got) != bits(clean)), why)


def _first(n: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.arange(columns, device=n.device) < n[:, None]


def _maxima(problem: Any, op: Callable[..., Any]) -> Parts:
    case, rows = problem.case, problem.rows
    dtype = DTYPES[case.dtype]
    out = problem.scratch()
    blocks = case.out_columns if out is None else out.shape[1]
    logits = None
    if case.scored >= 0:
        columns = case.scored or case.columns
        logits = problem.output("logits", rows, columns, dtype, stride=columns + case.gap)

    def call() -> torch.Tensor:
        return op(
            *problem.arguments(), piece=case.piece, dtype=dtype, out=out, logits=logits,
            backend=case.backend, **problem.keywords(),
        )  # fmt: skip

    def check(got: torch.Tensor) -> None:
        check_form(got, (rows, blocks), dtype)
        n = _keys_seen(problem)
        dense = _dense(problem, blocks * case.piece)  # a length may be past the block table
        want = oracle.maxima(dense, n, case.piece)
        some = min(blocks, want.shape[1])
        inside = _first(-(-n // case.piece), blocks)
        wrong = inside[:, :some] & ~same_bits(got[:, :some], want[:, :some])
        raise_wrong(wrong, "the score of a block is not its keys'")
        if out is not None:
            _past(got, inside, "a score past a row's blocks was written")
        if logits is not None:
            some = min(logits.shape[1], case.columns)
            inside = _first(n, logits.shape[1])
            wrong = inside[:, :some] & ~same_bits(logits[:, :some], dense[:, :some])
            raise_wrong(wrong, "a score is not that of all keys")
            _past(logits, inside, "a score past a row's length was written")

    return call, (logits,), check


def _lists(problem: Any) -> torch.Tensor:
    """Make the candidates, which are drawn anew with everything else."""
    case = problem.case
    chosen = problem.guarded(
        "candidates", problem.rows, case.held, torch.int32, stride=case.held + case.c_gap
    )

    def draw(step: int) -> None:
        n = _keys_seen(problem).tolist()
        chosen.copy_(candidates_of(case, n, case.kept[0] * case.each, step))

    problem.more = draw
    problem.fill(0)
    return chosen


def _scored(problem: Any, op: Callable[..., Any]) -> Parts:
    case, rows = problem.case, problem.rows
    dtype, columns = DTYPES[case.dtype], case.out_columns
    out = problem.scratch()
    count = problem.vector("out_lengths", rows) if case.counted else None
    at = 4 if isinstance(case, RaggedLogitsCase) else 3  # where candidates stand
    chosen = _lists(problem)

    def call() -> torch.Tensor:
        given = problem.arguments()
        return op(
            *given[:at], chosen, *given[at:], piece=case.piece, dtype=dtype, out=out,
            out_lengths=count, backend=case.backend, **problem.keywords(),
        )  # fmt: skip

    def check(got: torch.Tensor) -> None:
        check_form(got, (rows, columns), dtype)
        n = _keys_seen(problem)
        wrong = ~same_bits(got, oracle.scores(_dense(problem), chosen, n, case.piece))
        if count is not None:
            if case.chosen == "any":  # no order, so no count: a number that fits is all
                fits = (count >= 0) & (count <= columns)
                raise_wrong(~fits[:, None], "out_lengths is no number of columns")
                return
            right = count.long() == oracle.visible(chosen, n, case.piece)
            raise_wrong(~right[:, None], "out_lengths is not what the row sees")
            wrong &= _first(count, columns)
        raise_wrong(wrong, "a score is not that of all keys")

    return call, (count,), check


def _selected(problem: Any, op: Callable[..., Any]) -> Parts:
    case, rows, k = problem.case, problem.rows, problem.case.k

    def indices(name: str) -> torch.Tensor:
        return problem.output(name, rows, k, torch.int32, stride=k + case.gap)

    out = indices("out") if case.out >= 0 or case.graph else None
    slots = indices("out_slots") if case.slots else None
    counts = problem.vector("out_counts", rows) if case.counted else None
    chosen = _lists(problem)

    def call() -> torch.Tensor:
        given = problem.arguments()
        return op(
            *given[:3], chosen, *given[3:], k, piece=case.piece, dtype=DTYPES[case.dtype],
            page_table=problem.table if case.slots else None, page_size=case.block, out=out,
            out_slots=slots, out_counts=counts, backend=case.backend, **problem.keywords(),
        )  # fmt: skip

    def check(got: torch.Tensor) -> None:
        check_form(got, (rows, k), torch.int32)
        n = problem.per_row
        if slots is not None:
            want = slots_of(got, problem.table, case.block, problem.next_n)
            raise_wrong(slots.ne(want), "a slot is not the page's")
        if case.chosen == "any":
            seen = (got == -1) | ((got >= 0) & (got < n[:, None]))
            raise_wrong(~seen, "a position that the row does not see")
            return
        scored = oracle.scores(_dense(problem), chosen, _keys_seen(problem), case.piece)
        want = oracle.selection(scored, chosen, n, k, case.piece)
        raise_wrong(got.ne(want), "not what a stable sort selects")
        if counts is not None:
            right = counts.long() == oracle.visible(chosen, n, case.piece).clamp(max=k)
            raise_wrong(~right[:, None], "out_counts is not what the row has")

    return call, (slots, counts), check
