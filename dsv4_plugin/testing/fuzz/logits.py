"""Random calls of the index logits, paged and ragged, and of the chain from logits to indices.

Scores are held against float64 (:mod:`dsv4_plugin.testing.logits.exact`), and, bit for bit, against
those of rows that are computed alone and in a reversed batch. The chain must give what the top-k
gives on the paged logits. What lies past a row's length in ``out`` must stay as it was, keys that
no row sees may be NaN, and guard zones lie around all inputs and outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dsv4_plugin import checks
from dsv4_plugin.backends import Call, choose
from dsv4_plugin.testing.canary import Guarded
from dsv4_plugin.testing.fuzz.case import Case, CaseError, flag, number, numbers, one_of
from dsv4_plugin.testing.fuzz.topk import EACH_ROW, FORMS, lengths_tensor, smaller
from dsv4_plugin.testing.logits import exact
from dsv4_plugin.testing.oracles import Wrong, check_selection, same_bits

__all__ = [
    "PagedLogitsCase",
    "RaggedLogitsCase",
    "SelectCase",
    "draw_paged",
    "draw_ragged",
    "draw_select",
    "op_of",
    "run",
]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DIRT = 0xAB  # the bytes that outputs are filled with
_NOWHERE = (-1, (1 << 31) - 1, -(1 << 31))  # no pages of any cache
_EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)


@dataclass(frozen=True)
class _LogitsCase(Case):
    keep: str = numbers(("",), "first and last that are called with, of those drawn, a/b")
    heads: int = number(64, 1, 1024, "heads of a query")
    head: int = number(128, 4, 1024, "values of a key, a multiple of 4")
    dtype: str = one_of(tuple(_DTYPES), "of the scores")
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
    def units(self) -> int:
        """What ``keep`` chooses from."""
        raise NotImplementedError

    @property
    def kept(self) -> tuple[int, int]:
        """The first that is kept, and how many."""
        if not self.keep:
            return 0, self.units
        ends = [int(part) for part in self.keep.split("/")]
        return ends[0], ends[-1] - ends[0] + 1

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        first, count = self.kept
        if first < 0 or count < 1 or first + count > self.units:
            raise CaseError(f"keep must be two of {self.units}, got {self.keep}")
        if self.head % 4:
            raise CaseError(f"head must be a multiple of 4, got {self.head}")

    def _plainer(self, **more: Any) -> Iterator[Any]:
        plain: dict[str, Any] = {
            "graph": 0, **more, "wide": 0, "nan": 0, "poison": 0, "codes": 0, "q_gap": 0,
            "w_gap": 0, "gap": 0, "offset": 0, "out": 0, "backend": "auto", "head": 128,
            "dtype": "float32", "kind": "normal",
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
class PagedLogitsCase(_LogitsCase):
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

    @property
    def units(self) -> int:
        """Requests that are drawn."""
        return self.requests

    @property
    def rows(self) -> int:
        """Rows of the call, once more for each replay."""
        return self.kept[1] * self.next_n * max(1, self.graph)

    @property
    def columns(self) -> int:
        """Columns of the block table."""
        return self.width * self.block

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        count, listed = self.kept[1], self.lengths.split("/")
        if self.lengths not in ("full", "any") and len(listed) != count:
            raise CaseError(f"lengths must have {count} entries, got {len(listed)}")
        if self.loose and self.form not in EACH_ROW:
            raise CaseError(f"loose needs a form with a length for every row, got {self.form}")
        if self.flat and self.next_n > 1:
            raise CaseError(f"flat needs next_n 1, got {self.next_n}")
        if (self.block * (self.head + 4) + self.pad) % 4:
            raise CaseError("pages must be multiples of 4 bytes apart")

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
        yield from self._plainer(
            loose=0, flat=0, gone=0, padding="valid", table="ordered", table_gap=0, pad=0, view=2,
            next_n=1, block=64,
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
class RaggedLogitsCase(_LogitsCase):
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
        """Columns of a result that is not given."""
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
        if count <= 4 and any(starts):
            none = "/".join("0" for _ in starts)
            yield self.but(starts=none)
            pairs = zip(starts, ends, strict=True)
            yield self.but(starts=none, ends="/".join(str(end - start) for start, end in pairs))
        for keys in smaller(self.keys):
            yield self.but(keys=keys)
        if count <= 4:
            for at, end in enumerate(ends):
                for n in smaller(max(end, 0)):
                    some = [*ends[:at], n, *ends[at + 1 :]]
                    yield self.but(starts=listed(0, count)["starts"], ends="/".join(map(str, some)))


# ---- Drawing -------------------------------------------------------------------------------------


def _common(r: random.Random, kind: type[Any], backends: tuple[str, ...]) -> Any:
    """Draw what all have; what only the torch form takes, for it and now and then for auto."""
    backend = r.choice([b for b in ("auto", *backends) if b != "triton"])
    odd = backend == "torch" or "cuda" not in backends or (backend == "auto" and r.random() < 0.1)
    case = kind(
        seed=r.randint(0, (1 << 31) - 1), backend=backend,
        heads=r.choice((64, 64, 64, 32, 32, *((1, 2, 7, 48) if odd else ()))),
        head=r.choice((128, 128, 128, 64, 36) if odd else (128,)),
        dtype=r.choice(list(_DTYPES)), kind=r.choice(("normal", "bytes")), wide=r.randint(0, 1),
        nan=int(r.random() < 0.2), poison=r.randint(0, 1), codes=r.randint(0, 1),
        q_gap=r.choice((0, 0, 16, 128, *((1, 4, 9) if odd else ()))), w_gap=r.choice((0, 0, 1, 35)),
        gap=r.choice((0, 0, 1, 3, 7, 8, 100)), offset=r.choice((0, 0, 1, 3, 7, 8)),
        graph=r.choice((0, 0, 0, 0, 0, 0, 1, 3)),
    )  # fmt: skip
    return case, odd


def _paged(r: random.Random, kind: type[Any], device: str, backends: tuple[str, ...]) -> Any:
    gpu = device == "cuda"
    case, odd = _common(r, kind, backends)
    block = r.choice((64, 64, 64, 64, 1, 3, 32, 100)) if odd else 64
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
    return case.but(
        requests=batch, next_n=next_n, lengths=r.choice(("full", "any", "any", "any")), form=form,
        loose=int(form in EACH_ROW and r.random() < 0.4), width=width, block=block, pages=pages,
        pad=pad, view=r.choice((2, 2, 3, 4)), flat=int(next_n == 1 and r.random() < 0.3),
        table=r.choice(("shuffled", "shuffled", "any", "same", "ordered")),
        gone=int(r.random() < 0.3), padding=r.choice(("valid", "none", "far", "low")),
        table_gap=r.choice((0, 0, 1, 3, 60)), out=out,
    )  # fmt: skip


def draw_paged(seed: int, device: str, backends: tuple[str, ...]) -> PagedLogitsCase:
    """Draw paged logits; on a GPU up to some 100 000 scores, elsewhere some thousand."""
    return _paged(random.Random(f"paged_logits {seed}"), PagedLogitsCase, device, backends)


def draw_select(seed: int, device: str, backends: tuple[str, ...]) -> SelectCase:
    """Draw a chain."""
    r = random.Random(f"select {seed}")
    case = _paged(r, SelectCase, device, backends)
    page = r.choice((0, 0, 0, -1, 1, 7, 64))
    return case.but(
        k=r.choice((512, 1024, 2048, 1, 3, 31, r.randint(1, 2048))), sort=int(r.random() < 0.4),
        page=page, raw=int(page != 0 and r.random() < 0.7), picked=r.choice((-1, 0, 0, 1, 5)),
    )  # fmt: skip


def draw_ragged(seed: int, device: str, backends: tuple[str, ...]) -> RaggedLogitsCase:
    """Draw ragged logits; on a GPU up to some 100 000 scores, elsewhere some thousand."""
    r = random.Random(f"ragged_logits {seed}")
    gpu = device == "cuda"
    case, odd = _common(r, RaggedLogitsCase, backends)
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


# ---- The tensors of a case -----------------------------------------------------------------------


class _Problem:
    """The tensors of a case; :meth:`fill` gives those in place the content of a step."""

    batch: int
    next_n: int

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device = case, device
        self.index = torch.int64 if case.wide else torch.int32
        self.guards: list[tuple[str, Guarded]] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        size = case.heads * case.head
        self.bytes = self.guarded("q", self.rows, size, torch.uint8, stride=size + case.q_gap)
        self.weights = self.guarded(
            "weights", self.rows, case.heads, torch.float32, stride=case.heads + case.w_gap
        )

    @property
    def rows(self) -> int:
        return self.batch * self.next_n

    def guarded(
        self,
        name: str,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        given: bool = True,
        **more: int,
    ) -> Any:
        held = Guarded(rows, columns, dtype, device=self.device, **more)
        self.guards.append((name, held))
        if given:
            self.inputs[name] = held.inside
        return held.inside

    def scratch(self) -> torch.Tensor | None:
        """Make the tensor that scores are written to; None if none is given."""
        case = self.case
        if case.out < 0:
            return None
        columns = case.out or case.columns
        return dirty(self.guarded(
            "out", self.rows, columns, _DTYPES[case.dtype], given=False,
            stride=columns + case.gap, offset=case.offset,
        ))  # fmt: skip

    def _draw_queries(self, g: torch.Generator, units: int, r: random.Random) -> None:
        """Fill queries and weights; ``units`` are drawn, those that are kept are taken."""
        case = self.case
        rows, first = units * self.next_n, case.kept[0] * self.next_n
        q = exact.codes((rows, case.heads * case.head), case.kind, g).view(torch.uint8)
        weights = torch.randn(rows, case.heads, generator=g, device=self.device) * 0.1
        if case.nan:
            q[r.randrange(rows), r.randrange(q.shape[1])] = 0x7F
            weights[r.randrange(rows), r.randrange(case.heads)] = torch.nan
        self.bytes.copy_(q[first : first + self.rows])
        self.weights.copy_(weights[first : first + self.rows])

    def _draw_keys(self, g: torch.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw bytes and scales of keys: powers of two, as engines write them, and odd ones."""
        codes = exact.codes((n, self.case.head), self.case.kind, g).view(torch.uint8)
        some: Any = {"generator": g, "device": self.device}
        scale = torch.exp2(torch.randint(-12, 4, (n,), **some).float())
        odd = torch.rand(n, **some) < 0.5
        return codes, scale * torch.rand(n, **some).where(odd, 1.0)

    def typed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return bytes as they are handed over."""
        return codes if self.case.codes else codes.view(torch.float8_e4m3fn)

    def remember(self) -> None:
        """Keep the inputs, which a call must leave as they are."""
        self._before = {name: x.clone() for name, x in self.inputs.items()}

    def check_inputs(self) -> None:
        """Raise :class:`Wrong` if an input was written to."""
        for name, before in self._before.items():
            now = self.inputs[name]
            words = torch.int32 if now.is_floating_point() else now.dtype
            if not torch.equal(before.view(words), now.view(words)):
                raise Wrong(f"{name} was written to")

    # What the two kinds of calls differ in.

    def fill(self, step: int) -> None:
        raise NotImplementedError

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the call, its result left out."""
        raise NotImplementedError

    def keywords(self) -> dict[str, Any]:
        return {}

    def take(self, rows: torch.Tensor, next_n: int) -> tuple[Any, ...]:
        """Return the arguments of a call of some rows, ``next_n`` a request."""
        raise NotImplementedError

    def served(self) -> str:
        """Return the implementation that the case calls."""
        raise NotImplementedError

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and magnitudes ``[rows, columns]``."""
        raise NotImplementedError

    def counts(self, columns: int) -> torch.Tensor:
        """Return how many scores each row has in a result of so many columns."""
        raise NotImplementedError

    def _served(self, keys: torch.Tensor, **more: int) -> str:
        case = self.case
        call = Call(
            "ragged_logits" if isinstance(case, RaggedLogitsCase) else "paged_logits",
            self.bytes.device, _DTYPES[case.dtype], head_dim=case.head, heads=case.heads,
            alignment=checks.alignment(keys, self.bytes), **more,
        )  # fmt: skip
        return choose(call, case.backend)


class _PagedProblem(_Problem):
    def __init__(self, case: PagedLogitsCase, device: str) -> None:
        self.batch, self.next_n = case.kept[1], case.next_n
        super().__init__(case, device)
        row = case.head + 4
        size = case.block * row
        self.pages = self.guarded(
            "the cache", case.pages, size, torch.uint8, stride=size + case.pad
        )
        shape = {2: (size,), 3: (case.block, row), 4: (case.block, 1, row)}[case.view]
        inner = {2: (1,), 3: (row, 1), 4: (row, row, 1)}[case.view]
        self.cache = self.pages.as_strided(
            (case.pages, *shape), (size + case.pad, *inner), self.pages.storage_offset()
        )
        self.table = self.guarded(
            "block_table", self.batch, case.width, torch.int32, stride=case.width + case.table_gap
        )
        self.lengths = lengths_tensor(case.form, self.batch, case.next_n, self.index, device)
        self.inputs["lengths"] = self.lengths
        self.per_row = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.page_table: torch.Tensor | None = None
        if isinstance(case, SelectCase) and case.page:
            width = -(-case.columns // case.page)
            self.page_table = self.table if case.page < 0 else self.guarded(
                "page_table", self.batch, width, torch.int32, stride=width + 3
            )  # fmt: skip
        self.fill(0)

    def fill(self, step: int) -> None:
        case, device = self.case, self.device
        seed = case.seed + step
        r = random.Random(f"content {seed}")
        g = torch.Generator(device=device).manual_seed(seed)
        self._draw_queries(g, case.requests, r)
        self._draw_lengths(step)
        self._draw_table(torch.Generator().manual_seed(seed))
        split = case.block * case.head
        codes, scale = self._draw_keys(g, case.pages * case.block)
        self.pages[:, :split].copy_(codes.view(case.pages, split))
        self.pages[:, split:].copy_(scale.view(torch.uint8).view(case.pages, 4 * case.block))
        values = self.pages[:, :split].unflatten(1, (case.block, case.head))
        scales = self.pages[:, split:].unflatten(1, (case.block, 4))
        if case.nan and case.pages:
            at = r.randrange(case.pages), r.randrange(case.block)
            values[at][r.randrange(case.head)] = 0xFF
            scales[r.randrange(case.pages), r.randrange(case.block)] = 0xFF
        if case.poison and case.pages:
            unseen = torch.arange(case.block, device=device) >= self._seen()[:, None]
            values.masked_fill_(unseen[:, :, None], 0x7F)
            scales.masked_fill_(unseen[:, :, None], 0xFF)
        if self.page_table is not None and self.page_table is not self.table:
            shape = case.requests, self.page_table.shape[1]
            slots = torch.randint(-1, 10_000, shape, generator=torch.Generator().manual_seed(seed))
            self.page_table.copy_(slots[case.kept[0] :][: self.batch])
        self.remember()

    def _draw_lengths(self, step: int) -> None:
        case, device = self.case, self.device
        lengths = torch.tensor(case.requests_of(step), dtype=torch.int64, device=device)
        if case.loose:
            g = torch.Generator().manual_seed(case.seed + step)
            less = torch.randint(0, 71, (case.requests, case.next_n), generator=g)
            ahead = -less[case.kept[0] :][: self.batch].to(device)
        else:
            ahead = torch.arange(1 - case.next_n, 1, device=device)
        self.per_row.copy_((lengths[:, None] + ahead).reshape(-1))
        each = case.form in EACH_ROW
        self.lengths.copy_((self.per_row if each else lengths).view(self.lengths.shape))

    def _needed(self) -> torch.Tensor:
        """Return how many keys of each entry of the table some row sees."""
        case = self.case
        n = self.counts(case.out if case.out > 0 else case.columns)
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

    def _queries(self) -> torch.Tensor:
        case, stride = self.case, self.bytes.stride(0)
        shape = self.batch, case.next_n, case.heads, case.head
        steps = case.next_n * stride, stride, case.head, 1
        q = self.bytes.as_strided(shape, steps, self.bytes.storage_offset())
        return self.typed(q[:, 0] if case.flat else q)

    def arguments(self) -> tuple[Any, ...]:
        return self._queries(), self.cache, self.weights, self.lengths, self.table

    def keywords(self) -> dict[str, Any]:
        return {"block_size": self.case.block}

    def take(self, rows: torch.Tensor, next_n: int) -> tuple[Any, ...]:
        q = self.bytes[rows].view(-1, next_n, self.case.heads, self.case.head)
        table = self.table[rows[::next_n] // self.next_n]
        return self.typed(q), self.cache, self.weights[rows], self.per_row[rows], table

    def served(self) -> str:
        return self._served(self.pages, block_size=self.case.block)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        q = self.bytes.contiguous().view(self.batch, case.next_n, case.heads, case.head)
        return exact.paged(q, self.pages, self.weights, self.table, case.block)

    def counts(self, columns: int) -> torch.Tensor:
        return self.per_row.clamp(0, min(columns, self.case.columns))


class _RaggedProblem(_Problem):
    def __init__(self, case: RaggedLogitsCase, device: str) -> None:
        self.batch, self.next_n = case.kept[1], 1
        super().__init__(case, device)
        keys, size = case.keys, case.keys * case.head
        held = self.guarded("k", 1, size, torch.uint8, offset=case.k_offset)
        self.k = held.view(keys, case.head)
        self.scale = self.guarded("k_scale", 1, keys, torch.float32)[0]
        self.starts, self.ends = (
            self.guarded(name, 1, self.rows, self.index)[0] for name in ("row_starts", "row_ends")
        )
        self.fill(0)

    def fill(self, step: int) -> None:
        case, device = self.case, self.device
        seed = case.seed + step
        r = random.Random(f"content {seed}")
        g = torch.Generator(device=device).manual_seed(seed)
        self._draw_queries(g, case.queries, r)
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
            n = self.counts(case.out if case.out > 0 else case.columns)
            edge = torch.zeros(case.keys + 1, dtype=torch.int64, device=device)
            begin = self.starts.long().clamp(0, case.keys)
            one = torch.ones_like(n)
            edge.scatter_add_(0, begin, one).scatter_add_(0, (begin + n).clamp(max=case.keys), -one)
            unseen = edge.cumsum(0)[:-1] == 0
            self.k.masked_fill_(unseen[:, None], 0x7F)
            self.scale.masked_fill_(unseen, torch.nan)
        self.remember()

    def arguments(self) -> tuple[Any, ...]:
        return self._of(self.bytes, self.weights, self.starts, self.ends)

    def _of(self, codes: torch.Tensor, *more: torch.Tensor) -> tuple[Any, ...]:
        q = self.typed(codes.unflatten(1, (self.case.heads, self.case.head)))
        return q, self.typed(self.k), self.scale, *more

    def take(self, rows: torch.Tensor, next_n: int) -> tuple[Any, ...]:
        return self._of(
            self.bytes[rows], *(x[rows] for x in (self.weights, self.starts, self.ends))
        )

    def served(self) -> str:
        return self._served(self.k)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.bytes.contiguous().unflatten(1, (self.case.heads, self.case.head))
        return exact.ragged(q, self.k, self.scale, self.weights, self.starts, self.ends)[:2]

    def counts(self, columns: int) -> torch.Tensor:
        start = self.starts.long()
        n = (self.ends.long().clamp(max=self.case.keys) - start).masked_fill(start < 0, 0)
        return n.clamp(0, min(columns, self.case.keys))


# ---- Running and checking ------------------------------------------------------------------------


def run(case: Any, device: str, op: Callable[..., Any]) -> None:
    """Run a case with ``op`` and raise :class:`Wrong` for what is not as promised."""
    kind = _RaggedProblem if isinstance(case, RaggedLogitsCase) else _PagedProblem
    problem = kind(case, device)
    prepare = _select if isinstance(case, SelectCase) else _logits
    call, clean, check = prepare(problem, op)
    answer = call()
    if case.graph:
        replay: Callable[[], Any] = call
        if device == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = call()
            replay = graph.replay
        for step in range(case.graph):
            problem.fill(step)
            clean()
            dirty(answer)
            # Without a GPU a replay is a call, and may give another tensor.
            again = replay()
            problem.check_inputs()
            check(answer if again is None else again, f"replay {step}: ")
    else:
        problem.check_inputs()
        check(answer, "")
    for name, held in problem.guards:
        fault = held.fault()
        if fault:
            raise Wrong(f"around {name}: {fault}")


_Parts = tuple[Callable[[], torch.Tensor], Callable[[], Any], Callable[[torch.Tensor, str], None]]


def _logits(problem: Any, op: Callable[..., Any]) -> _Parts:
    case = problem.case
    dtype = _DTYPES[case.dtype]
    out = problem.scratch()
    shape = problem.rows, case.columns if out is None else out.shape[1]

    def call() -> torch.Tensor:
        return op(
            *problem.arguments(), dtype=dtype, out=out, backend=case.backend, **problem.keywords()
        )

    def check(got: torch.Tensor, context: str) -> None:
        if (tuple(got.shape), got.dtype) != (shape, dtype):
            raise Wrong(f"{context}the answer is {got.dtype} {tuple(got.shape)}")
        n = problem.counts(shape[1])
        inside = torch.arange(shape[1], device=got.device) < n[:, None]
        if out is not None:
            untouched = dirty(torch.empty_like(got, memory_format=torch.contiguous_format))
            _raise(
                ~inside & (_bits(got) != _bits(untouched)),
                f"{context}a score past a row's length was written",
            )
        _against_float64(problem, got, inside, context)
        _against_itself(problem, op, got, inside, context)

    return call, lambda: None, check


def _against_float64(problem: Any, got: torch.Tensor, inside: torch.Tensor, context: str) -> None:
    score, size = problem.exact()
    columns = min(got.shape[1], score.shape[1])
    served = problem.served()
    wrong, low, high = exact.outside(
        got[:, :columns], score[:, :columns], size[:, :columns],
        exact.TOLERANCE[served, problem.case.kind],
    )  # fmt: skip

    def values(row: int, column: int) -> str:
        ends = float(low[row, column]), float(high[row, column])
        return f"{float(got[row, column])}, not {ends[0]} to {ends[1]}"

    _raise(wrong & inside[:, :columns], f"{context}a score is not the one of float64", values)


def _against_itself(
    problem: Any, op: Callable[..., Any], got: torch.Tensor, inside: torch.Tensor, context: str
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
        _raise(inside & ~same_bits(turned, got), f"{context}another score in a reversed batch")
    if rows > 1:
        drawn = random.Random(f"alone {case.seed}").randrange(rows)
        some = sorted({0, drawn, rows - 1})
        alone = torch.cat([again(every[row : row + 1], 1) for row in some])
        different = torch.zeros_like(inside)
        different[some] = ~same_bits(alone, got[some])
        _raise(inside & different, f"{context}another score where a row is alone")


def _select(problem: Any, op: Callable[..., Any]) -> _Parts:
    case = problem.case
    dtype = _DTYPES[case.dtype]
    scratch = problem.scratch()
    rows, k = problem.rows, case.k
    columns = min(case.columns, case.columns if scratch is None else scratch.shape[1])

    def indices(name: str) -> torch.Tensor:
        stride = k + max(0, case.picked)
        return dirty(problem.guarded(name, rows, k, torch.int32, given=False, stride=stride))

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

    def clean() -> None:
        for tensor in (raw, scratch):
            if tensor is not None:
                dirty(tensor)

    def check(got: torch.Tensor, context: str) -> None:
        from dsv4_plugin import paged_logits, topk

        if (tuple(got.shape), got.dtype) != ((rows, k), torch.int32):
            raise Wrong(f"{context}the answer is {got.dtype} {tuple(got.shape)}")
        logits = dirty(torch.empty(rows, columns, dtype=dtype, device=got.device))
        paged_logits(*problem.arguments(), out=logits, backend=case.backend, **problem.keywords())
        index = got if problem.page_table is None else raw
        if index is not None:
            try:
                check_selection(logits, problem.per_row, k, index, sort=bool(case.sort))
            except Wrong as wrong:
                raise Wrong(f"{context}{wrong}", wrong.rows) from None
        want_raw = None if raw is None else torch.empty_like(raw)
        want = topk(logits, problem.lengths, k, next_n=case.next_n, out_raw=want_raw, **paging)
        for name, a, b in (("an index", got, want), ("a raw index", raw, want_raw)):
            if a is None or b is None:
                continue
            if not case.sort:  # the order is nobody's promise
                a, b = a.sort(1).values, b.sort(1).values
            _raise(a != b, f"{context}{name} is not that of the two ops")

    return call, clean, check


def dirty(x: torch.Tensor) -> torch.Tensor:
    """Fill a result, in place, with what no call would write."""
    x.view(torch.uint8).fill_(_DIRT)
    return x


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _raise(
    wrong: torch.Tensor, why: str, values: Callable[[int, int], str] = lambda row, column: ""
) -> None:
    """Raise :class:`Wrong` if any element is."""
    if not bool(wrong.any()):
        return
    rows = wrong.any(1).nonzero().reshape(-1).tolist()
    column = int(wrong[rows[0]].nonzero()[0])
    found = values(rows[0], column)
    raise Wrong(
        f"{why}, in {len(rows)} of {len(wrong)} rows, first {rows[0]}, column {column}"
        + (f": {found}" if found else ""),
        rows,
    )


def op_of(name: str) -> Callable[..., Any]:
    """Return the public function of an op."""
    import dsv4_plugin as ours

    functions: dict[str, Callable[..., Any]] = {
        "paged_logits": ours.paged_logits,
        "ragged_logits": ours.ragged_logits,
        "select": ours.select,
    }
    return functions[name]
