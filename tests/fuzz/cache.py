"""Random reads and gathers of the indexer cache, FP8 and MXFP4.

The run compares an answer, bit for bit, with the bytes of the cache decoded by tables
(:mod:`dsv4_plugin.cli.checks.oracles`) and with the torch reference. Guard zones lie around the
cache and around the outputs. Output rows without a key must stay as they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kits.inputs import mxfp4_cache
from kits.oracles import fp8_keys, mxfp4_keys

from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.cli.checks.oracles import Wrong, same_bits
from dsv4_plugin.ops.dispatch import Call, choose
from tests.fuzz.case import (
    CaseError,
    KeptCase,
    flag,
    function_of,
    number,
    numbers,
    one_of,
)
from tests.fuzz.tensors import (
    Parts,
    Tensors,
    bits,
    check_form,
    dirty,
    page_view,
    raise_wrong,
    run_parts,
)

__all__ = ["GatherCase", "ReadCase", "ReadMxfp4Case", "run"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_INDEX = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16}


@dataclass(frozen=True)
class _CacheCase(KeptCase):
    pages: int = number(4, 0, 1 << 20, "pages of the cache", plain=1)
    block: int = number(64, 1, 4096, "keys of a page")
    head: int = number(128, 4, 4096, "values of a key")
    pad: int = number(0, 0, 1 << 31, "bytes between pages, a multiple of 4")
    view: int = number(2, 2, 4, "dimensions that the cache is handed over with", (2, 2, 3, 4))
    past: int = flag("some positions are past the end of the cache")
    nan: int = flag("every byte, NaN among them, in the first page")
    wider: int = number(0, 0, 4096, "columns that the output is wider")
    graph: int = number(
        0, 0, 64, "replays of a CUDA graph with another cache and other slots", (0, 0, 0, 0, 2)
    )

    mx: ClassVar[bool] = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a key and its scales."""
        return self.head // 2 + self.head // 32 if self.mx else self.head + 4

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        multiple = 32 if self.mx else 4
        if self.head % multiple:
            raise CaseError(f"head must be a multiple of {multiple}, got {self.head}")
        if self.pad % 4 or self.block * self.row_bytes % 4:
            raise CaseError("pages must be multiples of 4 bytes apart")

    @classmethod
    def _some(cls, r: random.Random, gpu: bool, backends: tuple[str, ...], **more: Any) -> Any:
        """Draw a cache, and what ``more`` does not say."""
        block = r.choice((64, 64, 64, 64, 1, 3, 32, 100, 256))
        case = cls.drawn(
            r, backend=r.choice([b for b in ("auto", *backends) if not (cls.mx and b == "cuda")]),
            head=r.choice((128, 128, 128, 128, 64, 96, 32)),
            block=max(4, block - block % 4) if cls.mx else block,  # a page: a multiple of 4 bytes
            pages=r.choice((0, 1, 2, 7, 40, 300) if gpu else (0, 1, 2, 7)),
            pad=r.choice((0, 0, 16, 64, 448, 4)), wider=r.choice((0, 0, 4, 64)), **more,
        )  # fmt: skip
        if case.backend == "cuda":  # what the CUDA form takes
            case = case.but(head=128, wider=case.wider - case.wider % 8)
            case = case.but(pad=case.pad + -(case.block * case.row_bytes + case.pad) % 16)
        return case


@dataclass(frozen=True)
class ReadCase(_CacheCase):
    """One read by slot."""

    op: ClassVar[str] = "read"
    tokens: int = number(16, 0, 1 << 22, "slots")
    dtype: str = one_of(tuple(_DTYPES), "of the result")
    index: str = one_of(tuple(_INDEX), "of the slots")

    unit = "tokens"

    @property
    def rows(self) -> int:
        """Keys of the call, once more for each replay."""
        return self.kept[1] * max(1, self.graph)

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        anywhere = r.randint(0, 20_000 if gpu else 300)
        tokens = r.choice((0, 1, 3, 8, 9, 63, 65, anywhere))
        return cls._some(r, gpu, backends, tokens=tokens)


