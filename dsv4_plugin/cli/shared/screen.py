"""The output for a person: text that fits the terminal, tables, and the time left.

In a pipe or a file no line is wrapped and nothing is coloured, because a program may read it.
"""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["clock", "columns", "fold", "pairs", "table"]


def columns() -> int | None:
    """Return how many columns the terminal has; None if stdout is no terminal."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return max(40, shutil.get_terminal_size().columns)


def fold(text: str, before: str = "", width: int | None = None) -> list[str]:
    """Return a text as lines of at most ``width`` columns; ``before`` begins the first line."""
    if width is None:
        return [before + text]
    room = max(20, width - len(before))
    first, *rest = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    return [before + first, *(" " * len(before) + line for line in rest)]


def pairs(rows: Sequence[tuple[str, str]], width: int | None = None) -> list[str]:
    """Align names and texts; a long text continues in its own column."""
    left = max((len(name) for name, _ in rows), default=0) + 2
    lines = [line for name, text in rows for line in fold(text, f"{name:<{left}}", width)]
    return [line.rstrip() for line in lines]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """Return the lines of a table: by rich on a terminal if it is installed, else plain.

    ``right``: all columns but the first are right-aligned. rich itself respects NO_COLOR.
    """
    width = columns()
    if width is not None:
        try:
            return _by_rich(head, rows, right, width)
        except ImportError:
            pass
    wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        first, *others = (
            cell.rjust(w) if right and i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def _by_rich(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: bool, width: int
) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(head):
        shown.add_column(Text(title), justify="right" if right and i else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    page = Console(file=io.StringIO(), force_terminal=True, width=width)
    page.print(shown)
    assert isinstance(page.file, io.StringIO)
    return [line.rstrip() for line in page.file.getvalue().splitlines() if line.strip()]


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds."""
    return f"{int(max(0.0, seconds)) // 60}:{int(max(0.0, seconds)) % 60:02d}"
