"""Decide once for each kind of call, at its first real use, and say so in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from dsv4_plugin import envs, facts, log
from dsv4_plugin.engines.shared import activation, decision, plan
from dsv4_plugin.engines.shared.decision import Passed
from dsv4_plugin.engines.shared.plan import Plan, Topk
from dsv4_plugin.state import state

__all__ = ["Decisions", "announce"]


class _Kind(Hashable, Protocol):
    """What a decision depends on; ``str()`` of it names it in the log."""

    @property
    def device(self) -> torch.device:
        """Where the scores are."""


Kind = TypeVar("Kind", bound=_Kind)


class Decisions(Generic[Kind]):
    """What was decided; a look-up afterwards, so that it may stand on the hot path."""

    def __init__(self) -> None:
        self._made: dict[Kind, Topk | None] = {}

    def forget(self) -> None:
        """Forget every decision."""
        self._made.clear()

    def get(
        self,
        kind: Kind,
        candidates: Sequence[str],
        possible: Callable[[envs.Settings, str], tuple[Topk | None, list[str]]],
        report: Callable[[Topk | None, Passed], None],
    ) -> Topk | None:
        """Return how a call of this kind selects, or None: upstream.

        ``candidates`` are the dtypes of ``auto``, best first; ``possible`` and ``report`` are
        called where there is no decision yet.

        Raises:
            SettingError: a setting has a value it cannot have.
            UnmetError: an explicit setting cannot be met; the message has every reason.
        """
        if plan.is_off("topk"):
            return None
        try:
            return self._made[kind]
        except KeyError:
            pass
        activation.configure_log()
        if not envs.asked():
            return None
        settings = envs.settings()
        facts.process(state.host or "an engine")
        facts.device(kind.device)
        plan.decide(Plan(True, settings.strict))
        topk, passed = decision.choose_topk(
            settings, candidates, lambda d: possible(settings, d), str(kind)
        )
        self._made[kind] = topk
        plan.decide(Plan(True, settings.strict, topk))
        report(topk, passed)
        return topk


def announce(what: str, names: Sequence[str], topk: Topk | None, passed: Passed) -> None:
    """Log what engaged at the seams ``names``, and why not; the seams' state says the same."""
    why = "; ".join(f"not {name}: {'; '.join(reasons)}" for name, reasons in passed.items())
    if topk is None:  # what keeps the last choice away keeps everything away
        why = "; ".join(list(passed.values())[-1])
    for name in names:
        seam = state.seams.get(name)
        if seam is None or seam.where is None:
            continue
        if topk is None:
            seam.why = why
        elif name == "logits" and topk.dtype == "fp32" and topk.logits == "host":
            seam.why = why or "logits stay as the engine has them"
        else:
            seam.why = None
    if topk is None:
        said = f"dsv4 inactive in {state.host}, {what}: upstream's top-k ({why})"
    else:
        where = ", ".join(state.seams[n].where or "?" for n in names if n.startswith("topk"))
        said = (
            f"dsv4 active in {state.host}, {what}: {topk.dtype} by {topk.backend} on {topk.on} at "
            f"{where}" + (f" ({why})" if why else "")
        )
    log.once(logging.INFO, said)
