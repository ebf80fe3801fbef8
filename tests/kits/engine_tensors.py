"""Tensors with the shapes, dtypes and strides of SGLang's and TokenSpeed's, on any device."""

from __future__ import annotations

import dataclasses

import torch
from kits.engine_parts import HEAD_DIM, KEY_BYTES
from kits.oracles import fp8_keys

__all__ = [
    "HEADS",
    "PAGE",
    "Decode",
    "Prefill",
    "deep_gemm_buffer",
    "in_row",
    "key_values",
    "page_table",
    "plane",
]

PAGE = 64
HEADS = 64
E4M3_MAX = 448.0
POOL = 1 << 20  # pages that a scheduler hands out
ARENA = 1024  # bytes that an arena's pages are longer than its index keys
TRUTH_ROWS = 8  # rows whose scores are computed in float64


def deep_gemm_buffer(
    rows: int, width: int, dtype: torch.dtype, device: str | torch.device
) -> torch.Tensor:
    """Make logits as DeepGEMM allocates them: rows at multiples of 1,024 bytes, full of NaN."""
    align = 1024 // dtype.itemsize
    whole = torch.full((rows, -(-width // align) * align), float("nan"), device=device)
    return whole.to(dtype)[:, :width]


def page_table(rows: int, width: int, device: str | torch.device, pool: int = POOL) -> torch.Tensor:
    """Make int32 ``[rows, pages]``, each page once in a row; a slice of a wider table."""
    pages = -(-width // PAGE)
    g = torch.Generator().manual_seed(1)
    unique = [torch.randperm(pool, generator=g)[: pages + 5] for _ in range(rows)]
    return torch.stack(unique).int().to(device)[:, :pages]


def in_row(slots: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the columns of pool slots, by a page table whose rows have no page twice.

    A slot whose page is not in its row becomes a column past the row's end.
    """
    ranked, order = table.long().sort(dim=1)
    page = slots.clamp_min(0).long() // PAGE
    at = torch.searchsorted(ranked, page).clamp_max(table.shape[1] - 1)
    known = ranked.gather(1, at) == page
    index = order.gather(1, at) * PAGE + slots.clamp_min(0) % PAGE
    index = torch.where(known, index, table.shape[1] * PAGE)
    return torch.where(slots < 0, -1, index).to(torch.int32)


def plane(pages: int, pad: int, device: str | torch.device, seed: int = 0) -> torch.Tensor:
    """Make page-planar FP8 keys, N(0,1) with a scale a key: a view of an arena ``pad`` wider."""
    g = torch.Generator(device=device).manual_seed(seed)
    content = PAGE * KEY_BYTES
    arena = torch.full((pages, content + pad), 0xFF, dtype=torch.uint8, device=device)
    split = PAGE * (KEY_BYTES - 4)
    step = 4096
    for lo in range(0, pages, step):
        n = min(step, pages - lo)
        keys = torch.randn(n, PAGE, KEY_BYTES - 4, generator=g, device=device)
        scale = keys.abs().amax(dim=2) / E4M3_MAX
        values = (keys / scale[:, :, None]).to(torch.float8_e4m3fn)
        arena[lo : lo + n, :split] = values.view(torch.uint8).flatten(1)
        arena[lo : lo + n, split:content] = scale.view(torch.uint8)
    return arena[:, :content]


def key_values(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return the keys at ``slots``, which must all be there, dequantised: float32 ``[n, 128]``."""
    return fp8_keys(cache, slots // PAGE, slots % PAGE, PAGE, HEAD_DIM)[2]


class _Scored:
    """The common parts of TokenSpeed's calls: queries, weights, and keys in an arena."""

    q: torch.Tensor  # bfloat16 [rows, 64, 128]
    weights: torch.Tensor  # float32 [rows, 64]
    cache: torch.Tensor  # uint8 [pages, 64 * 132], a view of an arena

    def slots_of(self, row: int) -> torch.Tensor:
        """Return the slots of a row's keys."""
        raise NotImplementedError

    def truth(self, q: torch.Tensor | None = None) -> tuple[list[torch.Tensor], list[int]]:
        """Return the float64 scores of some rows, and which rows these are.

        ``q``: other queries than the call's own.
        """
        q = self.q if q is None else q
        rows = torch.linspace(0, len(q) - 1, min(len(q), TRUTH_ROWS)).long().unique().tolist()
        scores = []
        for row in rows:
            keys = key_values(self.cache, self.slots_of(row)).double()
            dots = (q[row].double() @ keys.T).clamp_(min=0)
            scores.append(self.weights[row].double() @ dots)
        return scores, rows


@dataclasses.dataclass
class Decode(_Scored):
    """A decode call of TokenSpeed: one query a request, all requests of one length."""

    q: torch.Tensor
    weights: torch.Tensor  # a view of a fused projection
    lengths: torch.Tensor  # int32 [rows]
    table: torch.Tensor  # int32 [rows, pages], no page twice
    cache: torch.Tensor

    @classmethod
    def make(cls, rows: int, columns: int, device: str | torch.device) -> Decode:
        """Draw the tensors."""
        pages = -(-columns // PAGE)
        g = torch.Generator(device=device).manual_seed(2)
        order = torch.randperm(rows * pages, generator=g, device=device)
        fused = torch.randn(rows, 32 + HEADS, generator=g, device=device)
        return cls(
            q=torch.randn(rows, HEADS, HEAD_DIM, generator=g, device=device).bfloat16(),
            weights=fused[:, 32:],
            lengths=torch.full((rows,), columns, dtype=torch.int32, device=device),
            table=1 + order.view(rows, pages).int(),
            cache=plane(1 + rows * pages, ARENA, device),
        )

    def slots_of(self, row: int) -> torch.Tensor:
        """Return the slots of a row's keys."""
        at = torch.arange(int(self.lengths[row]), device=self.q.device)
        return self.table[row].long()[at // PAGE] * PAGE + at % PAGE


@dataclasses.dataclass
class Prefill(_Scored):
    """A prefill call of TokenSpeed: two requests side by side, the queries are the last of each."""

    q: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor  # int64 [columns], the workspace: anywhere in the arena
    starts: torch.Tensor  # int32 [rows]
    ends: torch.Tensor  # int32 [rows]
    cache: torch.Tensor

    @classmethod
    def make(cls, rows: int, columns: int, device: str | torch.device) -> Prefill:
        """Draw the tensors."""
        cache = plane(2 + columns // PAGE, ARENA, device)
        g = torch.Generator(device=device).manual_seed(3)
        half, keys = rows // 2, columns // 2
        starts, ends = [], []
        for begin, queries in ((0, half), (keys, rows - half)):
            starts += [begin] * queries
            ends += [begin + max(0, keys - queries + 1 + j) for j in range(queries)]
        return cls(
            q=torch.randn(rows, HEADS, HEAD_DIM, generator=g, device=device).bfloat16(),
            weights=torch.randn(rows, HEADS, generator=g, device=device),
            slots=torch.randperm(len(cache) * PAGE, generator=g, device=device)[:columns],
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            ends=torch.tensor(ends, dtype=torch.int32, device=device),
            cache=cache,
        )

    def slots_of(self, row: int) -> torch.Tensor:
        """Return the slots of a row's keys."""
        return self.slots[int(self.starts[row]) : int(self.ends[row])]
