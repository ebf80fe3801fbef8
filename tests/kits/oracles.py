"""Oracles that share no code with the ops: loops over Python numbers, and the vectorised ones."""

import math

import torch

from dsv4_plugin.cli.checks.oracles import Ranking, check_selection  # noqa: F401  # for the tests


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


def candidate_row(row, length, blocks, k, piece=8):
    """One row through the candidate ops by their contract, as Python numbers.

    Returns the blocks' scores, the candidates, the columns that the row sees, and the positions.
    """
    n = max(0, min(length, len(row)))
    parts = [row[at : min(at + piece, n)] for at in range(0, n, piece)]
    best = [math.inf if any(map(math.isnan, part)) else max(part) for part in parts]
    if best:
        best[-1] = math.inf
    chosen = topk_row(best, len(best), blocks)
    columns = [b * piece + i for b in chosen if b >= 0 for i in range(piece) if b * piece + i < n]
    picked = topk_row([row[c] for c in columns], len(columns), k)
    return best, chosen, len(columns), [columns[i] if i >= 0 else -1 for i in picked]
