"""Which calls ``DSV4_TOPK=auto`` leaves to the engine's own top-k, because that is faster there.

The plugin leaves a call only if the engine's kernel takes the same input and is exact: float32
logits that the engine wrote. It decides by what the host knows, once for a captured graph: the
number of rows of the call, and the longest row that is possible. The lengths are on the device. So
the engine's kernel gets a call of that many rows if the plugin was not faster at any length that
the call can have, or if it was slower at the longest one and on the whole. With more rows than were
measured, the largest measured number of rows decides. The plugin keeps everything else that was not
measured. :mod:`dsv4_plugin.engines.shared.aside_table` has the figures.

With a setting that demands the plugin (:func:`.decision.binding`, and any ``DSV4_TOPK`` but
``auto``) the plugin serves every call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from dsv4_plugin.engines.shared import aside_table as table
from dsv4_plugin.engines.shared.decision import Selection, binding
from dsv4_plugin.envs import Settings

__all__ = ["BACKENDS", "engage", "faster", "said", "shapes"]

BACKENDS = ("cuda",)  # the implementations that were measured beside the engines' kernels
# The numbers of a release, and a mark of what comes before it: a candidate, or a build of an
# earlier commit.
_PARTS = re.compile(r"v?(\d+(?:\.\d+)*)(?:[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)\d)?")


def engage(
    selection: Selection | None, settings: Settings, engine: str, device: torch.device
) -> Selection | None:
    """Return the selection, with ``aside`` set if the engine's kernel may get some calls.

    ``engine`` is the engine's name with its release. A release before the one that was measured
    gets no call, and neither does a candidate or an earlier build of that release: its kernel may
    be slower, or not exact. On a GPU with another number of multiprocessors than the measured one
    the engine gets no call either, because another kernel may be the faster one there.
    """
    if (
        selection is None
        or settings.topk != "auto"
        or binding(settings) is not None
        or (selection.dtype, selection.logits) != ("fp32", "engine")
        or selection.backend not in BACKENDS
        or selection.slots
        or selection.candidates
    ):
        return selection
    name, _, release = engine.partition(" ")
    since = table.SINCE.get(name.lower())
    if since is None or not _reaches(release, since) or not _measured(device):
        return selection
    return replace(selection, aside=name.lower())


def _measured(device: torch.device) -> bool:
    """Whether a GPU is like the one that was measured."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).multi_processor_count == table.SMS


def _reaches(release: str, since: tuple[int, ...]) -> bool:
    """Whether ``release`` is the release ``since`` or a later one."""
    parts = _PARTS.match(release)
    if parts is None:
        return False
    numbers = tuple(map(int, parts[1].split(".")))
    width = max(len(numbers), len(since))
    found, first = (x + (0,) * (width - len(x)) for x in (numbers, since))
    return found > first or (found == first and parts[2] is None)


def faster(selection: Selection, call: str, k: int, rows: int, longest: int, width: int) -> bool:
    """Whether the engine's own kernel gets a call of ``rows``, each of ``longest`` at most.

    ``width`` is the width of their buffer, by which the plugin divides a row among its CTAs.
    """
    if not selection.aside:
        return False
    name = f"{selection.aside}.{call}"
    if width > table.WIDEST.get(name, 0):
        return False
    wide = width > table.NARROW
    measured = [(entry[0], entry[1 + wide]) for entry in table.LONGEST.get((name, k), ())]
    # Between two measured counts of rows both must agree; beyond the largest, that one decides.
    below = [most for count, most in measured if count <= rows][-1:]
    above = [most for count, most in measured if count >= rows][:1] or below
    return bool(below) and 0 < longest <= min(*below, *above)


def said(selection: Selection | None, ks: Iterable[int]) -> str:
    """Name the calls that the engine's kernel gets, for the log; empty if there are none."""
    if selection is None or not selection.aside:
        return ""
    known = set(ks)
    return "; ".join(text for text, of in shapes(selection.aside).items() if known & set(of))


def shapes(engine: str) -> dict[str, tuple[int, ...]]:
    """Return what ``auto`` leaves to an engine, and for which k."""
    found: dict[str, tuple[int, ...]] = {}
    for (call, k), measured in table.LONGEST.items():
        name, _, call = call.partition(".")
        text = _shapes(call, measured) if name == engine else ""
        if text:
            found[text] = (*found.get(text, ()), k)
    return found


def _shapes(call: str, measured: tuple[tuple[int, int, int], ...]) -> str:
    """Say for a call from how many rows on, and up to which length, it is the engine's."""
    parts: list[str] = []
    before = (0, 0)
    for rows, narrow, wide in measured:
        if (narrow, wide) != before:
            text = f"from {rows} on " + (f"up to {narrow}" if narrow else "none")
            parts.append(text + (f" (in wide buffers {wide})" if wide not in (0, narrow) else ""))
        before = narrow, wide
    return f"{call} by rows and the longest row: {', '.join(parts)}" if parts else ""
