"""How the plugin's figures compare with its peers': the best peer of a cell, and ratios to it.

A figure counts unless its answer was found wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "PLUGIN", "Cell", "Ratio", "best_peers", "chain_name", "geomean", "ratios", "right", "sound",
]  # fmt: skip

PLUGIN = "dsv4"  # the name of the plugin's implementation in results

Row = dict[str, Any]
# k (0 if there is none), rows, columns, and each value that is not the usual one
Cell = tuple[Any, ...]
Cells = dict[Cell, Row]


@dataclass(frozen=True)
class Ratio:
    """The plugin's time over another's, in the cells that have both; below 1 it is faster."""

    name: str
    mean: float  # geometric
    worst: float
    where: str  # the cell of the worst ratio, and its peer
    cells: int

    def __str__(self) -> str:
        """Return the line of the summary."""
        return (f"{self.name}: {self.mean:.2f} in the geometric mean of {self.cells} cells, worst "
                f"{self.worst:.2f} ({self.where})")  # fmt: skip


def sound(row: Row) -> bool:
    """Whether an answer was not found wrong (not exact, or logits out of tolerance)."""
    return row.get("exact") is not False and row.get("right") is not False


def right(row: Row) -> bool:
    """Whether an answer is right; its ties count if they were checked."""
    return sound(row) and bool(row.get("lowest_index", True))


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean, by which ratios are compared."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def chain_name(logits: str, topk: str) -> str:
    """Return the name of a chain of two peers."""
    return f"{logits} + {topk}"


def best_peers(rows: Iterable[Row], dtype: str, field: str = "warm_us") -> Cells:
    """Return the fastest sound peer of every cell: of any dtype; for float32, of float32 only."""
    of = (row for row in rows if dtype != "float32" or row["dtype"] == "float32")
    return _fastest((row for row in of if row["implementation"] != PLUGIN), field)


def ratios(results: list[Row], **engines: str) -> list[Ratio]:
    """Return the ratios of every suite to the best peer and to what engines run themselves.

    ``engines`` maps an engine to the peer that is the engine's own choice, or to the top-k that
    ends its chain.
    """
    found = []
    for suite in dict.fromkeys(row["suite"] for row in results):
        rows = [row for row in results if row["suite"] == suite]
        fields = ("served_us",) if suite == "served" else ("warm_us", "cold_us")
        for dtype in dict.fromkeys(r["dtype"] for r in rows if r["implementation"] == PLUGIN):
            mine = [r for r in rows if (r["implementation"], r["dtype"]) == (PLUGIN, dtype)]
            best = f"best peer of {'float32' if dtype == 'float32' else 'any dtype'}"
            for field in fields:
                plugin = _fastest((row for row in mine if row.get("kind", "normal") == "normal"),
                                  field)  # fmt: skip
                others = {best: best_peers(rows, dtype, field)}
                for engine, choice in engines.items():
                    own = (r for r in rows if r["dtype"] == "float32" and _is(r, choice))
                    others[f"{engine}'s own"] = _fastest(own, field)
                name = f"{suite} {dtype}" + ("" if suite == "served" else f" {field[:-3]}")
                for other, peers in others.items():
                    found += _ratio(f"{name} / {other}", plugin, peers, field)
    return found


def _is(row: Row, choice: str) -> bool:
    return row["implementation"] == choice or row["implementation"].endswith(chain_name("", choice))


def _fastest(rows: Iterable[Row], field: str) -> Cells:
    best: Cells = {}
    for row in rows:
        us = row.get(field)
        # As in a server a time is the difference of two, which scatter: zero and less is no time.
        if us is not None and us > 0 and sound(row):
            cell = _cell(row)
            if cell not in best or us < best[cell][field]:
                best[cell] = row
    return best


def _ratio(name: str, plugin: Cells, peers: Cells, field: str) -> list[Ratio]:
    found = {cell: row[field] / peers[cell][field] for cell, row in plugin.items() if cell in peers}
    if not found:
        return []
    worst = max(found, key=found.__getitem__)
    k, rows, columns, *more = worst
    words = [f"k {k}"] if k else []
    words += [f"{rows} x {columns}", *more, f"against {peers[worst]['implementation']}"]
    mean = geomean(found.values())
    return [Ratio(name, mean, found[worst], ", ".join(words), len(found))]


def _cell(row: Row) -> Cell:
    more = []
    if row.get("windows", "full") != "full":
        more.append(row["windows"])
    if row.get("width", 0) > row["columns"]:
        more.append(f"in {row['width']}")
    if row.get("next_n", 1) > 1:
        more.append(f"next_n {row['next_n']}")
    return row.get("k", 0), row["rows"], row["columns"], *more
