"""Divides the rows of an index layer of DeepSeek-V4.1 into parts; host numbers only.

A *part* is scored and selected together, in one buffer of scores. It consists of *runs*. A run is
consecutive rows that one call scores: the rows of a request in prefill, all rows at decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Part", "Run", "parts_of"]


@dataclass(frozen=True)
class Run:
    """Rows ``begin`` … ``end - 1`` of a call, of the request with this number."""

    request: int
    begin: int
    end: int


@dataclass(frozen=True)
class Part:
    """Consecutive runs, and the most keys of their requests."""

    runs: tuple[Run, ...]
    columns: int

    @property
    def rows(self) -> slice:
        """The part's rows of the call."""
        return slice(self.runs[0].begin, self.runs[-1].end)


def parts_of(
    rows_per_request: Sequence[int], keys: Sequence[int], most: int, whole: int
) -> Iterator[Part]:
    """Divide the rows of a prefill so that a part has at most ``most`` scores, or one row.

    Args:
        rows_per_request: the rows of each request, in row order.
        keys: the keys of each request, at its newest row.
        most: the most scores of a part.
        whole: a request with at most this many keys is in no part with a longer request.
    """
    runs: list[Run] = []
    columns = begin = 0
    for request, (rows, held) in enumerate(zip(rows_per_request, keys, strict=True)):
        end = begin + rows
        while begin < end:
            wide = max(columns, held, 1)
            room = most // wide - (begin - runs[0].begin if runs else 0)
            other = bool(runs) and (columns <= whole) != (held <= whole)
            if runs and (other or room < end - begin):
                yield Part(tuple(runs), columns)
                runs, columns = [], 0
                continue
            step = min(end - begin, max(room, 1))
            runs.append(Run(request, begin, begin + step))
            columns, begin = max(columns, held), begin + step
    if runs:
        yield Part(tuple(runs), columns)
