"""The curves of each panel in a drawn SVG, independent of the fonts' margins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

Curve = list[tuple[float, float]]


def curves(svg: Path) -> list[list[Curve]]:
    """Return the curves of three and more points of each panel, in fractions of what it spans."""
    panels = re.split(r'<g id="axes_\d+">', svg.read_text())[1:]
    return [_of_one(panel) for panel in panels]


def _of_one(panel: str) -> list[Curve]:
    found = []
    for path in re.findall(r'<path d="([^"]*)" clip-path', panel):
        points = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)
        if len(points) > 2:
            found.append([(float(x), float(y)) for x, y in points])
    if not found:
        return []
    spans = []
    for axis in (0, 1):
        values = [point[axis] for curve in found for point in curve]
        spans.append((min(values), (max(values) - min(values)) or 1.0))
    (left, width), (top, height) = spans
    return [[((x - left) / width, (y - top) / height) for x, y in curve] for curve in found]


def check_same(drawn: Path, committed: Path) -> None:
    """Compare two drawings: as many panels, curves and points, each where the other has it."""
    now, then = curves(drawn), curves(committed)
    assert [[len(c) for c in panel] for panel in now] == [[len(c) for c in panel] for panel in then]
    assert any(now), "there is no curve at all"
    for after, before in zip(now, then, strict=True):
        for a, b in zip(after, before, strict=True):
            flat = [value for point in a for value in point]
            assert flat == pytest.approx([v for point in b for v in point], abs=2e-3)
