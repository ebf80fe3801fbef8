"""A dry run of a benchmark on a CPU: answers are checked, times mean nothing.

So the grid is small where the options leave it open, and no time is held against a bar.
"""

from __future__ import annotations

import argparse
from typing import Any

from dsv4_plugin.cli.bench.topk.bars import sound

__all__ = ["SAID", "answers", "shrink"]

SAID = "A dry run on a CPU: answers are checked, times and what is made of them mean nothing."

# What --k, --rows and --columns are where they are not given, by benchmark.
GRIDS: dict[str, dict[str, list[int]]] = {
    "topk": {"k": [512], "rows": [1, 8], "columns": [8192]},
    "logits": {"rows": [1], "columns": [1024]},
    "chain": {"k": [512], "rows": [1, 8], "columns": [1024]},
    "candidates": {"rows": [1, 2], "columns": [512, 1024]},
}


def shrink(arguments: argparse.Namespace) -> str:
    """Give the open options the values of a small grid; returns a line that says so, or ''."""
    left = {
        name: values
        for name, values in GRIDS.get(arguments.what, {}).items()
        if getattr(arguments, name) is None
    }
    vars(arguments).update(left)
    shown = ", ".join(f"--{name} {' '.join(map(str, values))}" for name, values in left.items())
    return f"A small grid, for a CPU: {shown} (others: give these options)" if shown else ""


def answers(results: list[dict[str, Any]]) -> list[str]:
    """Return for each implementation in how many cells its answers were right."""
    lines = ["", "Answers"]
    for name in dict.fromkeys(row["implementation"] for row in results if _live(row)):
        rows = [row for row in results if row["implementation"] == name and _live(row)]
        right = [row for row in rows if sound(row) and row.get("lowest_index", True)]
        word = "exact" if "exact" in rows[0] else "right"
        if "lowest_index" in rows[0]:
            word += ", ties to the lowest index,"
        lines.append(f"{name}: {word} in {len(right)} of {len(rows)} cells")
    return lines


def _live(row: dict[str, Any]) -> bool:
    return not row.get("recorded")
