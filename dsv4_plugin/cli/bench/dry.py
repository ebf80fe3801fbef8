"""A dry run of a benchmark on a CPU: answers are checked, times mean nothing.

So the grid is small where the options leave it open, and no times are compared.
"""

from __future__ import annotations

import argparse

__all__ = ["SAID", "shrink"]

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
