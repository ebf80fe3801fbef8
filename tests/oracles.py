"""Oracles that share no code with the package: loops over Python numbers."""

import math

import torch


def read_one_by_one(cache, slot_mapping, block_size=64, head_dim=128):
    """The loop of the first seed: one token at a time."""
    out = torch.zeros(slot_mapping.numel(), head_dim)
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot < 0 or cache.shape[0] == 0:
            continue
        page, at = cache[slot // block_size], slot % block_size
        values = page[at * head_dim : (at + 1) * head_dim].view(torch.float8_e4m3fn)
        first = block_size * head_dim + at * 4
        scale = page[first : first + 4].clone().view(torch.float32)
        out[i] = values.float() * scale
    return out


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def read_mxfp4_one_by_one(cache, slot_mapping, block_size=64, head_dim=128):
    out = torch.zeros(slot_mapping.numel(), head_dim)
    row, scales = head_dim // 2, head_dim // 32
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot < 0 or cache.shape[0] == 0:
            continue
        page, at = cache[slot // block_size].tolist(), slot % block_size
        for d in range(head_dim):
            byte = page[at * row + d // 2]
            code = byte >> 4 if d % 2 else byte & 15
            number = -E2M1[code & 7] if code & 8 else E2M1[code & 7]
            scale = page[block_size * row + at * scales + d // 32]
            out[i, d] = math.nan if scale == 255 else number * 2.0 ** (scale - 127)
    return out


def select(row, k):
    """The k largest of a list of floats, ties to the lowest index, NaN last; best first."""

    def rank(i):
        x = row[i]
        return (1, 0.0, i) if math.isnan(x) else (0, -x, i)

    return sorted(range(len(row)), key=rank)[:k]


def topk_row(row, length, k, sort=False):
    """One row of `topk` by the public contract, as a list of k indices."""
    n = max(0, min(length, len(row)))
    if n <= k:
        return list(range(n)) + [-1] * (k - n)
    best = select(row[:n], k)
    return best if sort else sorted(best)


def check_selection(logits, lengths, k, out):
    """The promises of the set and of ties, on the device, without a reference implementation.

    Range, uniqueness, smallest selected >= largest left, and among equals the lowest indices.
    `lengths` is one a row. Works on any device; asserts.
    """
    rows, columns = logits.shape
    n = lengths.reshape(-1).to(logits.device, torch.int64).clamp(0, columns)
    index = out.to(torch.int64)
    count = n.clamp(max=k)
    kept = (index >= 0).sum(1)
    assert torch.equal(kept, count), "wrong number of indices"
    assert bool(((index < n[:, None]) | (index < 0)).all()), "index past the row's length"
    chosen = torch.zeros(rows, columns + 1, dtype=torch.int32, device=logits.device)
    chosen.scatter_add_(
        1, torch.where(index < 0, columns, index), torch.ones_like(index, dtype=torch.int32)
    )
    chosen = chosen[:, :columns]
    assert int(chosen.max() if columns and rows else 0) <= 1, "an index came twice"
    chosen = chosen.bool()
    valid = torch.arange(columns, device=logits.device)[None, :] < n[:, None]
    # Rank the numbers; NaN below -inf, both as finite float64 so that comparisons hold.
    x = logits.double()
    x = torch.where(x.isnan(), -3e308, x.clamp(-1e308, 1e308))
    low = torch.where(chosen, x, torch.inf).amin(1)
    left = valid & ~chosen
    high = torch.where(left, x, -torch.inf).amax(1)
    assert bool((low >= high).all()), "a larger score was left out"
    at = torch.arange(columns, device=logits.device)[None, :].expand(rows, -1)
    edge = x == low[:, None]
    last_in = torch.where(edge & chosen, at, -1).amax(1)
    first_out = torch.where(edge & left, at, columns).amin(1)
    assert bool((last_in < first_out).all()), "a tie did not go to the lowest index"
