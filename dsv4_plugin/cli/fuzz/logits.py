"""Cases of the index logits, paged and ragged, and of the chain from logits to indices.

How they are run and checked is :mod:`.logits_run`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsv4_plugin.cli.fuzz.case import (
    CaseError,
    KeptCase,
    RequestsCase,
    flag,
    number,
    numbers,
    one_of,
)
from dsv4_plugin.cli.fuzz.topk import EACH_ROW, FORMS, smaller

__all__ = [
    "DTYPES",
    "LogitsCase",
    "PagedLogitsCase",
    "RaggedLogitsCase",
    "SelectCase",
    "draw_paged",
    "draw_ragged",
    "draw_select",
    "paged_case",
    "ragged_case",
]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)


@dataclass(frozen=True)
class LogitsCase(KeptCase):
    """What the calls that score keys have in common."""

    keep: str = numbers(("",), "first and last that are called with, of those drawn, a/b")
    heads: int = number(64, 1, 64, "heads of a query")
    head: int = number(128, 4, 1024, "values of a key, a multiple of 4")
    dtype: str = one_of(tuple(DTYPES), "of the scores")
    kind: str = one_of(("normal", "bytes"), "e4m3: as an engine quantises, or any byte")
    wide: int = flag("lengths, starts and ends are int64")
    nan: int = flag("a NaN in a query, a weight, a key and a scale")
    poison: int = flag("keys and scales that no row sees are NaN")
    codes: int = flag("queries and keys are handed over as uint8")
    q_gap: int = number(0, 0, 4096, "bytes between the queries of two rows")
    w_gap: int = number(0, 0, 4096, "elements between the weights of two rows")
    out: int = number(0, -1, 1 << 24, "columns of the scores; 0: all; -1: no tensor is given")
    gap: int = number(0, 0, 4096, "elements between two rows of the scores")
    offset: int = number(0, 0, 4096, "elements before the first row of the scores")
    graph: int = number(0, 0, 64, "replays of a CUDA graph with other content and lengths")

    @property
    def content(self) -> str:
        """Kind of queries and keys, as :mod:`dsv4_plugin.cli.checks.exact` calls it."""
        return self.kind

    @property
    def columns(self) -> int:
        """Keys that a row can see."""
        raise NotImplementedError

    @property
    def out_columns(self) -> int:
        """Columns of a result that is not given."""
        return self.columns

    @property
    def limit(self) -> int:
        """Keys that a row's length is clipped to."""
        return self.out if self.out > 0 else self.columns

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.head % 4:
            raise CaseError(f"head must be a multiple of 4, got {self.head}")

    def _plainer(self, **more: Any) -> Iterator[Any]:
        plain: dict[str, Any] = {
            "graph": 0, "wide": 0, "nan": 0, "poison": 0, "codes": 0, "q_gap": 0, "w_gap": 0,
            "gap": 0, "offset": 0, "out": 0, "backend": "auto", "head": 128, "dtype": "float32",
            "kind": "normal", **more,
        }  # fmt: skip
        for name, value in plain.items():
            if getattr(self, name) != value:
                yield self.but(**{name: value})
        for heads in (1, 2, 3, 4, 32, self.heads - 1):
            if 0 < heads < self.heads:
                yield self.but(heads=heads)
        if self.out > 1:
            for out in smaller(self.out):
                yield self.but(out=out)
        if self.graph > 1:
            yield self.but(graph=1)
        if self.seed > 1:
            yield self.but(seed=1)