@dataclass(frozen=True)
class ReadMxfp4Case(ReadCase):
    """One read by slot of an MXFP4 cache."""

    op: ClassVar[str] = "read_mxfp4"
    mx: ClassVar[bool] = True


@dataclass(frozen=True)
class GatherCase(_CacheCase):
    """One gather of several sequences."""

    op: ClassVar[str] = "gather"
    batch: int = number(1, 0, 4096, "sequences that are drawn")
    lens: str = numbers(("any",), "keys of the sequences that are kept")
    longest: int = number(100, 0, 1 << 20, "keys of the longest, where lens is any", plain=1)
    dtype: str = one_of(("quantised", *_DTYPES), "of the result", plain=("float32",))
    wide: int = flag("cu_seq_lens are int64")
    behind: int = number(0, 0, 4096, "rows of the output behind the last key", (0, 0, 1, 40))
    table: int = number(
        0, -64, 64, "pages that the table is wider than the longest needs", (0, 0, 1, 3, -1)
    )

    unit, listable = "batch", ("lens",)

    def lists(self) -> dict[str, list[int]]:
        """Return the keys of the sequences."""
        return {"lens": self.sequences()}

    def sequences(self, step: int = 0) -> list[int]:
        """Return the keys of each sequence; replays have the same number in all."""
        listed = self.listed("lens")
        if listed is not None:
            return listed
        first, count = self.kept
        r = random.Random(f"lens {self.seed}")
        near = (0, 1, self.block, self.block + 1, self.longest)
        drawn = [
            min(self.longest, r.choice((*near, r.randint(0, self.longest))))
            for _ in range(self.batch)
        ][first : first + count]
        random.Random(f"order {self.seed} {step}").shuffle(drawn)
        return drawn

    @property
    def rows(self) -> int:
        """Keys of the call, once more for each replay."""
        return sum(self.sequences()) * max(1, self.graph)

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if any(n < 0 for n in self.listed("lens") or ()):
            raise CaseError(f"lens must not be below zero, got {self.lens}")

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        batch = r.choice((0, 1, 2, 7, 70, 300))
        longest = r.randint(0, max(1, (20_000 if gpu else 300) // max(batch, 1)))
        return cls._some(r, gpu, backends, batch=batch, longest=longest)


# ---- Running and checking ------------------------------------------------------------------------


class _Problem(Tensors):
    """The cache of a case, guarded, and what its keys must read as."""

    def __init__(self, case: Any, device: str) -> None:
        super().__init__(case, device)
        size = case.block * case.row_bytes
        self.pages = self.guarded(
            "the cache", case.pages, size, torch.uint8, stride=size + case.pad
        )
        self.cache = page_view(self.pages, case.view, case.block)
        self.geometry = {"block_size": case.block, "head_dim": case.head}

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
        self.remember(step)

    def wanted(
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

    def by_reference(self, dtype: torch.dtype) -> bool:
        """Return whether the reference serves the case, which then needs no other."""
        case = self.case
        kind = Call(case.op, self.pages.device, dtype, head_dim=case.head, alignment=4)
        return (choose(kind, "auto") if case.backend == "auto" else case.backend) == "torch"


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    problem = _Problem(case, device)
    run_parts(problem, (_gather if isinstance(case, GatherCase) else _read)(problem, op))


def _same(got: torch.Tensor, want: torch.Tensor, why: str) -> None:
    check_form(got, tuple(want.shape), want.dtype)
    raise_wrong(~same_bits(got, want), why)


def _read(problem: _Problem, op: Callable[..., Any]) -> Parts:
    case, device = problem.case, problem.device
    total = case.pages * case.block
    first, count = case.kept
    slots = torch.zeros(count, dtype=_INDEX[case.index], device=device)
    problem.inputs["slot_mapping"] = slots
    dtype = _DTYPES[case.dtype]
    out = problem.output("out", count, case.head, dtype, stride=case.head + case.wider)

    def draw(step: int) -> None:
        g = torch.Generator().manual_seed(case.seed + step)
        # Past the end only where that is no error: slots on a GPU, and a cache without pages.
        beyond = 100 if case.past and (device == "cuda" or not total) else 0
        drawn = torch.randint(0, max(1, total + beyond), (case.tokens,), generator=g)
        drawn = drawn.clamp(max=(1 << 15) - 1) if case.index == "int16" else drawn
        drawn[torch.rand(case.tokens, generator=g) < 0.1] = -1
        slots.copy_(drawn[first : first + count])

    problem.more = draw
    problem.fill(0)

    def call() -> torch.Tensor:
        return op(problem.cache, slots, out=out, backend=case.backend, **problem.geometry)

    def check(got: torch.Tensor) -> None:
        slot = slots.long()
        padding = (slot < 0) | (total == 0)
        at = slot.clamp(min=0)
        past = (slot >= total) & (total > 0)
        want = problem.wanted(at // case.block, at % case.block, padding, past)[2]
        _same(got, want.to(dtype), "not the key's values")
        if not problem.by_reference(dtype):
            read = function_of(case.op)
            again = read(problem.cache, slots, dtype=dtype, backend="torch", **problem.geometry)
            _same(got, again, "not what the reference reads")

    return call, (), check


def _gather(problem: _Problem, op: Callable[..., Any]) -> Parts:
    case, device = problem.case, problem.device
    lens = case.sequences()
    total, batch = sum(lens), len(lens)
    needed = max((-(-n // case.block) for n in lens), default=0)
    table = torch.zeros(batch, max(0, needed + case.table), dtype=torch.int32, device=device)
    cu = torch.zeros(batch + 1, dtype=problem.index, device=device)
    problem.inputs |= {"block_table": table, "cu_seq_lens": cu}
    rows, wide = total + case.behind, case.head + case.wider
    dtype = _DTYPES.get(case.dtype)
    if dtype is None:
        out: Any = (
            problem.output("out[0]", rows, case.head, torch.uint8, stride=wide),
            problem.output("out[1]", rows, 4, torch.uint8),
        )
        parts = out
    else:
        out = problem.output("out", rows, case.head, dtype, stride=wide)
        parts = (out,)

    def draw(step: int) -> None:
        g = torch.Generator().manual_seed(case.seed + step)
        cu.copy_(torch.tensor([0, *case.sequences(step)]).cumsum(0))
        past = 2 if case.past else 0
        first, drawn = case.kept[0], (max(case.batch, batch), table.shape[1])
        pages = torch.randint(-1, max(case.pages, 1) + past, drawn, generator=g)
        table.copy_(pages[first : first + batch])
        if not case.past and not case.pages:
            table.fill_(-1)

    problem.more = draw
    problem.fill(0)

    def call() -> torch.Tensor:
        op(problem.cache, table, cu, dtype=dtype, out=out, backend=case.backend,
           **problem.geometry)  # fmt: skip
        return parts[0]

    def check(got: torch.Tensor) -> None:
        sequence = torch.repeat_interleave(torch.arange(batch, device=device), cu.long().diff())
        at = torch.arange(total, device=device) - cu.long()[sequence]
        column = at // case.block
        inside = column < table.shape[1]
        page = torch.full_like(at, -1)
        page[inside] = table[sequence[inside], column[inside]].long()
        past = ~inside | (page >= case.pages)
        codes, scale, values = problem.wanted(page, at % case.block, inside & (page < 0), past)
        if dtype is None:
            _same(got[:total], codes, "not the key's bytes")
            word = parts[1][:total].reshape(-1).view(torch.float32)
            _same(word[:, None], scale[:, None], "not the key's scale")
        else:
            _same(got[:total], values.to(dtype), "not the key's values")
        for part in parts:
            behind = bits(part[total:])
            if not torch.equal(behind, bits(dirty(torch.empty_like(behind)))):
                raise Wrong("rows behind the last key were written to")
        if rows and not problem.by_reference(dtype or torch.uint8):
            again = tuple(p.clone().contiguous() for p in parts)
            function_of("gather")(
                problem.cache, table, cu, dtype=dtype, out=again if dtype is None else again[0],
                backend="torch", **problem.geometry,
            )  # fmt: skip
            for part, reference in zip(parts, again, strict=True):
                _same(part, reference, "not what the reference gathers")

    return call, parts[1:], check
