"""What this process does at each seam: decided when a layer is built, read at every call."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from dsv4_plugin import log
from dsv4_plugin.state import state

__all__ = ["INERT", "KS", "Plan", "Topk", "current", "decide", "switch_off"]

KS = (512, 1024, 2048)  # the k that vLLM's own kernels have; all else stays with upstream


@dataclass(frozen=True)
class Topk:
    """Select in ``dtype`` (``bf16`` or ``fp32``) with ``backend``.

    ``ask`` is True where DeepGEMM has to be asked for bfloat16, False where it writes what it
    writes.
    """

    dtype: str
    backend: str
    ask: bool = False


@dataclass(frozen=True)
class Plan:
    """``None`` means upstream. ``enabled`` False: every patched name is a straight pass-through."""

    enabled: bool = False
    strict: bool = False
    topk: Topk | None = None
    gather: str | None = None


INERT = Plan()
_current = INERT


def current() -> Plan:
    """Return the plan in force."""
    return _current


def decide(plan: Plan) -> None:
    """Put a plan into force."""
    global _current
    _current = plan


def switch_off(part: str, error: Exception) -> None:
    """Leave ``topk`` or ``gather`` to upstream from now on, because ours has just failed.

    Both kinds of top-k and the bfloat16 logits go together: logits in bfloat16 have no reader
    upstream.
    """
    if part == "topk":
        decide(replace(_current, topk=None))
    else:
        decide(replace(_current, gather=None))
    why = f"failed at a call and was switched off ({type(error).__name__}: {error})"
    for name, seam in state.seams.items():
        if name.startswith(part) or (part == "topk" and name == "logits"):
            seam.why = why
    log.once(logging.ERROR, f"{part} {why}; vLLM's own code serves this and every later call")
