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
    x = torch.where(x.isnan(), -1.5e308, x.clamp(-1e308, 1e308))
    low = torch.where(chosen, x, torch.inf).amin(1)
    left = valid & ~chosen
    high = torch.where(left, x, -torch.inf).amax(1)
    assert bool((low >= high).all()), "a larger score was left out"
    at = torch.arange(columns, device=logits.device)[None, :].expand(rows, -1)
    edge = x == low[:, None]
    last_in = torch.where(edge & chosen, at, -1).amax(1)
    first_out = torch.where(edge & left, at, columns).amin(1)
    assert bool((last_in < first_out).all()), "a tie did not go to the lowest index"


class Ranking:
    """The first `most` columns of every row by (value, lowest index), found by one stable sort.

    Efficient enough for the largest shapes on a GPU; one ranking answers for every k up to `most`.
    """

    def __init__(self, logits, lengths, most=2048, starts=None):
        rows, columns = logits.shape
        device = logits.device
        start = torch.zeros(rows, device=device) if starts is None else starts.to(device)
        start = start.long()
        n = torch.minimum(lengths.reshape(-1).to(device).long(), columns - start)
        self.n = n.clamp(min=0).masked_fill(start < 0, 0)
        at = torch.arange(columns, device=device)
        step = max(1, (1 << 27) // max(columns, 1))  # 1 GiB of float64 at a time
        parts = []
        for lo in range(0, rows, step):
            part = slice(lo, lo + step)
            # NaN below -inf, both as finite float64; -0.0 as 0.0; what does not count last.
            x = logits[part].double() + 0.0
            x = torch.where(x.isnan(), -1.5e308, x.clamp(-1e308, 1e308))
            first = start[part, None]
            x = x.masked_fill((at < first) | (at >= first + self.n[part, None]), -torch.inf)
            order = x.sort(dim=1, descending=True, stable=True).indices
            parts.append(order[:, :most] - first)
        self.order = torch.cat(parts)
        self.device = device

    def rows(self, index):
        """The ranking of some of the rows, in this order, as one of its own."""
        some = object.__new__(Ranking)
        some.n, some.order, some.device = self.n[index], self.order[index], self.device
        return some

    def want(self, k):
        """int32 [rows, k], best first; a row no longer than k: 0 ... n - 1, then -1."""
        rank = torch.arange(k, device=self.device)
        short = torch.where(rank < self.n[:, None], rank, -1)
        wide = torch.full_like(short, -1)
        kept = min(k, self.order.shape[1])
        wide[:, :kept] = self.order[:, :kept]
        return torch.where((self.n <= k)[:, None], short, wide).int()

    def check(self, out, k, sort=False, context=""):
        """Assert range, uniqueness, the exact set, the tie rule, short rows; order with `sort`."""
        want, got = self.want(k), out
        short = (self.n <= k)[:, None]  # these have their order in both forms
        assert torch.equal(torch.where(short, out, 0), torch.where(short, want, 0)), (
            f"a row no longer than k is not 0 ... n - 1, -1 ... ({context}, k {k}, sort {sort})"
        )
        if not sort:
            want, got = want.sort(1).values, got.sort(1).values
        if not torch.equal(got, want):
            wrong = (got != want).any(1).nonzero().reshape(-1)
            r = int(wrong[0])
            a, b = set(got[r].tolist()), set(want[r].tolist())
            raise AssertionError(
                f"{len(wrong)} of {len(out)} rows are wrong ({context}, k {k}, sort {sort}); "
                f"row {r}, length {int(self.n[r])}: {len(b - a)} missing {sorted(b - a)[:5]}, "
                f"{len(a - b)} not expected {sorted(a - b)[:5]}"
            )
