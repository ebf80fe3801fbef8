"""The records of the seams: the documentation lists them, and every record is complete."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from dsv4_plugin.engines.shared import seam
from dsv4_plugin.engines.shared.source import Missing

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("vllm", "sglang", "tokenspeed")
engines = pytest.mark.parametrize("engine", ENGINES)


def records(engine: str) -> tuple[seam.Seam, ...]:
    found: tuple[seam.Seam, ...] = importlib.import_module(
        f"dsv4_plugin.engines.{engine}.probe"
    ).SEAMS
    return found


@engines
def test_the_page_has_the_list(engine: str) -> None:
    """After a change: python -m dsv4_plugin.engines.shared.seam ENGINE, into the page."""
    page = (ROOT / "docs" / "development" / f"{engine}.md").read_text()
    assert seam.listing(records(engine)) in page


@engines
def test_a_record_is_complete(engine: str) -> None:
    seams = records(engine)
    assert len({s.name for s in seams}) == len(seams) > 3
    for record in seams:
        assert record.puts and record.why and record.until, record.name
        for form in record.forms:
            assert not form[0].optional, record.name
            for place in form:
                known = place.takes or place.has or place.used or len(form) > 1
                assert known, f"{record.name}: {place} is known by its name alone"


def test_the_first_complete_form_is_taken() -> None:
    """An older form serves if the newest is missing; without any form all reasons are reported."""
    there = {"new": False, "old": True, "more": True, "extra": False}

    def look(place: seam.Place) -> str:
        if not there[place.attribute]:
            raise Missing(f"{place} is gone")
        return f"found {place}"

    place = lambda name, **how: seam.Place("engine", name, **how)  # noqa: E731
    record = seam.Seam(
        "a seam",
        ((place("new"), place("more")), (place("old"), place("extra", optional=True))),
        "", "", "",
    )  # fmt: skip
    assert [answer for _, answer in record.first(look)] == ["found old"]
    there["new"] = True
    assert [answer for _, answer in record.first(look)] == ["found new", "found more"]
    there["more"] = there["old"] = False
    with pytest.raises(Missing, match="more is gone; old is gone"):
        record.first(look)
