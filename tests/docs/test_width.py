"""The pages fit a screen: a line of code has 100 columns, and no word of a table is very wide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT

COLUMNS, WORD = 100, 60
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^ *```.*?\n(.*?)^ *```", re.M | re.S)
ITEM = re.compile(r"(?:\d+\.|[-*]) ")


def code(text: str) -> list[str]:
    """The lines of all code blocks: between fences, or indented and not part of a list."""
    lines = [line for block in FENCED.findall(text) for line in block.splitlines()]
    item = False
    for line in FENCED.sub("", text).splitlines():
        if line.startswith("    "):
            lines += [] if item else [line[4:]]
        elif line and not line.startswith(" "):
            item = bool(ITEM.match(line))
    return lines


def words(text: str) -> list[str]:
    """The words of all cells of tables as a reader sees them: of a link its text, no marks."""
    rows = [line for line in FENCED.sub("", text).splitlines() if line.startswith("|")]
    shown = (re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", row) for row in rows)
    found = (word.strip("`*|") for row in shown for word in row.split())
    return [word for word in found if not set(word) <= set("-:")]


def wide(text: str) -> list[str]:
    return [line for line in code(text) if len(line) > COLUMNS] + [
        word for word in words(text) if len(word) > WORD
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_page_fits_a_screen(page: Path) -> None:
    assert wide(page.read_text()) == []


def test_what_is_too_wide_is_noticed() -> None:
    long, word = "x" * (COLUMNS + 1), "y" * (WORD + 1)
    text = f"a\n\n```text\n{long}\n```\n\n    {long}\n\n| a | b |\n|---|---|\n| c | `{word}` |\n"
    assert wide(text) == [long, long, word]
    assert wide(f"{long} {word}\n\n1. {long}\n\n    {long}\n\n| [a]({word}) | {'-' * 70} |\n") == []
