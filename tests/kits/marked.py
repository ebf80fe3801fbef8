"""The text between the markers of a page, which a script makes."""

from __future__ import annotations

import re
from pathlib import Path


def between(page: Path, mark: str) -> str:
    """The text between the markers of this name; a page has one pair of them."""
    found = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", page.read_text(), re.S)
    assert len(found) == 1, f"{page.name}: {len(found)} x <!-- {mark} --> … <!-- /{mark} -->"
    return str(found[0])
