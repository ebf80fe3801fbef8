"""What ``bench candidates`` holds its figures against: goals in microseconds, for one H200."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Bar", "bars"]

Row = dict[str, Any]

COLUMNS = (1 << 14, 1 << 16, 1 << 18, 1 << 20)
# At any number of columns, by rows: bfloat16.
FLAT = {
    "candidate_logits": {1: 3.5, 4: 5.9, 16: 14.5, 64: 47.0},
    "consumer": {1: 7.5, 4: 10.0, 16: 19.0, 64: 52.0},
}
STEP = {
    1: (58.0, 68.0, 88.0, 170.0),
    4: (74.0, 97.0, 172.0, 460.0),
    16: (122.0, 200.0, 480.0, 1560.0),
    64: (330.0, 610.0, 1660.0, 5800.0),
}
PREFILL = {(128, 1 << 20): 70.0}
MAXIMA, MANY_MAXIMA = 1.06, 1.02  # block_maxima over paged_logits; from 64 rows x 64K on


@dataclass(frozen=True)
class Bar:
    """A goal, and what was measured in its worst cell."""

    name: str
    goal: float
    measured: float
    met: bool

    def __str__(self) -> str:
        word = "met" if self.met else "NOT MET"
        return f"{self.name:56s} {self.measured:9.2f}  goal {self.goal:9.2f}  {word}"

    def as_dict(self) -> Row:
        """Return it as a results file has it."""
        return asdict(self)


def bars(results: list[Row]) -> list[Bar]:
    """Return the goals of the cells that were measured."""
    us = {
        (row["suite"], row["op"], row["rows"], row["columns"]): row["us"]
        for row in results
        if row["implementation"] == "dsv4" and row["dtype"] == "bfloat16"
    }

    def bar(name: str, goal: float, measured: float) -> Bar:
        return Bar(name, goal, round(measured, 3), measured <= goal)

    found = []
    for op, goals in FLAT.items():
        for rows, goal in goals.items():
            cells = [us[c] for n in COLUMNS if (c := ("decode", op, rows, n)) in us]
            if cells:
                found.append(bar(f"{op}, {rows} rows, any context, us", goal, max(cells)))
    for (suite, op, rows, columns), value in us.items():
        dense = us.get((suite, "paged_logits", rows, columns))
        if op == "block_maxima" and dense:
            goal = MANY_MAXIMA if rows >= 64 and columns >= 1 << 16 else MAXIMA
            name = f"block_maxima / paged_logits, {rows} x {columns}"
            found.append(bar(name, goal, value / dense))
    for rows, step in STEP.items():
        for columns, goal in zip(COLUMNS, step, strict=True):
            cell = ("decode", "step", rows, columns)
            if cell in us:
                found.append(bar(f"step of eight layers, {rows} x {columns}, us", goal, us[cell]))
    for (rows, columns), goal in PREFILL.items():
        cell = ("prefill", "consumer", rows, columns)
        if cell in us:
            found.append(bar(f"consumer of prefill, {rows} x {columns}, us", goal, us[cell]))
    return found
