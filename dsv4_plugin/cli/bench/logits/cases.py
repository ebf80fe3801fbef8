"""The cases of ``bench logits`` and ``bench chain``, and the tensors of each.

Keys are N(0,1), quantised as the engines do it (one scale per key, its largest value over 448).
Pages are shuffled over the cache. A :class:`Case` with ``k`` is a cell of the chain.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from dsv4_plugin.cli.checks.topk_cases import DTYPES
from dsv4_plugin.cli.shared.choices import KS
from dsv4_plugin.cli.shared.choices import LOGITS_SUITES as SUITES

__all__ = [
    "CHAIN_SHAPES", "DTYPES", "KEY_BYTES", "KS", "PAGE_SIZE", "SUITES", "Case", "Paged", "Ragged",
    "chain", "suite",
]  # fmt: skip

HEADS, HEAD_DIM, PAGE_SIZE = 64, 128, 64
KEY_BYTES = HEAD_DIM + 4  # 128 e4m3 values and a float32 scale
MOST_CACHE = 40 << 30
E4M3_MAX = 448.0

DEFAULT_DTYPES = ("bfloat16", "float32")

# Requests and keys of each.
BATCHES = (1, 8, 32, 128)
CONTEXTS = (8192, 16_384, 32_768, 65_536, 131_072, 256_000)
NEXT_N = (1, 2, 4)
NEXT_N_SHAPES = ((1, 65_536), (8, 65_536), (32, 16_384), (128, 8192))
VARIED_SHAPES = ((8, 65_536), (32, 65_536), (32, 256_000), (128, 16_384))
PREFILL_SHAPES = ((2048, 8192), (2048, 32_768), (8192, 8192))  # queries, keys

CHAIN_SHAPES = (
    *((batch, columns) for batch in (1, 8, 32) for columns in (8192, 65_536, 256_000)),
    *((batch, columns) for batch in (64, 128) for columns in (8192, 65_536)),
)


@dataclasses.dataclass
class Paged:
    """The tensors of a decode call."""

    q: torch.Tensor  # e4m3 [batch, next_n, heads, head_dim]
    cache: torch.Tensor  # uint8 [pages, 64, 1, 132], page-planar
    weights: torch.Tensor  # float32 [rows, heads]
    lengths: torch.Tensor  # int32 [batch, next_n]
    block_table: torch.Tensor  # int32 [batch, pages of the longest]

    @property
    def n(self) -> torch.Tensor:
        """The number of scores of every row."""
        return self.lengths.flatten()

    def keys(self, row: int, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the e4m3 keys and the scales of some columns of a row."""
        pages = self.cache.flatten(1)
        page = self.block_table[row // self.q.shape[1]].long()[columns // PAGE_SIZE]
        slot = columns % PAGE_SIZE
        values = pages[:, : PAGE_SIZE * HEAD_DIM].unflatten(1, (PAGE_SIZE, HEAD_DIM))
        scales = pages[:, PAGE_SIZE * HEAD_DIM :].unflatten(1, (PAGE_SIZE, 4))
        scale = scales[page, slot].contiguous().view(torch.float32)[:, 0]
        return values[page, slot].view(torch.float8_e4m3fn), scale

    def queries(self, row: int) -> torch.Tensor:
        """Return the queries of a row, ``[heads, head_dim]``."""
        return self.q.flatten(0, 1)[row]

    def copy(self) -> Paged:
        """Return the call over a copy of its cache."""
        return dataclasses.replace(self, cache=self.cache.clone())


@dataclasses.dataclass
class Ragged:
    """The tensors of a prefill call: every row's window begins at key zero."""

    q: torch.Tensor  # e4m3 [rows, heads, head_dim]
    k: torch.Tensor  # e4m3 [keys, head_dim]
    k_scale: torch.Tensor  # float32 [keys]
    weights: torch.Tensor  # float32 [rows, heads]
    row_starts: torch.Tensor  # int32 [rows], zeros
    row_ends: torch.Tensor  # int32 [rows]

    @property
    def n(self) -> torch.Tensor:
        """The number of scores of every row."""
        return self.row_ends

    def keys(self, row: int, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the e4m3 keys and the scales of some columns of a row."""
        return self.k[columns], self.k_scale[columns]

    def queries(self, row: int) -> torch.Tensor:
        """Return the queries of a row, ``[heads, head_dim]``."""
        return self.q[row]

    def copy(self) -> Ragged:
        """Return the call over a copy of its keys."""
        return dataclasses.replace(self, k=self.k.clone(), k_scale=self.k_scale.clone())


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of a table."""

    suite: str
    dtype: str
    batch: int  # requests; for prefill: queries
    columns: int  # keys of the longest row
    next_n: int = 1
    lengths: str = "full"  # or "varied": uniform, the first row full; prefill: "causal"
    k: int = 0

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return self.batch * self.next_n

    @property
    def data(self) -> tuple[object, ...]:
        """What the tensors depend on; cases with equal ``data`` share their tensors."""
        return self.suite == "prefill", self.batch, self.columns, self.next_n, self.lengths

    @property
    def cache_bytes(self) -> int:
        """The bytes of the keys that the case holds, with whole pages if it is paged."""
        if self.suite == "prefill":
            return self.columns * KEY_BYTES
        return self.batch * -(-self.columns // PAGE_SIZE) * PAGE_SIZE * KEY_BYTES

    def contexts(self) -> torch.Tensor:
        """Return the keys of every request, int32."""
        full = torch.full((self.batch,), self.columns, dtype=torch.int32)
        if self.lengths == "full":
            return full
        g = torch.Generator().manual_seed(self.batch)
        drawn = torch.randint(1, self.columns + 1, (self.batch,), generator=g, dtype=torch.int32)
        drawn[0] = self.columns
        return drawn.clamp(min=min(self.next_n, self.columns))

    def ends(self) -> torch.Tensor:
        """Return where each row of prefill ends; the rows are a causal context's last queries."""
        row = torch.arange(self.batch)
        return (self.columns - self.batch + 1 + row).clamp(min=0).int()

    @property
    def keys_read(self) -> int:
        """The keys that a call must read once."""
        return self.columns if self.suite == "prefill" else int(self.contexts().sum())

    @property
    def scores(self) -> int:
        """The number of scores that a call computes."""
        if self.suite == "prefill":
            return int(self.ends().sum())
        behind = torch.arange(self.next_n)
        return int((self.contexts()[:, None] - behind).clamp(min=0).sum())

    @property
    def operations(self) -> int:
        """The multiplications and additions of the scores' dot products."""
        return self.scores * HEADS * HEAD_DIM * 2

    def make(self, device: str | torch.device = "cpu", seed: int = 0) -> Paged | Ragged:
        """Draw the tensors."""
        g = torch.Generator(device=device).manual_seed(seed)
        q = torch.randn(self.rows, HEADS, HEAD_DIM, generator=g, device=device) * 100
        q = q.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        weights = torch.randn(self.rows, HEADS, generator=g, device=device) * 0.1
        if self.suite == "prefill":
            k, k_scale = _keys(self.columns, g)
            ends = self.ends().to(device)
            return Ragged(q, k, k_scale, weights, torch.zeros_like(ends), ends)
        width = -(-self.columns // PAGE_SIZE)
        order = torch.randperm(self.batch * width, generator=g, device=device)
        behind = torch.arange(self.next_n - 1, -1, -1, dtype=torch.int32)
        lengths = (self.contexts()[:, None] - behind).clamp(min=0)
        return Paged(
            q.unflatten(0, (self.batch, self.next_n)), _cache(self.batch * width, g), weights,
            lengths.to(device), order.view(self.batch, width).int(),
        )  # fmt: skip

    def __str__(self) -> str:
        """Return the cell as progress lines and messages show it."""
        more = f" k {self.k}" if self.k else ""
        more += f" {self.batch} x {self.columns}"
        more += f" next_n {self.next_n}" if self.next_n > 1 else ""
        more += "" if self.lengths == "full" else f" {self.lengths}"
        return self.dtype + more


def _keys(count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw quantised keys ``[count, head_dim]`` and their scales ``[count]``."""
    keys = torch.randn(count, HEAD_DIM, generator=g, device=g.device)
    scale = keys.abs().amax(1) / E4M3_MAX
    return (keys / scale[:, None]).to(torch.float8_e4m3fn), scale


def _cache(pages: int, g: torch.Generator) -> torch.Tensor:
    """Draw a page-planar cache ``[pages, 64, 1, 132]``, a part at a time."""
    split = PAGE_SIZE * HEAD_DIM
    cache = torch.empty(pages, PAGE_SIZE * KEY_BYTES, dtype=torch.uint8, device=g.device)
    step = 1 << 14
    for begin in range(0, pages, step):
        part = cache[begin : begin + step]
        keys, scale = _keys(len(part) * PAGE_SIZE, g)
        part[:, :split] = keys.view(torch.uint8).view(len(part), split)
        part[:, split:] = scale.view(torch.uint8).view(len(part), 4 * PAGE_SIZE)
    return cache.view(pages, PAGE_SIZE, 1, KEY_BYTES)


# ---- The suites ----------------------------------------------------------------------------------


# suite → requests and keys of each, and the other values that make its cells
_GRIDS: dict[str, tuple[Sequence[tuple[int, int]], Sequence[dict[str, Any]]]] = {
    "decode": ((), ({},)),
    "next_n": (NEXT_N_SHAPES, [{"next_n": next_n} for next_n in NEXT_N]),
    "varied": (VARIED_SHAPES, ({"lengths": "varied"},)),
    "prefill": (PREFILL_SHAPES, ({"lengths": "causal"},)),
}


def suite(
    name: str,
    *,
    dtypes: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
) -> list[Case]:
    """Return the cases of one suite of ``bench logits``.

    ``rows`` are requests (for ``prefill``: queries). In ``decode`` they and ``columns`` replace the
    suite's lists. In the other suites both together replace its shapes, and one alone chooses among
    them. Cells whose cache is larger than 40 GiB are left out.
    """
    if name not in _GRIDS:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    usual, every = _GRIDS[name]
    if name == "decode":
        shapes = list(itertools.product(rows or BATCHES, columns or CONTEXTS))
    else:
        shapes = _shapes(usual, rows, columns)
    cells = (
        Case(name, dtype, batch, context, **more)
        for (batch, context), more, dtype in itertools.product(
            shapes, every, dtypes or DEFAULT_DTYPES
        )
    )
    return [case for case in cells if case.cache_bytes <= MOST_CACHE]


def _shapes(
    default: Sequence[tuple[int, int]], rows: Sequence[int] | None, columns: Sequence[int] | None
) -> list[tuple[int, int]]:
    if rows and columns:
        return [(r, c) for r in rows for c in columns]
    return [(r, c) for r, c in default if (not rows or r in rows) and (not columns or c in columns)]


def chain(
    *,
    dtypes: Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
) -> list[Case]:
    """Return the cases of ``bench chain``; the arguments choose as in the suites with shapes."""
    return [
        Case("decode", dtype, batch, context, k=k)
        for batch, context in _shapes(CHAIN_SHAPES, rows, columns)
        for dtype in dtypes or DEFAULT_DTYPES
        for k in ks or KS
    ]
