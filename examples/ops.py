#!/usr/bin/env python3
"""The indexer of one layer, by hand: scores of all keys, the best of each request, pool slots.

    python examples/ops.py

On a Hopper GPU the CUDA kernels run, elsewhere torch. docs/python.md has every op.
"""

from __future__ import annotations

import torch

from dsv4_plugin import paged_logits, select, topk

PAGE, HEADS, DIM, K = 64, 64, 128, 512


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    requests, pages = 2, 32
    length = torch.tensor([2000, 300], dtype=torch.int32, device=device)  # keys of each request

    # The index cache of an engine: e4m3 keys, then their float32 scales, in every page of 64 keys.
    keys = torch.randn(requests * pages, PAGE * DIM, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(requests * pages, PAGE, device=device) + 0.5
    cache = torch.cat([keys.view(torch.uint8), scales.view(torch.uint8)], dim=1)
    order = torch.randperm(requests * pages, device=device)
    block_table = order.reshape(requests, pages).int()  # the pages of each request

    q = torch.randn(requests, 1, HEADS, DIM, device=device).to(torch.float8_e4m3fn)
    weights = torch.rand(requests, HEADS, device=device)

    scores = paged_logits(q, cache, weights, length, block_table)
    best = topk(scores, length, K)  # positions in the request, ascending; -1 where it has fewer
    assert torch.equal(best, select(q, cache, weights, length, block_table, K))  # both in one call
    slots = topk(scores, length, K, page_table=block_table)  # where the attention reads these keys

    for i in range(requests):
        found = best[i][best[i] >= 0].long()
        row = scores[i, : length[i]].float()
        rest = row.clone()
        rest[found] = -torch.inf
        assert len(found) == min(K, int(length[i])) and row[found].min() >= rest.max()
        print(f"request {i}: {len(found)} of {len(row)} keys, first slots {slots[i, :4].tolist()}")


if __name__ == "__main__":
    main()
