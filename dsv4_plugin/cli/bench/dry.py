"""A dry run of a benchmark on a CPU: answers are checked, times mean nothing.

So the grid is small unless the options set it, and no time is shown, compared or drawn.
"""

from __future__ import annotations

import argparse
from typing import Any

from dsv4_plugin.cli.checks.compare import right

__all__ = ["NO_PLOT", "SAID", "shown", "shrink"]

SAID = "A dry run on a CPU: answers are checked. Its times mean nothing, so none is shown."
NO_PLOT = "--plot draws times, and those of a dry run on a CPU mean nothing"

# The values of --k, --rows and --columns if they are not given, by benchmark.
GRIDS: dict[str, dict[str, list[int]]] = {
    "topk": {"k": [512], "rows": [1, 8], "columns": [8192]},
    "logits": {"rows": [1], "columns": [1024]},
    "chain": {"k": [512], "rows": [1, 8], "columns": [1024]},
    "candidates": {"rows": [1, 2], "columns": [512, 1024]},
}


def shrink(arguments: argparse.Namespace) -> str:
    """Give the unset options a small grid; return a line that says so, or ''."""
    left = {
        name: values
        for name, values in GRIDS.get(arguments.what, {}).items()
        if getattr(arguments, name) is None
    }
    vars(arguments).update(left)
    shown = ", ".join(f"--{name} {' '.join(map(str, values))}" for name, values in left.items())
    return f"A small grid, for a CPU: {shown} (these options change it)" if shown else ""


def shown(row: dict[str, Any]) -> str:
    """Return whose answer a result is, and whether it is right."""
    op = f" {row['op']}" if "op" in row else ""
    word = "exact" if "exact" in row else "right"
    return f"{row['implementation']}{op} {word if right(row) else 'WRONG'}"
