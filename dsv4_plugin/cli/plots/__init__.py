"""The plots of results files, one module per kind of results; matplotlib loads only to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.plots import candidates, cells, reads, recall
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["draw"]

DRAW = {"recall": recall.draw, "read": reads.draw, "candidates": candidates.draw}


def draw(document: dict[str, Any], file: Path, *, k: int | None = None) -> None:
    """Draw a results document into ``file`` (.png, .svg, .pdf); ``k``: which of several to draw.

    Raises:
        UsageError: matplotlib is not installed, or the document has nothing to draw.
    """
    what = document.get("what", "topk")
    if not isinstance(what, str) or what not in (*DRAW, *cells.TITLE):
        raise UsageError(f"the file has results of {what!r}, which has no plot")
    if what in DRAW:
        DRAW[what](document, file)
    else:
        cells.draw(document, file, k=k)
