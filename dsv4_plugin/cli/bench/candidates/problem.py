"""The tensors of ``bench candidates``: requests of a V4.1 model, their pages and queries.

With the cache ``fp8`` they have the form of vLLM on Hopper, with ``fp4`` the form of SGLang.

Buffers are as wide as the longest row that a server allows, whatever the rows' lengths, because
their shapes are part of a CUDA graph. There are several copies of queries, tables and candidates,
together larger than the L2, and the calls of a graph use them in turn. So keys come from memory, as
in a server.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dsv4_plugin.cli.checks import exact

__all__ = ["FORMS", "HEADS", "PIECE", "Form", "Group", "Pool", "Prefill", "candidate_lists"]

HEADS, HEAD_DIM, PIECE = 32, 128, 8
MOST_GROUPS = 64


@dataclasses.dataclass(frozen=True)
class Form:
    """How the cache keeps a key."""

    values: int  # bytes
    scales: int  # bytes
    half_page: int  # keys per page in the layers with one key for two tokens
    page_bytes: dict[int, int]  # bytes from one page to the next, by keys per page

    @property
    def key_bytes(self) -> int:
        """Bytes of a key."""
        return self.values + self.scales


FORMS = {
    "fp8": Form(HEAD_DIM, 4, 32, {64: 8640, 32: 4608}),
    "fp4": Form(HEAD_DIM // 2, HEAD_DIM // 32, 64, {64: 4352}),
}


@dataclasses.dataclass
class Group:
    """The arguments of one decode step of a few requests."""

    q: torch.Tensor  # [requests, next_n, HEADS, HEAD_DIM]
    weights: torch.Tensor  # [rows, HEADS]
    table: torch.Tensor  # int32 [requests, pages] of the cache with one key per token
    half_table: torch.Tensor  # int32 [requests, pages] of the caches with one key for two tokens


class Pool:
    """Pages of ``requests`` requests of ``width`` tokens, shuffled over two caches.

    ``cache`` has one key per token in pages of 64 keys (layers of ratio 1). ``half_cache`` has one
    key for two tokens (layers of ratio 2).
    """

    def __init__(
        self, width: int, requests: int, device: str, cache: str = "fp8", rows: int = 0
    ) -> None:
        self.width, self.requests, self.device = width, requests, device
        self.form = FORMS[cache]
        g = torch.Generator(device=device).manual_seed(0)
        many = (max(rows, requests * 2), HEADS)
        if cache == "fp4":
            some: Any = {"generator": g, "device": device, "dtype": torch.uint8}
            self.keys = torch.randint(0, 256, (width, self.form.values), **some)
            self.scales = torch.randint(123, 128, (width, self.form.scales), **some)
            self.q = exact.codes((*many, HEAD_DIM), "fp4", g)
        else:
            keys = torch.randn(width, HEAD_DIM, generator=g, device=device, dtype=torch.float16)
            self.keys = keys.to(torch.float8_e4m3fn)
            self.scales = torch.rand(width, generator=g, device=device).mul_(0.018).add_(0.002)
            q = torch.randn(*many, HEAD_DIM, generator=g, device=device)
            self.q = q.to(torch.float8_e4m3fn)
        self.weights = torch.randn(many, generator=g, device=device) * 0.05
        if cache == "fp4":
            self.weights = self.weights.bfloat16()
        self.cache, self.tables = self._pages(width, 64, g)
        self.half_cache, self.half_tables = self._pages(width // 2, self.form.half_page, g)

    def _pages(self, keys: int, size: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[pages, bytes]`` and the requests' tables."""
        form, each = self.form, keys // size
        split, end = size * form.values, size * form.key_bytes
        shape = (self.requests * each, form.page_bytes[size])
        cache = torch.empty(shape, dtype=torch.uint8, device=self.device)
        values = self.keys[:keys].view(torch.uint8).view(each, split)
        scales = self.scales[:keys].view(torch.uint8).view(each, end - split)
        for request in range(self.requests):  # every request has its own keys
            part = cache[request * each : (request + 1) * each]
            part[:, :split] = values.roll(request, 0)
            part[:, split:end] = scales.roll(request, 0)
        order = torch.randperm(len(cache), generator=g, device=self.device, dtype=torch.int32)
        return cache[:, :end], order.view(self.requests, each)

    def groups(self, rows: int, next_n: int = 1) -> list[Group]:
        """Return the calls of a rotation, each with other requests."""
        found, batch = [], rows // next_n
        for i in range(max(1, min(self.requests // batch, MOST_GROUPS))):
            part, first = slice(i * batch, (i + 1) * batch), i * rows % (len(self.q) - rows + 1)
            q, weights = (x[first : first + rows] for x in (self.q, self.weights))
            tables = self.tables[part], self.half_tables[part]
            found.append(Group(q.unflatten(0, (batch, next_n)), weights, *tables))
        return found


class Prefill:
    """One request's gathered FP8 keys, and a chunk of rows that all see every key."""

    def __init__(self, pool: Pool, rows: int, columns: int) -> None:
        device = pool.device
        g = torch.Generator(device=device).manual_seed(rows)
        self.rows, self.columns = rows, columns
        self.q = torch.randn(rows, HEADS, HEAD_DIM, generator=g, device=device).to(
            torch.float8_e4m3fn
        )
        self.weights = torch.randn(rows, HEADS, generator=g, device=device) * 0.05
        self.k, self.k_scale = pool.keys[:columns], pool.scales[:columns]
        self.starts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ends = torch.full((rows,), columns, dtype=torch.int32, device=device)


def candidate_lists(rows: int, columns: int, held: int, seed: int, device: str) -> torch.Tensor:
    """Return random candidates as :func:`dsv4_plugin.select_blocks` writes them."""
    g = torch.Generator(device=device).manual_seed(seed)
    blocks = -(-columns // PIECE)
    count = min(held, blocks)
    rank = torch.rand(rows, blocks, generator=g, device=device)
    rank[:, -1] = 2.0  # the newest block
    found = torch.full((rows, held), -1, dtype=torch.int32, device=device)
    found[:, :count] = rank.topk(count, dim=1).indices.sort(1).values.int()
    return found
