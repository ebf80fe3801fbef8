"""The tensors of ``bench candidates``: requests of a V4.1 model, their pages and queries.

Buffers are as wide as the longest row that a server allows, whatever the rows' lengths, because
their shapes are part of a CUDA graph. Queries, tables and candidates exist several times, more than
the L2 holds, and the calls of a graph take them in turn: keys come from memory, as in a server.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["HEADS", "KEY_BYTES", "PIECE", "Group", "Pool", "Prefill", "candidate_lists"]

HEADS, HEAD_DIM, PIECE = 32, 128, 8
KEY_BYTES = HEAD_DIM + 4
PAD = {64: 8640, 32: 4608}  # bytes of a page in vLLM's cache, by its keys
MOST_GROUPS = 64


@dataclasses.dataclass
class Group:
    """What one decode step of a few requests is called with."""

    q: torch.Tensor  # e4m3 [rows, HEADS, HEAD_DIM]
    weights: torch.Tensor  # float32 [rows, HEADS]
    table: torch.Tensor  # int32 [rows, pages] of the cache with a key a token
    half_table: torch.Tensor  # int32 [rows, pages] of the caches with a key for two tokens


class Pool:
    """Pages of ``requests`` requests of ``width`` tokens, shuffled over two caches.

    ``cache`` has a key a token in pages of 64 keys, ``half_cache`` one for two tokens in pages of
    32: the layers of ratio 1 and of ratio 2.
    """

    def __init__(self, width: int, requests: int, device: str) -> None:
        self.width, self.requests, self.device = width, requests, device
        g = torch.Generator(device=device).manual_seed(0)
        keys = torch.randn(width, HEAD_DIM, generator=g, device=device, dtype=torch.float16)
        self.keys = keys.to(torch.float8_e4m3fn)
        self.scales = torch.rand(width, generator=g, device=device).mul_(0.018).add_(0.002)
        self.cache, self.tables = self._pages(width, 64, g)
        self.half_cache, self.half_tables = self._pages(width // 2, 32, g)
        many = (requests * 2, HEADS)
        q = torch.randn(*many, HEAD_DIM, generator=g, device=device)
        self.q = q.to(torch.float8_e4m3fn)
        self.weights = torch.randn(many, generator=g, device=device) * 0.05

    def _pages(self, keys: int, size: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[pages, bytes]`` and the requests' tables."""
        each = keys // size
        cache = torch.empty(self.requests * each, PAD[size], dtype=torch.uint8, device=self.device)
        values = self.keys[:keys].view(torch.uint8).view(each, size * HEAD_DIM)
        scales = self.scales[:keys].view(each, size).view(torch.uint8)
        for request in range(self.requests):  # every request's keys are others of its own
            part = cache[request * each : (request + 1) * each]
            part[:, : size * HEAD_DIM] = values.roll(request, 0)
            part[:, size * HEAD_DIM : size * KEY_BYTES] = scales.roll(request, 0)
        order = torch.randperm(len(cache), generator=g, device=self.device, dtype=torch.int32)
        return cache[:, : size * KEY_BYTES], order.view(self.requests, each)

    def groups(self, rows: int) -> list[Group]:
        """Return the calls of a rotation, each of other requests."""
        found = []
        for i in range(max(1, min(self.requests // rows, MOST_GROUPS))):
            part = slice(i * rows, (i + 1) * rows)
            found.append(
                Group(self.q[part], self.weights[part], self.tables[part], self.half_tables[part])
            )
        return found


class Prefill:
    """One request's gathered keys and a chunk of rows that all see all of them."""

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
    rank[:, -1] = 2.0  # the newest
    found = torch.full((rows, held), -1, dtype=torch.int32, device=device)
    found[:, :count] = rank.topk(count, dim=1).indices.sort(1).values.int()
    return found
