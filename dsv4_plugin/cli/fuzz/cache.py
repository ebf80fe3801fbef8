"""Random reads and gathers of the indexer cache, FP8 and MXFP4.

An answer is compared, bit for bit, with the bytes of the cache decoded by tables
(:mod:`dsv4_plugin.cli.checks.oracles`) and with the torch reference; guard zones lie around the
cache and around what is written, and rows that no key goes to stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsv4_plugin.cli.checks.canary import Guarded
from dsv4_plugin.cli.checks.inputs import fp8_cache, mxfp4_cache
from dsv4_plugin.cli.checks.oracles import Wrong, fp8_keys, mxfp4_keys, same_bits
from dsv4_plugin.cli.checks.replay import captured
from dsv4_plugin.cli.fuzz.case import Case, CaseError, flag, function_of, number, numbers, one_of
from dsv4_plugin.ops.dispatch import Call, choose

__all__ = ["GatherCase", "ReadCase", "ReadMxfp4Case", "draw_gather", "draw_read", "run"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_INDEX = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16}
_DIRT = 0xAB  # what outputs are filled with


@dataclass(frozen=True)
class _CacheCase(Case):
    pages: int = number(4, 0, 1 << 20, "pages of the cache")
    block: int = number(64, 1, 4096, "keys of a page")
    head: int = number(128, 4, 4096, "values of a key")
    pad: int = number(0, 0, 1 << 31, "bytes between pages, a multiple of 4")
    view: int = number(2, 2, 4, "dimensions that the cache is handed over with")
    past: int = flag("some positions are past the end of the cache")
    nan: int = flag("every byte, NaN among them, in the first page")
    wider: int = number(0, 0, 4096, "columns that the output is wider")
    graph: int = number(0, 0, 64, "replays of a CUDA graph with another cache and other slots")

    mx: ClassVar[bool] = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a key and its scales."""
        return self.head // 2 + self.head // 32 if self.mx else self.head + 4

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        multiple = 32 if self.mx else 4
        if self.head % multiple:
            raise CaseError(f"head must be a multiple of {multiple}, got {self.head}")
        if self.pad % 4 or self.block * self.row_bytes % 4:
            raise CaseError("pages must be multiples of 4 bytes apart")

    def _plainer(self) -> Iterator[Any]:
        plain: dict[str, Any] = {
            "graph": 0, "past": 0, "nan": 0, "wider": 0, "pad": 0, "view": 2, "block": 64,
            "head": 128, "backend": "auto",
        }  # fmt: skip
        for name, value in plain.items():
            if getattr(self, name) != value:
                yield self.but(**{name: value})
        for pages in (1, self.pages // 2, self.pages - 1):
            if 0 < pages < self.pages:
                yield self.but(pages=pages)
        if self.seed > 1:
            yield self.but(seed=1)


@dataclass(frozen=True)
class ReadCase(_CacheCase):
    """One read by slot."""

    op: ClassVar[str] = "read"
    tokens: int = number(16, 0, 1 << 22, "slots")
    only: int = number(-1, -1, 1 << 22, "the one slot of them that is read; -1: all")
    dtype: str = one_of(tuple(_DTYPES), "of the result")
    index: str = one_of(tuple(_INDEX), "of the slots")

    @property
    def rows(self) -> int:
        """Keys of the call, once more for each replay."""
        return (1 if self.only >= 0 else self.tokens) * max(1, self.graph)

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.only >= self.tokens:
            raise CaseError(f"only must be below tokens ({self.tokens}), got {self.only}")

    def simpler(self, rows: list[int]) -> Iterator[ReadCase]:
        """Yield simpler cases, the simplest first."""
        if self.only < 0:
            for row in rows[:3]:
                yield self.but(only=row)
        if self.only >= 0 and self.tokens > 1:
            yield self.but(only=-1, tokens=1)
            yield self.but(tokens=self.only + 1)
        elif self.tokens > 1:
            for tokens in (1, 2, self.tokens // 2, self.tokens - 1):
                if tokens < self.tokens:
                    yield self.but(tokens=tokens)
        yield from self._plainer()
        if self.dtype != "float32":
            yield self.but(dtype="float32")
        if self.index != "int64":
            yield self.but(index="int64")


@dataclass(frozen=True)
class ReadMxfp4Case(ReadCase):
    """One read by slot of an MXFP4 cache."""

    op: ClassVar[str] = "read_mxfp4"
    mx: ClassVar[bool] = True


@dataclass(frozen=True)
class GatherCase(_CacheCase):
    """One gather of several sequences."""

    op: ClassVar[str] = "gather"
    lens: str = numbers(("any",), "keys of the sequences")
    batch: int = number(1, 0, 4096, "sequences, where lens is any")
    longest: int = number(100, 0, 1 << 20, "keys of the longest, where lens is any")
    dtype: str = one_of(("quantised", *_DTYPES), "of the result")
    wide: int = flag("cu_seq_lens are int64")
    behind: int = number(0, 0, 4096, "rows of the output behind the last key")
    table: int = number(0, -64, 64, "pages that the table is wider than the longest needs")

    def sequences(self, step: int = 0) -> list[int]:
        """Return the keys of each sequence; replays have the same number in all."""
        if self.lens != "any":
            return [int(x) for x in self.lens.split("/")]
        r = random.Random(f"lens {self.seed}")
        near = (0, 1, self.block, self.block + 1, self.longest)
        drawn = [
            min(self.longest, r.choice((*near, r.randint(0, self.longest))))
            for _ in range(self.batch)
        ]
        random.Random(f"order {self.seed} {step}").shuffle(drawn)
        return drawn

    @property
    def rows(self) -> int:
        """Keys of the call, once more for each replay."""
        return sum(self.sequences()) * max(1, self.graph)

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if any(n < 0 for n in self.sequences()):
            raise CaseError(f"lens must not be below zero, got {self.lens}")

    def simpler(self, rows: list[int]) -> Iterator[GatherCase]:
        """Yield simpler cases, the simplest first."""
        lens = self.sequences()
        if self.lens == "any" and len(lens) <= 64:
            yield self.but(lens="/".join(map(str, lens)) or "0")
        elif self.lens == "any":
            yield self.but(batch=self.batch // 2)
        if self.lens != "any":
            if len(lens) > 1:
                for one in range(min(len(lens), 8)):
                    yield self.but(lens=str(lens[one]))
                half = len(lens) // 2
                for some in (lens[:half], lens[half:]):
                    yield self.but(lens="/".join(map(str, some)))
            else:
                for n in (1, 2, lens[0] // 2, lens[0] * 3 // 4, lens[0] - 1):
                    if 0 < n < lens[0]:
                        yield self.but(lens=str(n))
        for name in ("behind", "wide", "table"):
            if getattr(self, name):
                yield self.but(**{name: 0})
        yield from self._plainer()
        if self.dtype != "float32":
            yield self.but(dtype="float32")


# ---- Drawing -------------------------------------------------------------------------------------


def _drawn(r: random.Random, kind: type[Any], device: str, backends: tuple[str, ...]) -> Any:
    some = [b for b in ("auto", *backends) if not (kind.mx and b == "cuda")]
    head = r.choice((128, 128, 128, 128, 64, 96, 32))
    block = r.choice((64, 64, 64, 64, 1, 3, 32, 100, 256))
    if kind.mx:
        block = max(4, block - block % 4)  # a page is a multiple of 4 bytes
    case = kind(
        seed=r.randint(0, (1 << 31) - 1), backend=r.choice(some), head=head, block=block,
        pages=r.choice((0, 1, 2, 7, 40, 300) if device == "cuda" else (0, 1, 2, 7)),
        pad=r.choice((0, 0, 16, 64, 448, 4)), view=r.choice((2, 2, 3, 4)),
        past=r.randint(0, 1), nan=r.randint(0, 1), wider=r.choice((0, 0, 4, 64)),
        graph=r.choice((0, 0, 0, 0, 2)),
    )  # fmt: skip
    if case.backend == "cuda":  # what the CUDA form takes
        odd = -(case.block * case.row_bytes + case.pad) % 16
        case = case.but(head=128, pad=case.pad + odd, wider=case.wider - case.wider % 8)
        case = case.but(pad=case.pad + -(case.block * case.row_bytes + case.pad) % 16)
    return case


def draw_read(
    seed: int, device: str, backends: tuple[str, ...], kind: type[ReadCase] = ReadCase
) -> ReadCase:
    """Draw a read."""
    r = random.Random(f"{kind.op} {seed}")
    most = 20_000 if device == "cuda" else 300
    return _drawn(r, kind, device, backends).but(
        tokens=r.choice((0, 1, 3, 8, 9, 63, 65, r.randint(0, most))),
        dtype=r.choice(list(_DTYPES)), index=r.choice(list(_INDEX)),
    )  # fmt: skip


def draw_gather(seed: int, device: str, backends: tuple[str, ...]) -> GatherCase:
    """Draw a gather."""
    r = random.Random(f"gather {seed}")
    most = 20_000 if device == "cuda" else 300
    batch = r.choice((0, 1, 2, 7, 70, 300))
    return _drawn(r, GatherCase, device, backends).but(
        batch=batch, longest=r.randint(0, max(1, most // max(batch, 1))),
        dtype=r.choice(("quantised", *_DTYPES)), wide=r.randint(0, 1),
        behind=r.choice((0, 0, 1, 40)), table=r.choice((0, 0, 1, 3, -1)),
    )  # fmt: skip


# ---- Running and checking ------------------------------------------------------------------------


class _Problem:
    """The cache of a case, guarded, and where its keys come from."""

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device = case, device
        size = case.block * case.row_bytes
        self.held = Guarded(case.pages, size, torch.uint8, stride=size + case.pad, device=device)
        shape = {2: (size,), 3: (case.block, case.row_bytes), 4: (case.block, 1, case.row_bytes)}
        self.pages = self.held.inside
        self.cache = self.pages.as_strided(
            (case.pages, *shape[case.view]),
            (size + case.pad, *{2: (1,), 3: (case.row_bytes, 1)}.get(
                case.view, (case.row_bytes, case.row_bytes, 1))),
            self.pages.storage_offset(),
        )  # fmt: skip
        self.guards = [("the cache", self.held)]

    def guarded(self, name: str, rows: int, columns: int, dtype: torch.dtype, wider: int) -> Any:
        held = Guarded(rows, columns, dtype, stride=columns + wider, device=self.device)
        self.guards.append((name, held))
        held.inside.view(torch.uint8).fill_(_DIRT)
        return held.inside

    def fill(self, step: int) -> None:
        """Draw the keys."""
        case = self.case
        make = mxfp4_cache if case.mx else fp8_cache
        self.pages.copy_(
            make(case.pages, block_size=case.block, head_dim=case.head, seed=case.seed + step)
        )
        if case.nan and case.pages:
            count = min(256, case.block * (case.head // 2 if case.mx else case.head))
            self.pages[0, :count] = torch.arange(count, device=self.device).to(torch.uint8)
            self.pages[0, -1] = 255  # a scale of NaN in MXFP4, an odd one in FP8

    def keys(
        self, page: torch.Tensor, position: torch.Tensor, padding: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the bytes, scales and values that the keys must have."""
        case = self.case
        n, device = len(page), self.device
        there = ~padding & ~past
        codes = torch.zeros(n, case.head, dtype=torch.uint8, device=device)
        scale, values = torch.zeros(n, device=device), torch.zeros(n, case.head, device=device)
        values[past] = float("nan")
        scale[past] = float("nan")
        codes[past] = 0x7F
        some = page[there], position[there], case.block, case.head
        if case.mx:
            values[there] = mxfp4_keys(self.pages, *some)
        elif case.pages:
            code, scale[there], values[there] = fp8_keys(self.pages, *some)
            codes[there] = code.to(torch.uint8)
        return codes, scale, values


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = _Problem(case, device)
    prepare = _gather if isinstance(case, GatherCase) else _read
    call, fill, check = prepare(problem, op)
    fill(0)
    before = problem.pages.clone()
    if case.graph:
        replay, _ = captured(call, device)
        for step in range(case.graph):
            fill(step)
            before.copy_(problem.pages)
            replay()
            check(f"replay {step}: ")
    else:
        call()
        check("")
    if not torch.equal(before, problem.pages):
        raise Wrong("the cache was written to")
    for name, held in problem.guards:
        fault = held.fault()
        if fault:
            raise Wrong(f"around {name}: {fault}")


_Parts = tuple[Callable[[], Any], Callable[[int], None], Callable[[str], None]]


def _read(problem: _Problem, op: Callable[..., Any]) -> _Parts:
    case, device = problem.case, problem.device
    total = case.pages * case.block
    count = 1 if case.only >= 0 else case.tokens
    slots = torch.zeros(count, dtype=_INDEX[case.index], device=device)
    dtype = _DTYPES[case.dtype]
    out = problem.guarded("out", count, case.head, dtype, case.wider)
    geometry = {"block_size": case.block, "head_dim": case.head}

    def fill(step: int) -> None:
        problem.fill(step)
        g = torch.Generator().manual_seed(case.seed + step)
        # Past the end only where that is no error: slots on a GPU, and a cache without pages.
        beyond = 100 if case.past and (device == "cuda" or not total) else 0
        drawn = torch.randint(0, max(1, total + beyond), (case.tokens,), generator=g)
        drawn = drawn.clamp(max=(1 << 15) - 1) if case.index == "int16" else drawn
        drawn[torch.rand(case.tokens, generator=g) < 0.1] = -1
        slots.copy_(drawn[case.only :][:1] if case.only >= 0 else drawn)
        out.view(torch.uint8).fill_(_DIRT)

    def call() -> Any:
        return op(problem.cache, slots, out=out, backend=case.backend, **geometry)

    def check(context: str) -> None:
        slot = slots.long()
        padding = (slot < 0) | (total == 0)
        at = slot.clamp(min=0)
        past = (slot >= total) & (total > 0)
        want = problem.keys(at // case.block, at % case.block, padding, past)[2]
        _same(out, want.to(dtype), f"{context}not the key's values")
        if _served(case, problem, dtype) != "torch":
            call_reference = function_of(case.op)
            again = call_reference(problem.cache, slots, dtype=dtype, backend="torch", **geometry)
            _same(out, again, f"{context}not what the reference reads")

    return call, fill, check


def _gather(problem: _Problem, op: Callable[..., Any]) -> _Parts:
    case, device = problem.case, problem.device
    total = sum(case.sequences())
    batch = len(case.sequences())
    needed = max((-(-n // case.block) for n in case.sequences()), default=0)
    table = torch.zeros(batch, max(0, needed + case.table), dtype=torch.int32, device=device)
    index = torch.int64 if case.wide else torch.int32
    cu = torch.zeros(batch + 1, dtype=index, device=device)
    rows = total + case.behind
    out: Any
    if case.dtype == "quantised":
        values = problem.guarded("out[0]", rows, case.head, torch.uint8, case.wider)
        scales = problem.guarded("out[1]", rows, 4, torch.uint8, 0)
        out, dtype = (values, scales), None
    else:
        dtype = _DTYPES[case.dtype]
        out = problem.guarded("out", rows, case.head, dtype, case.wider)
    geometry = {"block_size": case.block, "head_dim": case.head}

    def fill(step: int) -> None:
        problem.fill(step)
        g = torch.Generator().manual_seed(case.seed + step)
        lens = torch.tensor([0, *case.sequences(step)])
        cu.copy_(lens.cumsum(0))
        past = 2 if case.past else 0
        table.copy_(torch.randint(-1, max(case.pages, 1) + past, table.shape, generator=g))
        if not case.past and not case.pages:
            table.fill_(-1)
        for part in out if isinstance(out, tuple) else (out,):
            part.view(torch.uint8).fill_(_DIRT)

    def call() -> Any:
        return op(problem.cache, table, cu, dtype=dtype, out=out, backend=case.backend, **geometry)

    def expected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lens = cu.long().diff()
        sequence = torch.repeat_interleave(torch.arange(batch, device=device), lens)
        at = torch.arange(total, device=device) - cu.long()[sequence]
        column = at // case.block
        inside = column < table.shape[1]
        page = torch.full_like(at, -1)
        page[inside] = table[sequence[inside], column[inside]].long()
        past = ~inside | (page >= case.pages)
        return problem.keys(page, at % case.block, inside & (page < 0), past)

    def check(context: str) -> None:
        codes, scale, numbers_ = expected()
        if dtype is None:
            _same(out[0][:total], codes, f"{context}not the key's bytes")
            word = out[1][:total].reshape(-1).view(torch.float32)
            _same(word[:, None], scale[:, None], f"{context}not the key's scale")
        else:
            _same(out[:total], numbers_.to(dtype), f"{context}not the key's values")
        parts = out if isinstance(out, tuple) else (out,)
        if not all(bool((p[total:].view(torch.uint8) == _DIRT).all()) for p in parts):
            raise Wrong(f"{context}rows behind the last key were written to")
        kept = dtype or torch.uint8
        if rows and _served(case, problem, kept) != "torch":
            again = tuple(p.clone().contiguous() for p in parts)
            given = again if dtype is None else again[0]
            function_of("gather")(
                problem.cache, table, cu, dtype=dtype, out=given, backend="torch", **geometry
            )  # fmt: skip
            for part, reference in zip(parts, again, strict=True):
                _same(part, reference, f"{context}not what the reference gathers")

    return call, fill, check


def _served(case: Any, problem: _Problem, dtype: torch.dtype) -> str:
    """Return which implementation the case calls, or "other" where the call itself must tell."""
    kind = Call(case.op, problem.pages.device, dtype, head_dim=case.head, alignment=4)
    return choose(kind, case.backend) if case.backend == "auto" else case.backend


def _same(got: torch.Tensor, want: torch.Tensor, why: str) -> None:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{why}: {got.dtype} {tuple(got.shape)}")
    wrong = ~same_bits(got, want).all(1)
    if bool(wrong.any()):
        rows = wrong.nonzero().reshape(-1).tolist()
        raise Wrong(f"{why}, in {len(rows)} of {len(got)} rows, first {rows[0]}", rows)