@dataclass(frozen=True)
class PagedLogitsCase(LogitsCase, RequestsCase):
    """One call of the paged logits. Requests are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "paged_logits"
    requests: int = number(1, 1, 1 << 16, "requests that are drawn")
    next_n: int = number(1, 1, 64, "rows of a request")
    lengths: str = numbers(("full", "any"), "of the requests that are kept")
    form: str = one_of(FORMS, "shape of lengths")
    loose: int = flag("the lengths of a request's rows are up to 70 shorter, at random")
    width: int = number(1, 1, 1 << 16, "pages of the block table")
    block: int = number(64, 1, 1024, "keys of a page")
    pages: int = number(1, 0, 1 << 16, "pages of the cache")
    pad: int = number(0, 0, 1 << 31, "bytes between pages")
    view: int = number(2, 2, 4, "dimensions that the cache is handed over with")
    flat: int = flag("queries of three dimensions")
    table: str = one_of(
        ("ordered", "shuffled", "any", "same"), "pages; same: those of the first for all requests"
    )
    gone: int = flag("some pages are none")
    padding: str = one_of(("valid", "none", "far", "low"), "pages past the length")
    table_gap: int = number(0, 0, 4096, "elements between two rows of the block table")
    fp4: int = flag("FP4 keys, queries and weights of bfloat16")

    @property
    def content(self) -> str:
        """Kind of queries and keys."""
        return {"normal": "fp4", "bytes": "fp4 wide"}[self.kind] if self.fp4 else self.kind

    @property
    def key_bytes(self) -> tuple[int, int]:
        """Bytes of a key's values and of its scales."""
        return (self.head // 2, self.head // 32) if self.fp4 else (self.head, 4)

    @property
    def columns(self) -> int:
        """Columns of the block table."""
        return self.width * self.block

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.loose and self.form not in EACH_ROW:
            raise CaseError(f"loose needs a form with a length for every row, got {self.form}")
        if self.flat and self.next_n > 1:
            raise CaseError(f"flat needs next_n 1, got {self.next_n}")
        if (self.block * sum(self.key_bytes) + self.pad) % 4:
            raise CaseError("pages must be multiples of 4 bytes apart")
        if self.fp4 and (self.head % 32 or self.q_gap % 2 or self.dtype != "bfloat16"):
            raise CaseError("fp4 needs head of a multiple of 32, an even q_gap, dtype bfloat16")

    def requests_of(self, step: int) -> list[int]:
        """Return the lengths of the requests that are kept; ``step`` counts replays."""
        first, count = self.kept
        if self.lengths == "full":
            return [self.columns] * count
        if self.lengths != "any":
            return [int(x) for x in self.lengths.split("/")]
        r = random.Random(f"lengths {self.seed} {step}")
        columns = self.columns
        near = [x + r.randint(-2, 2) for x in (*_EDGES, self.block) if x <= columns]
        drawn = [
            r.choice((columns, columns - 1, columns + 9, r.randint(0, columns), r.choice(near),
                      r.choice(near), r.randint(0, columns), 0, 1, -1))
            for _ in range(self.requests)
        ]  # fmt: skip
        return drawn[first : first + count]

    def simpler(self, rows: list[int]) -> Iterator[PagedLogitsCase]:
        """Yield simpler cases, the simplest first."""
        first, count = self.kept
        lengths = self.requests_of(0)
        if count > 1:
            for row in rows[:3]:
                one = row // self.next_n
                yield self.but(keep=f"{first + one}/{first + one}", lengths=str(lengths[one]))
            for lo, n in ((0, count // 2), (count // 2, count - count // 2), (0, count - 1)):
                some = "/".join(map(str, lengths[lo : lo + n]))
                yield self.but(keep=f"{first + lo}/{first + lo + n - 1}", lengths=some)
        if self.lengths in ("full", "any") and count <= 64:
            yield self.but(lengths="/".join(map(str, lengths)))
        if self.keep:
            yield self.but(keep="", requests=count)
        if self.form != "rows":
            yield self.but(form="rows")
        plain: dict[str, Any] = {"dtype": "bfloat16", "fp4": 1} if self.fp4 else {}
        yield from self._plainer(
            loose=0, flat=0, gone=0, padding="valid", table="ordered", table_gap=0, pad=0, view=2,
            next_n=1, block=64, **plain,
        )  # fmt: skip
        if self.next_n > 2:
            yield self.but(next_n=2)
        for width in smaller(self.width):
            most = width * self.block
            fit = self.lengths
            if fit not in ("full", "any"):
                fit = "/".join(str(min(n, most)) for n in lengths)
            yield self.but(width=width, lengths=fit)
        for pages in smaller(self.pages):
            yield self.but(pages=pages)
        if self.lengths not in ("full", "any"):
            for at, length in enumerate(lengths[:4]):
                for n in smaller(max(length, 0)):
                    yield self.but(
                        lengths="/".join(map(str, [*lengths[:at], n, *lengths[at + 1 :]]))
                    )


@dataclass(frozen=True)
class SelectCase(PagedLogitsCase):
    """One call of the chain; ``out``, ``gap`` and ``offset`` are of its scratch."""

    op: ClassVar[str] = "select"
    k: int = number(512, 1, 2048, "k")
    sort: int = flag("sorted by value")
    page: int = number(0, -1, 4096, "columns of a page of page_table; 0: none; -1: block_table")
    raw: int = flag("out_raw beside the page table")
    picked: int = number(0, -1, 4096, "columns that out is wider than k; -1: no out is given")

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.raw and not self.page:
            raise CaseError("raw needs page")

    def _plainer(self, **more: Any) -> Iterator[Any]:
        yield from super()._plainer(**more, sort=0, raw=0, picked=0)
        if self.page:
            yield self.but(page=0, raw=0)
        for k in smaller(self.k):
            yield self.but(k=k)


@dataclass(frozen=True)
class RaggedLogitsCase(LogitsCase):
    """One call of the ragged logits. Rows are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "ragged_logits"
    queries: int = number(1, 1, 1 << 20, "rows that are drawn")
    keys: int = number(64, 0, 1 << 20, "keys")
    starts: str = numbers(("zero", "any"), "of the rows that are kept")
    ends: str = numbers(("full", "causal", "any"), "of the rows that are kept")
    k_offset: int = number(0, 0, 4096, "bytes before the first key")

    @property
    def units(self) -> int:
        """Rows that are drawn."""
        return self.queries

    @property
    def rows(self) -> int:
        """Rows of the call, once more for each replay."""
        return self.kept[1] * max(1, self.graph)

    @property
    def columns(self) -> int:
        """Keys that there are."""
        return self.keys

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        for name, words in (("starts", ("zero", "any")), ("ends", ("full", "causal", "any"))):
            listed = getattr(self, name).split("/")
            if listed[0] not in words and len(listed) != self.kept[1]:
                raise CaseError(f"{name} must have {self.kept[1]} entries, got {len(listed)}")

    def windows(self, step: int) -> tuple[list[int], list[int]]:
        """Return the starts and the ends of the rows that are kept."""
        first, count = self.kept
        r = random.Random(f"windows {self.seed} {step}")
        keys, rows = self.keys, self.queries
        starts, ends = [], []
        for row in range(rows):
            near = min(r.choice(_EDGES), keys)
            anywhere = r.randint(-3, keys + 3)
            start = r.choice((0, 0, near, keys - 1, keys, anywhere, anywhere, anywhere))
            start = 0 if self.starts == "zero" else start
            more = start + r.choice((0, 1, 63, 64, 65, -2))
            anywhere = r.randint(-3, keys + 20)
            end = r.choice((keys, more, more, anywhere, anywhere, keys + 1000, -5))
            causal = max(0, keys - rows + row + 1)
            starts.append(start)
            ends.append({"full": keys, "causal": causal}.get(self.ends, end))
        starts, ends = (x[first : first + count] for x in (starts, ends))
        if self.starts not in ("zero", "any"):
            starts = [int(x) for x in self.starts.split("/")]
        if self.ends not in ("full", "causal", "any"):
            ends = [int(x) for x in self.ends.split("/")]
        return starts, ends

    def simpler(self, rows: list[int]) -> Iterator[RaggedLogitsCase]:
        """Yield simpler cases, the simplest first."""
        first, count = self.kept
        starts, ends = self.windows(0)

        def listed(lo: int, n: int) -> dict[str, str]:
            part = slice(lo, lo + n)
            return {
                "starts": "/".join(map(str, starts[part])), "ends": "/".join(map(str, ends[part]))
            }  # fmt: skip

        if count > 1:
            parts = [(row, 1) for row in rows[:3]]
            half = count // 2
            for lo, n in (*parts, (0, half), (half, count - half), (0, count - 1)):
                yield self.but(keep=f"{first + lo}/{first + lo + n - 1}", **listed(lo, n))
        if "/" not in self.starts + self.ends and count <= 64:
            known = listed(0, count)
            if (known["starts"], known["ends"]) != (self.starts, self.ends):
                yield self.but(**known)
        if self.keep:
            yield self.but(keep="", queries=count)
        yield from self._plainer(k_offset=0)
        if count <= 4:
            for begin in (0, 1):
                if all(start == begin for start in starts):
                    break
                near = "/".join(str(begin) for _ in starts)
                yield self.but(starts=near)
                pairs = zip(starts, ends, strict=True)
                moved = "/".join(str(end - start + begin) for start, end in pairs)
                yield self.but(starts=near, ends=moved)
        for keys in smaller(self.keys):
            yield self.but(keys=keys)
        if count <= 4:
            for at, end in enumerate(ends):
                for n in smaller(max(end, 0)):
                    some = [*ends[:at], n, *ends[at + 1 :]]
                    yield self.but(starts=listed(0, count)["starts"], ends="/".join(map(str, some)))


# ---- Drawing -------------------------------------------------------------------------------------


def _common(r: random.Random, kind: type[Any], backends: tuple[str, ...]) -> tuple[Any, bool]:
    """Draw what all have, and whether it may be what only the torch form takes."""
    backend = r.choice([b for b in ("auto", *backends) if b != "triton"])
    odd = backend == "torch" or "cuda" not in backends or (backend == "auto" and r.random() < 0.1)
    case = kind(
        seed=r.randint(0, (1 << 31) - 1), backend=backend,
        heads=r.choice((64, 64, 64, 32, 32, *((1, 2, 7, 48) if odd else ()))),
        head=r.choice((128, 128, 128, 64, 36) if odd else (128,)),
        dtype=r.choice(list(DTYPES)), kind=r.choice(("normal", "bytes")), wide=r.randint(0, 1),
        nan=int(r.random() < 0.2), poison=r.randint(0, 1), codes=r.randint(0, 1),
        q_gap=r.choice((0, 0, 16, 128, *((1, 4, 9) if odd else ()))), w_gap=r.choice((0, 0, 1, 35)),
        gap=r.choice((0, 0, 1, 3, 7, 8, 100)), offset=r.choice((0, 0, 1, 3, 7, 8)),
        graph=r.choice((0, 0, 0, 0, 0, 0, 1, 3)),
    )  # fmt: skip
    return case, odd


def paged_case(
    r: random.Random,
    kind: type[Any],
    device: str,
    backends: tuple[str, ...],
    blocks: tuple[int, ...] = (64,),
) -> Any:
    """Draw a call on pages; ``blocks``: the keys a page that the CUDA kernel takes."""
    gpu = device == "cuda"
    case, odd = _common(r, kind, backends)
    block = r.choice((64, 64, 64, 64, 1, 3, 32, 100)) if odd else r.choice(blocks)
    most = 400_000 if gpu else 2400  # scores
    width = r.choice((1, 2, 3, 5, 17, 33, 130, r.randint(1, 700))) if gpu else r.randint(1, 4)
    width = max(1, min(width, most // block))
    next_n = r.choice((1, 1, 1, 2, 3, 4, 5, 6))
    batch = r.choice((1, 1, 2, 3, 8, 31, 66, 132, 133, 300) if gpu else (1, 2, 3, 5))
    batch = max(1, min(batch, most // (width * block * next_n)))
    enough = min(batch * width, 700)
    pages = r.choice((enough, enough, enough, 1, 7, 0 if r.random() < 0.2 else 2))
    size = block * (case.head + 4)
    pad = r.choice((0, 0, 16, 64, 448, 576)) + -size % 16
    pad += r.choice((0, 4, 8)) if odd else 0
    if gpu and r.random() < 0.02:  # page strides past what 32 bits count
        pages, pad = 4, (3 << 28) - size
    form = r.choice(FORMS)
    out = r.choice((-1, 0, 0, width * block + r.choice((1, 9, 64)), r.randint(1, width * block)))
    case = case.but(
        requests=batch, next_n=next_n, lengths=r.choice(("full", "any", "any", "any")), form=form,
        loose=int(form in EACH_ROW and r.random() < 0.4), width=width, block=block, pages=pages,
        pad=pad, view=r.choice((2, 2, 3, 4)), flat=int(next_n == 1 and r.random() < 0.3),
        table=r.choice(("shuffled", "shuffled", "any", "same", "ordered")),
        gone=int(r.random() < 0.3), padding=r.choice(("valid", "none", "far", "low")),
        table_gap=r.choice((0, 0, 1, 3, 60)), out=out,
    )  # fmt: skip
    return _fp4(case, odd) if random.Random(f"fp4 {case.seed}").random() < 0.3 else case


def _fp4(case: Any, odd: bool) -> Any:
    """Return the case with FP4 keys; ``odd``: it may be one that only the torch form takes."""
    block, head = case.block, case.head - case.head % 32
    if not odd:  # what the CUDA kernel takes, in as many columns
        block, head = 64, 128
    size = block * (head // 2 + head // 32)
    pad = case.pad + -(size + case.pad) % (4 if odd else 16)
    return case.but(
        fp4=1, dtype="bfloat16", heads=case.heads if odd else 32, head=head, block=block, pad=pad,
        width=max(1, case.columns // block), q_gap=case.q_gap - case.q_gap % 2, codes=0,
    )  # fmt: skip


def draw_paged(seed: int, device: str, backends: tuple[str, ...]) -> PagedLogitsCase:
    """Draw paged logits; on a GPU up to some 100 000 scores, elsewhere some thousand."""
    return paged_case(random.Random(f"paged_logits {seed}"), PagedLogitsCase, device, backends)


def draw_select(seed: int, device: str, backends: tuple[str, ...]) -> SelectCase:
    """Draw a chain."""
    r = random.Random(f"select {seed}")
    case = paged_case(r, SelectCase, device, backends)
    page = r.choice((0, 0, 0, -1, 1, 7, 64))
    return case.but(
        k=r.choice((512, 1024, 2048, 1, 3, 31, r.randint(1, 2048))), sort=int(r.random() < 0.4),
        page=page, raw=int(page != 0 and r.random() < 0.7), picked=r.choice((-1, 0, 0, 1, 5)),
    )  # fmt: skip


def draw_ragged(seed: int, device: str, backends: tuple[str, ...]) -> RaggedLogitsCase:
    """Draw ragged logits; on a GPU up to some 100 000 scores, elsewhere some thousand."""
    r = random.Random(f"ragged_logits {seed}")
    return ragged_case(r, RaggedLogitsCase, device, backends)


def ragged_case(r: random.Random, kind: type[Any], device: str, backends: tuple[str, ...]) -> Any:
    """Draw a call on gathered keys."""
    gpu = device == "cuda"
    case, odd = _common(r, kind, backends)
    most = 400_000 if gpu else 2400
    keys = r.choice((1, 64, 65, 300, 1500, 70_000, r.randint(0, 4000)) if gpu else (0, 1, 65, 200))
    rows = r.choice((1, 2, 7, 129, 300, 2000) if gpu else (1, 2, 7, 20))
    rows = max(1, min(rows, most // max(keys, 1)))
    out = r.choice((-1, 0, 0, keys + r.choice((1, 9, 64)), r.randint(1, max(keys, 1))))
    return case.but(
        queries=rows, keys=keys, starts=r.choice(("zero", "any", "any")),
        ends=r.choice(("full", "causal", "any", "any")),
        k_offset=r.choice((0, 16, *((1, 4, 7) if odd else ()))), out=out,
    )  # fmt: skip
