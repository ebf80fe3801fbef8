"""Cases of the index logits, paged and ragged, and of the chain from logits to indices.

:mod:`.logits_run` runs and checks them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from dsv4_plugin.cli.checks.topk_cases import DTYPES
from tests.fuzz.case import (
    FORMS,
    CaseError,
    KeptCase,
    RequestsCase,
    backend_of,
    flag,
    number,
    numbers,
    one_of,
)

__all__ = ["DTYPES", "LogitsCase", "PagedLogitsCase", "RaggedLogitsCase", "SelectCase"]

_EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)


@dataclass(frozen=True)
class LogitsCase(KeptCase):
    """What the calls that score keys have in common."""

    heads: int = number(64, 1, 64, "heads of a query", plain=1)
    head: int = number(128, 4, 1024, "values of a key, a multiple of 4")
    dtype: str = one_of(tuple(DTYPES), "of the scores", plain=("float32",))
    kind: str = one_of(("normal", "bytes"), "e4m3: as an engine quantises, or any byte")
    wide: int = flag("lengths, starts and ends are int64")
    nan: int = flag("a NaN in a query, a weight, a key and a scale", (0, 0, 0, 0, 1))
    poison: int = flag("keys and scales that no row sees are NaN")
    codes: int = flag("queries and keys are handed over as uint8")
    q_gap: int = number(0, 0, 4096, "bytes between the queries of two rows")
    w_gap: int = number(0, 0, 4096, "elements between the weights of two rows", (0, 0, 1, 35))
    out: int = number(0, -1, 1 << 24, "columns of the scores; 0: all; -1: no tensor is given")
    gap: int = number(
        0, 0, 4096, "elements between two rows of the scores", (0, 0, 1, 3, 7, 8, 100)
    )
    offset: int = number(
        0, 0, 4096, "elements before the first row of the scores", (0, 0, 1, 3, 7, 8)
    )
    graph: int = number(
        0, 0, 64, "replays of a CUDA graph with other content and lengths", (0,) * 6 + (1, 3)
    )

    # what pages the CUDA form of the op takes
    blocks: ClassVar[tuple[int, ...]] = (64,)

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

    @staticmethod
    def _common(r: random.Random, backends: tuple[str, ...]) -> tuple[dict[str, Any], bool]:
        """Draw what depends on who serves, and whether only the torch form need take it."""
        backend = backend_of(r, backends)
        odd = backend == "torch" or "cuda" not in backends
        odd = odd or (backend == "auto" and r.random() < 0.1)
        return {
            "backend": backend, "heads": r.choice((64, 64, 64, 32, 32, *((1, 2, 7, 48) * odd))),
            "head": r.choice((128, 128, 128, 64, 36) if odd else (128,)),
            "q_gap": r.choice((0, 0, 16, 128, *((1, 4, 9) * odd))),
        }, odd  # fmt: skip

    @classmethod
    def _some(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        """Draw a call of the kind; on a GPU up to some 100 000 scores, elsewhere some thousand."""
        raise NotImplementedError

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        return cls._some(r, gpu, backends)


@dataclass(frozen=True)
class PagedLogitsCase(LogitsCase, RequestsCase):
    """One call of the paged logits. Requests are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "paged_logits"
    loose: int = flag("the lengths of a request's rows are up to 70 shorter, at random", (0,))
    width: int = number(1, 1, 1 << 16, "pages of the block table")
    block: int = number(64, 1, 1024, "keys of a page")
    pages: int = number(1, 0, 1 << 16, "pages of the cache")
    pad: int = number(0, 0, 1 << 31, "bytes between pages")
    view: int = number(2, 2, 4, "dimensions that the cache is handed over with", (2, 2, 3, 4))
    flat: int = flag("queries of three dimensions", (0,))
    table: str = one_of(
        ("ordered", "shuffled", "any", "same"), "pages; same: those of the first for all requests",
        draw=("shuffled", "shuffled", "any", "same", "ordered"),
    )  # fmt: skip
    gone: int = flag("some pages are none", (0, 0, 1))
    padding: str = one_of(("valid", "none", "far", "low"), "pages past the length")
    table_gap: int = number(
        0, 0, 4096, "elements between two rows of the block table", (0, 0, 1, 3, 60)
    )
    fp4: int = flag("FP4 keys, queries and weights of bfloat16", (0, 0, 1))

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

    @property
    def context(self) -> int:
        """Keys of a full row."""
        return self.columns

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.loose and not FORMS[self.form]:
            raise CaseError(f"loose needs a form with a length for every row, got {self.form}")
        if self.flat and self.next_n > 1:
            raise CaseError(f"flat needs next_n 1, got {self.next_n}")
        if (self.block * sum(self.key_bytes) + self.pad) % 4:
            raise CaseError("pages must be multiples of 4 bytes apart")
        if self.fp4 and (self.head % 32 or self.q_gap % 2 or self.dtype != "bfloat16"):
            raise CaseError("fp4 needs head of a multiple of 32, an even q_gap, dtype bfloat16")

    def length(self, r: random.Random) -> int:
        """Draw the length of a request."""
        columns = self.columns
        edges = [x for x in (*_EDGES, self.block) if x <= columns]
        near = (r.choice(edges) + r.randint(-2, 2) for _ in range(2))
        anywhere = (r.randint(0, columns) for _ in range(2))
        return r.choice((columns, columns - 1, columns + 9, *anywhere, *near, 0, 1, -1))

    @classmethod
    def _some(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        common, odd = cls._common(r, backends)
        block = r.choice((64, 64, 64, 64, 1, 3, 32, 100) if odd else cls.blocks)
        most = 400_000 if gpu else 2400  # scores
        width = r.choice((1, 2, 3, 5, 17, 33, 130, r.randint(1, 700))) if gpu else r.randint(1, 4)
        width = max(1, min(width, most // block))
        next_n = r.choice((1, 1, 1, 2, 3, 4, 5, 6))
        batch = r.choice((1, 1, 2, 3, 8, 31, 66, 132, 133, 300) if gpu else (1, 2, 3, 5))
        batch = max(1, min(batch, most // (width * block * next_n)))
        enough = min(batch * width, 700)
        pages = r.choice((enough, enough, enough, 1, 7, 0 if r.random() < 0.2 else 2))
        size = block * (common["head"] + 4)
        pad = r.choice((0, 0, 16, 64, 448, 576)) + -size % 16
        pad += r.choice((0, 4, 8)) if odd else 0
        if gpu and r.random() < 0.02:  # page strides past what 32 bits count
            pages, pad = 4, (3 << 28) - size
        form, columns = r.choice(tuple(FORMS)), width * block
        case = cls.drawn(
            r, **common, requests=batch, next_n=next_n, form=form, width=width, block=block,
            pages=pages, pad=pad, loose=int(FORMS[form] and r.random() < 0.4),
            flat=int(next_n == 1 and r.random() < 0.3),
            out=r.choice((-1, 0, 0, columns + r.choice((1, 9, 64)), r.randint(1, columns))),
        )  # fmt: skip
        return case._with_fp4(odd) if case.fp4 else case

    def _with_fp4(self, odd: bool) -> Any:
        """Return the case with FP4 keys; ``odd``: it may be one that only the torch form takes."""
        block, head = self.block, self.head - self.head % 32
        if not odd:  # what the CUDA kernel takes, in as many columns
            block, head = 64, 128
        size = block * (head // 2 + head // 32)
        pad = self.pad + -(size + self.pad) % (4 if odd else 16)
        return self.but(
            fp4=1, dtype="bfloat16", heads=self.heads if odd else 32, head=head, block=block,
            pad=pad, width=max(1, self.columns // block), q_gap=self.q_gap - self.q_gap % 2,
            codes=0,
        )  # fmt: skip


@dataclass(frozen=True)
class SelectCase(PagedLogitsCase):
    """One call of the chain; ``out``, ``gap`` and ``offset`` are of its scratch."""

    op: ClassVar[str] = "select"
    k: int = number(512, 1, 2048, "k", (512, 1024, 2048, 1, 3, 31, range(1, 2049)), plain=1)
    sort: int = flag("sorted by value", (0, 0, 0, 1, 1))
    page: int = number(
        0, -1, 4096, "columns of a page of page_table; 0: none; -1: block_table",
        (0, 0, 0, -1, 1, 7, 64),
    )  # fmt: skip
    raw: int = flag("out_raw beside the page table", (0,))
    picked: int = number(
        0, -1, 4096, "columns that out is wider than k; -1: no out is given", (-1, 0, 0, 1, 5)
    )

    def check(self) -> None:
        """Raise :class:`CaseError` unless the case means a call."""
        super().check()
        if self.raw and not self.page:
            raise CaseError("raw needs page")

    @classmethod
    def _draw(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        case = cls._some(r, gpu, backends)
        return case.but(raw=int(case.page != 0 and r.random() < 0.7))


@dataclass(frozen=True)
class RaggedLogitsCase(LogitsCase):
    """One call of the ragged logits. Rows are drawn, ``keep`` leaves some of them."""

    op: ClassVar[str] = "ragged_logits"
    queries: int = number(1, 1, 1 << 20, "rows that are drawn")
    keys: int = number(64, 0, 1 << 20, "keys", plain=1)
    starts: str = numbers(("zero", "any"), "of the rows that are kept", ("zero", "any", "any"))
    ends: str = numbers(
        ("full", "causal", "any"), "of the rows that are kept", ("full", "causal", "any", "any")
    )
    k_offset: int = number(0, 0, 4096, "bytes before the first key")
    one_request: int = flag("what the call is told of the rows, right or wrong", (0, 1))

    unit, listable = "queries", ("starts", "ends")

    @property
    def rows(self) -> int:
        """Rows of the call, once more for each replay."""
        return self.kept[1] * max(1, self.graph)

    @property
    def columns(self) -> int:
        """Keys that there are."""
        return self.keys

    def lists(self) -> dict[str, list[int]]:
        """Return the windows."""
        return dict(zip(self.listable, self.windows(0), strict=True))

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
        kept = slice(first, first + count)
        listed = self.listed("starts"), self.listed("ends")
        return listed[0] or starts[kept], listed[1] or ends[kept]

    def simpler(self, rows: list[int]) -> Iterator[Any]:
        """Yield simpler cases; windows that are moved to the first keys among them."""
        yield from super().simpler(rows)
        starts, ends = self.windows(0)
        for begin in (0, 1):
            if len(starts) > 4 or all(start == begin for start in starts):
                break
            near = "/".join(str(begin) for _ in starts)
            pairs = zip(starts, ends, strict=True)
            moved = "/".join(str(end - start + begin) for start, end in pairs)
            yield self.but(starts=near)
            yield self.but(starts=near, ends=moved)

    @classmethod
    def _some(cls, r: random.Random, gpu: bool, backends: tuple[str, ...]) -> Any:
        common, odd = cls._common(r, backends)
        most = 400_000 if gpu else 2400
        anywhere = r.randint(0, 4000)
        keys = r.choice((1, 64, 65, 300, 1500, 70_000, anywhere) if gpu else (0, 1, 65, 200))
        rows = r.choice((1, 2, 7, 129, 300, 2000) if gpu else (1, 2, 7, 20))
        return cls.drawn(
            r, **common, queries=max(1, min(rows, most // max(keys, 1))), keys=keys,
            k_offset=r.choice((0, 16, *((1, 4, 7) * odd))),
            out=r.choice((-1, 0, 0, keys + r.choice((1, 9, 64)), r.randint(1, max(keys, 1)))),
        )  # fmt: skip
