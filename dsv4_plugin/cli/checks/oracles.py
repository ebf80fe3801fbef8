"""Vectorised oracles of the ops, on any device; they share no code with the implementations.

``faults`` needs no reference: it checks an answer against the scores. ``Ranking`` finds the one
right answer by a stable sort. ``table`` has the numbers of a format, from its definition. A failed
check raises :class:`Wrong`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

__all__ = ["RULES", "TIES", "Ranking", "Wrong", "faults", "same_bits", "table"]

_CHUNK = 1 << 24  # scores checked in one step: 128 MiB of float64


class Wrong(AssertionError):
    """An answer breaks a promise; ``rows`` has some of the rows that break it."""

    def __init__(self, why: str, rows: Iterable[int] = ()) -> None:
        super().__init__(why)
        self.rows = list(rows)


def _ranked(x: torch.Tensor) -> torch.Tensor:
    """Scores as finite float64 that compare as in the selection: NaN below -inf, -0.0 as 0.0."""
    x = x.double() + 0.0
    return torch.where(x.isnan(), -1.5e308, x.clamp(-1e308, 1e308))


def _windows(
    logits: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's window begins, and how many columns it has."""
    device = logits.device
    n = lengths.reshape(-1).to(device, torch.int64)
    start = torch.zeros_like(n) if starts is None else starts.to(device, torch.int64)
    n = torch.minimum(n, logits.shape[1] - start).clamp(min=0)
    return start.clamp(0, logits.shape[1]), n.masked_fill(start < 0, 0)


RULES = (
    "the number of indices is not min(length, k)",
    "an index is outside of the row",
    "an index came twice",
    "a larger score was left out",
    "a tie did not go to the lowest index",
    "a row no longer than k is not 0 ... n - 1, then -1",
    "the order is not by value, then index",
    "the columns do not ascend, with -1 after them",
)
TIES = 4  # the rule of ties; the rules before it are those of the set


def faults(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    out: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    sort: bool = False,
    ascending: bool = False,
) -> torch.Tensor:
    """Return bool ``[rows, len(RULES)]``: which row breaks which promise of the top-k.

    ``lengths`` has one entry per row. ``out`` counts from each row's start. Nothing synchronises.
    ``ascending``: without ``sort`` the order counts too; the engines' own kernels do not promise
    it.
    """
    start, n = _windows(logits, lengths, starts)
    rows, columns = logits.shape
    step = max(1, _CHUNK // max(columns, 1))
    parts = [
        _faults(logits[at : at + step], start[at : at + step], n[at : at + step], k,
                out[at : at + step].to(torch.int64), sort, ascending and not sort)
        for at in range(0, rows, step)
    ]  # fmt: skip
    return torch.cat(parts) if parts else torch.zeros(0, len(RULES), dtype=torch.bool)


def _faults(
    logits: torch.Tensor, start: torch.Tensor, n: torch.Tensor, k: int, index: torch.Tensor,
    sort: bool, ascending: bool,
) -> torch.Tensor:  # fmt: skip
    rows, columns = logits.shape
    column = torch.arange(columns, device=logits.device)
    rank = torch.arange(k, device=logits.device)
    used = index >= 0
    outside = ((index >= n[:, None]) | (index < -1)).any(1)
    inside = used & (index < n[:, None])
    at = torch.where(inside, index + start[:, None], columns)  # the value `columns` means no column
    times = torch.zeros(rows, columns + 1, dtype=torch.int32, device=logits.device)
    times.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))
    times = times[:, :columns]
    chosen = times > 0
    twice = (times > 1).any(1)
    window = (column >= start[:, None]) & (column < (start + n)[:, None])
    x = _ranked(logits)
    left = window & ~chosen
    low = _reduced(torch.where(chosen, x, torch.inf), torch.inf, "amin")
    high = _reduced(torch.where(left, x, -torch.inf), -torch.inf, "amax")
    edge = x == low[:, None]
    last_in = _reduced(torch.where(edge & chosen, column, -1), -1, "amax")
    first_out = _reduced(torch.where(edge & left, column, columns), columns, "amin")
    short = n <= k
    want_short = torch.where(rank < n[:, None], rank, -1)
    if sort and k > 1 and columns:
        value = x.gather(1, at.clamp(max=columns - 1))
        ordered = (value[:, 1:] < value[:, :-1]) | (
            (value[:, 1:] == value[:, :-1]) & (index[:, 1:] > index[:, :-1])
        )
        unordered = ~ordered.all(1) & ~short
    else:
        unordered = torch.zeros_like(short)
    climbs = (index[:, 1:] > index[:, :-1]) | (index[:, 1:] == -1)
    fallen = ~climbs.all(1) if ascending else torch.zeros_like(short)
    return torch.stack(
        (
            used.sum(1) != n.clamp(max=k),
            outside,
            twice,
            (low < high) & ~short,
            (last_in >= first_out) & ~short,
            short & (index != want_short).any(1),
            unordered,
            fallen,
        ),
        dim=1,
    )


