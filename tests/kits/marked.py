"""What a page has between markers, made by a script."""

from __future__ import annotations

import re
from pathlib import Path


def between(page: Path, mark: str) -> str:
    """What stands between the markers of this name, of which there is one pair."""
    found = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", page.read_text(), re.S)
    assert len(found) == 1, f"{page.name}: {len(found)} x <!-- {mark} --> … <!-- /{mark} -->"
    return str(found[0])
