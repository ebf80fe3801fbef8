"""Oracles that share no code with the ops: loops over Python numbers, and vectorised oracles."""

import math

import torch

from dsv4_plugin.cli.checks.oracles import RULES, Ranking, Wrong, faults, table  # noqa: F401


def read_one_by_one(cache, slot_mapping, block_size=64, head_dim=128):
    """Read the cache in a loop over the slots, one token at a time."""
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


# ---- Vectorised: what they find is Wrong ---------------------------------------------------------


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(words)


def check_selection(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    out: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    sort: bool = False,
    ascending: bool = False,
) -> None:
    """Raise :class:`Wrong` for the first rule that a row breaks; see :func:`faults`."""
    broken = faults(logits, lengths, k, out, starts=starts, sort=sort, ascending=ascending)
    if bool(broken.any()):
        rule = int(broken.any(0).int().argmax())
        rows = broken[:, rule].nonzero().reshape(-1).tolist()
        raise Wrong(f"{RULES[rule]}, in {len(rows)} of {len(out)} rows, first {rows[0]}", rows)


def slots_of(
    index: torch.Tensor, page_table: torch.Tensor, page_size: int, next_n: int
) -> torch.Tensor:
    """Return the pool slots of indices: int64, -1 for no index, no page or no slot of int32."""
    rows = index.shape[0]
    table = page_table.long()
    if len(table) != rows:
        table = table.repeat_interleave(next_n, 0)
    index = index.long()
    if not table.shape[1]:
        return torch.full_like(index, -1)
    page = index.clamp(min=0) // page_size
    number = table.gather(1, page.clamp(max=table.shape[1] - 1))
    slot = number * page_size + index % page_size
    none = (index < 0) | (number < 0) | (page >= table.shape[1]) | (slot >= 1 << 31)
    return slot.masked_fill(none, -1)


def _bytes_at(
    cache: torch.Tensor, page: torch.Tensor, first: torch.Tensor, count: int
) -> torch.Tensor:
    at = first[:, None] + torch.arange(count, device=cache.device)
    return cache[page[:, None], at].long()


def fp8_keys(
    cache: torch.Tensor, page: torch.Tensor, position: torch.Tensor, block_size: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the FP8 keys at ``(page, position)`` of ``[pages, bytes]``; all of them must exist.

    Returns their bytes (int64 ``[n, head_dim]``), their scales, and their values (float32).
    """
    codes = _bytes_at(cache, page, position * head_dim, head_dim)
    quad = _bytes_at(cache, page, block_size * head_dim + position * 4, 4)
    word = quad[:, 0] | quad[:, 1] << 8 | quad[:, 2] << 16 | quad[:, 3] << 24
    scale = (word - ((word >> 31) << 32)).int().view(torch.float32)
    return codes, scale, table("e4m3", cache.device).float()[codes] * scale[:, None]


def mxfp4_keys(
    cache: torch.Tensor, page: torch.Tensor, position: torch.Tensor, block_size: int, head_dim: int
) -> torch.Tensor:
    """Read the MXFP4 keys at ``(page, position)``: float32 ``[n, head_dim]``."""
    row, blocks = head_dim // 2, head_dim // 32
    packed = _bytes_at(cache, page, position * row, row)
    codes = torch.stack((packed % 16, packed // 16), dim=2).reshape(len(packed), head_dim)
    scale = _bytes_at(cache, page, block_size * row + position * blocks, blocks)
    numbers = table("e2m1", cache.device)[codes]
    return (numbers * table("ue8m0", cache.device)[scale].repeat_interleave(32, 1)).float()