def _reduced(x: torch.Tensor, empty: float, how: str) -> torch.Tensor:
    if x.shape[1] == 0:
        return torch.full((x.shape[0],), empty, dtype=x.dtype, device=x.device)
    return getattr(x, how)(1)


class Ranking:
    """The first `most` columns of every row by (value, lowest index), from one stable sort.

    It is fast enough for the largest shapes on a GPU. One ranking answers for every k up to `most`.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        lengths: torch.Tensor,
        most: int = 2048,
        starts: torch.Tensor | None = None,
    ) -> None:
        rows, columns = logits.shape
        start, self.n = _windows(logits, lengths, starts)
        self.device = logits.device
        at = torch.arange(columns, device=self.device)
        step = max(1, (1 << 27) // max(columns, 1))  # 1 GiB of float64 at a time
        parts = []
        for lo in range(0, rows, step):
            part = slice(lo, lo + step)
            first = start[part, None]
            x = _ranked(logits[part])
            x = x.masked_fill((at < first) | (at >= first + self.n[part, None]), -torch.inf)
            order = x.sort(dim=1, descending=True, stable=True).indices
            parts.append(order[:, :most] - first)
        self.order = torch.cat(parts)

    def rows(self, index: torch.Tensor) -> Ranking:
        """Return a ranking of some of the rows, in this order."""
        some = object.__new__(Ranking)
        some.n, some.order, some.device = self.n[index], self.order[index], self.device
        return some

    def want(self, k: int) -> torch.Tensor:
        """Return int32 [rows, k], best first; for a row no longer than k: 0 ... n - 1, then -1."""
        rank = torch.arange(k, device=self.device)
        short = torch.where(rank < self.n[:, None], rank, -1)
        wide = torch.full_like(short, -1)
        kept = min(k, self.order.shape[1])
        wide[:, :kept] = self.order[:, :kept]
        return torch.where((self.n <= k)[:, None], short, wide).int()

    def check(self, out: torch.Tensor, k: int, sort: bool = False, context: str = "") -> None:
        """Raise unless range, uniqueness, the exact set, ties, short rows and the order are right.

        Without ``sort`` the right order is that of the columns.
        """
        want, got = self.want(k), out
        short = (self.n <= k)[:, None]  # these rows have the same order in both forms
        odd = (torch.where(short, out, 0) != torch.where(short, want, 0)).any(1)
        if bool(odd.any()):
            why = (
                f"a row no longer than k is not 0 ... n - 1, -1 ... ({context}, k {k}, sort {sort})"
            )
            raise Wrong(why, odd.nonzero().reshape(-1).tolist())
        if not sort:
            want = torch.where(short, want, want.sort(1).values)
        if not torch.equal(got, want):
            wrong = (got != want).any(1).nonzero().reshape(-1).tolist()
            r = wrong[0]
            a, b = set(got[r].tolist()), set(want[r].tolist())
            raise Wrong(
                f"{len(wrong)} of {len(out)} rows are wrong ({context}, k {k}, sort {sort}); "
                f"row {r}, length {int(self.n[r])}: {len(b - a)} missing {sorted(b - a)[:5]}, "
                f"{len(a - b)} not expected {sorted(a - b)[:5]}",
                wrong,
            )


# ---- The indexer cache ---------------------------------------------------------------------------


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@functools.cache
def table(name: str, device: torch.device) -> torch.Tensor:
    """Return the values of the codes of a format in float64: ``e4m3``, ``e2m1``, ``ue8m0``."""
    if name == "e4m3":
        values = [_e4m3(byte) for byte in range(256)]
        return torch.tensor(values, dtype=torch.float64, device=device)
    if name == "e2m1":
        return torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=torch.float64, device=device)
    scales = [2.0 ** (byte - 127) for byte in range(255)] + [float("nan")]
    return torch.tensor(scales, dtype=torch.float64, device=device)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return where two tensors of one dtype have equal bits; any NaN equals any other."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    equal = a.contiguous().view(words) == b.contiguous().view(words)
    return equal | (a.isnan() & b.isnan()) if a.element_size() > 1 else equal
