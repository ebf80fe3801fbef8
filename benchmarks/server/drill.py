"""A failure drill: one server with one fault or in one mode. Drills that both engines have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.server.server import Server

__all__ = [
    "BASE", "LIBRARY", "SHADOW", "Drill", "capability", "failing", "fault", "off", "serving",
    "without_library",
]  # fmt: skip

BASE = "off"  # the drill with whose answers the others are compared
LIBRARY = "_C.so"
ON = {"DSV4_PLUGIN": "1"}
SHADOW = {"DSV4_TOPK": "fp32", "DSV4_SHADOW": "1"}


@dataclass(frozen=True)
class Drill:
    """One server with one fault, or in one mode.

    Attributes:
        name: the name of the drill and of its server.
        what: what is broken, or the mode.
        says: the line that must be in the log, once for each kind of layer in each process.
        environment: the server's variables.
        arguments: further arguments of the engine's command.
        counts: counters that must be above zero at the end; of ``a|b`` one of the two.
        never: counters that must be zero.
        upstream: whether the answers must equal those of ``base``, for each prompt to which
            ``base`` gives the same answer twice.
        library: whether the plugin has its compiled library.
        shadow: the kinds of calls that the shadow must have compared.
        act: runs between two rounds of requests.
        same: whether the answers of both rounds must be equal, for the same prompts.
        kinds: the kinds of model that the drill is for, with the names of :mod:`.model`; none: all.
        base: the drill with whose answers its own are compared.
    """

    name: str
    what: str
    says: str
    environment: dict[str, str] = field(default_factory=ON.copy)
    arguments: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    upstream: bool = True
    library: bool = True
    shadow: tuple[str, ...] = ()
    act: Callable[[Server], None] | None = None
    same: bool = True
    kinds: tuple[str, ...] = ()
    base: str = BASE


def fault(name: str) -> dict[str, str]:
    """Return the variables of a server in which the fault is (:mod:`.side`)."""
    return {**ON, "E2E_FAULT": name}


def off(wish: str, never: tuple[str, ...], **more: Any) -> Drill:
    """Return the drill :data:`BASE`: ``DSV4_PLUGIN=0`` although the option ``wish`` is there."""
    return Drill(
        BASE, f"the kill switch, DSV4_PLUGIN=0, although {wish} asks for the plugin",
        r"DSV4_PLUGIN=0: nothing is patched", {"DSV4_PLUGIN": "0"}, never=never, **more,
    )  # fmt: skip


def serving(
    name: str, what: str, counts: tuple[str, ...], environment: dict[str, str] | None = None,
    arguments: tuple[str, ...] = (), dtype: str = "bf16", **more: Any,
) -> Drill:  # fmt: skip
    """Return a drill in which the plugin serves in ``dtype``."""
    return Drill(
        name, what, rf"top-k: {dtype} by cuda", {**ON, **(environment or {})}, arguments, counts,
        upstream=False, **more,
    )  # fmt: skip


def capability(never: tuple[str, ...]) -> Drill:
    """Return the drill of a GPU that the plugin does not support."""
    return Drill(
        "capability", "the plugin sees a GPU of compute capability 7.5",
        r"top-k: the engine's \(.*compute capability 7\.5", fault("capability"), never=never,
    )  # fmt: skip


def without_library(never: tuple[str, ...]) -> Drill:
    """Return the drill of a plugin without its compiled library."""
    return Drill(
        "library", f"{LIBRARY} is not there",
        rf"top-k: the engine's \(.*{re.escape(LIBRARY)}", never=never, library=False,
    )  # fmt: skip


def failing(
    op: str, what: str, counts: tuple[str, ...], never: tuple[str, ...], part: str = "topk",
    **more: Any,
) -> Drill:  # fmt: skip
    """Return a drill in which an op raises at its first call, which switches ``part`` off."""
    return Drill(
        op, f"{what} raises at its first call",
        rf"{part} failed at a call and was switched off \(RuntimeError: drill: {op}\)",
        fault(op), counts=counts, never=never, **more,
    )  # fmt: skip
