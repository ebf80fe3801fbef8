"""What this process does at each seam: decided once, read at every call.

One process runs one engine, so the adapters share this plan. Who decides, and when, is theirs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from dsv4_plugin import log
from dsv4_plugin.state import state

__all__ = ["INERT", "KS", "Plan", "Topk", "current", "decide", "is_off", "switch_off"]

KS = (512, 1024, 2048)  # the k that the engines' own kernels have; all else stays with upstream


@dataclass(frozen=True)
class Topk:
    """Select in ``dtype`` (``bf16``, ``fp16`` or ``fp32``) with ``backend``.

    ``logits`` says who writes them: ``"host"``, the engine's DeepGEMM, or ``"own"``, ours by
    ``backend``. ``ask`` is True where DeepGEMM has to be asked for bfloat16, False where it writes
    what it writes. ``slots``: write the pool slots beside the indices, where the engine's attention
    takes them from there. ``unfilled``: leave out the engine's fill with -1 where every row is
    written.
    """

    dtype: str
    backend: str
    ask: bool = False
    logits: str = "host"
    slots: bool = False
    unfilled: bool = False

    @property
    def on(self) -> str:
        """What is selected on, for people."""
        dtype = "float32" if self.dtype == "fp32" else self.dtype
        return f"{'own ' if self.logits == 'own' else ''}{dtype} logits"


@dataclass(frozen=True)
class Plan:
    """``None`` means upstream. ``enabled`` False: every patched name is a straight pass-through."""

    enabled: bool = False
    strict: bool = False
    topk: Topk | None = None
    gather: str | None = None


INERT = Plan()
_current = INERT
_off: set[str] = set()


def current() -> Plan:
    """Return the plan in force."""
    return _current


def decide(plan: Plan) -> None:
    """Put a plan into force."""
    global _current
    _current = plan
    if plan is INERT:
        _off.clear()


def is_off(part: str) -> bool:
    """Whether :func:`switch_off` took ``part`` away in this process."""
    return part in _off


def switch_off(part: str, error: Exception) -> None:
    """Leave a part (``topk``, ``gather``) to upstream from now on, because ours has just failed.

    Both kinds of top-k and the bfloat16 logits go together: logits in bfloat16 have no reader
    upstream.
    """
    _off.add(part)
    if part == "topk":
        decide(replace(_current, topk=None))
    elif part == "gather":
        decide(replace(_current, gather=None))
    why = f"failed at a call and was switched off ({type(error).__name__}: {error})"
    for name, seam in state.seams.items():
        if name.startswith(part) or (part == "topk" and name == "logits"):
            seam.why = why
    state.fail(part, why)
    log.once(
        logging.ERROR,
        f"{part} {why}; the own code of {state.host or 'the engine'} serves this and every later "
        "call",
    )
