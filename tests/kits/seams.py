"""Records of seams that an engine does not have, as after a change in a later release."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from dsv4_plugin.engines.shared.seam import Seam


def moved(seams: Iterable[Seam], name: str, **changes: Any) -> tuple[Seam, ...]:
    """Return the records, with the first place of the seam ``name`` changed and its only form."""
    return tuple(
        dataclasses.replace(seam, forms=((dataclasses.replace(seam.forms[0][0], **changes),),))
        if seam.name == name
        else seam
        for seam in seams
    )
