"""All state of an engine's adapter in a process, in one object.

One process runs one engine. ``register()`` starts the adapter, and ``unregister()`` ends it. The
object holds its patches, decisions, layers and the state of its calls, so they all end with it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsv4_plugin import envs, facts, log
from dsv4_plugin.engines.shared import activation, shadow
from dsv4_plugin.engines.shared.decision import (
    INERT,
    Decision,
    PassedOver,
    Selection,
    choose_selection,
)
from dsv4_plugin.engines.shared.patches import Ledger, Patch
from dsv4_plugin.engines.shared.row_shard import SETTING
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.state import Seam, state

__all__ = ["Adapter", "CallContext", "current", "end", "start"]


_UNTOUCHED = ("fp32", "engine")  # what the engine writes without the plugin


class CallContext(threading.local):
    """What the engine's call on this thread decides for the calls inside it.

    ``kind``: the kind of layer whose indexer runs; None if the plugin cannot tell the kind.
    ``selection``: how that indexer selects (SGLang). ``request_bf16``: the DeepGEMM call inside
    writes bfloat16. ``fill_skipped``: the call of the op omits the fill with -1. ``gather``:
    the key gather that waits for a reader. ``requests``: the requests that the rows of a decode
    batch belong to, where the engine has made one request of each row. ``slots``: what the last
    top-k wrote for the attention. ``rows``: the rows of a prefill that is sharded among ranks
    (SGLang).
    """

    kind: Hashable | None = None
    selection: Selection | None = None
    request_bf16 = False
    fill_skipped = False
    gather: Any = None
    requests: Any = None
    slots: Any = None
    rows: Any = None


class Adapter:
    """The adapter's state: ``engine`` names the engine with its version.

    ``patches`` are the patches of each seam. ``decisions`` has the decision for each kind of layer
    or call; ``decision`` is for calls whose kind the plugin cannot tell. ``layers`` are the living
    layers, with the policy's facts about each. ``kinds`` maps a layer, as a call names it, to its
    kind; it is empty where one decision is for every layer. ``off`` are the parts that failed and
    were switched off.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.ledger = Ledger()
        self.patches: dict[str, list[Patch]] = {}
        self.decision = INERT
        self.decisions: dict[Hashable, Decision] = {}
        self.kinds: dict[Hashable, Hashable] = {}
        self.layers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.off: set[str] = set()
        self.call = CallContext()
        self._reasons: dict[str, dict[str, str | None]] = {}  # seam -> kind -> why not

    # --- seams -------------------------------------------------------------------------------

    def found(self, name: str, where: str | None, why: str | None = None) -> None:
        """Record the result of the search for a seam."""
        state.found(Seam(name, where, why))

    def missing(
        self, level: int = logging.INFO, prefix: str = "", without: Sequence[str] = ()
    ) -> list[str]:
        """Return the seams that were not found, and log them in one line.

        Only names with ``prefix`` count, except the names in ``without``.
        """
        seams = [
            seam
            for seam in state.seams.values()
            if seam.name.startswith(prefix) and seam.name not in without
        ]
        missing = [f"{seam.name} ({seam.why})" for seam in seams if seam.where is None]
        if missing:
            log.once(level, f"{self.engine}: the engine's own code stays at {'; '.join(missing)}")
        return missing

    def intact(self, name: str) -> bool:
        """Whether the patches of a seam are in force and no other code has replaced them since."""
        patches = self.patches.get(name, ())
        for patch in patches:
            if not patch.in_place:
                return False
        return bool(patches)

    def problems(self, name: str) -> list[str]:
        """Return why the plugin cannot use a seam; an empty list if it can."""
        seam = state.seams.get(name)
        if seam is None or seam.where is None:
            why = seam.why if seam else "not looked"
            return [f"seam {name} was not found in {self.engine}: {why}"]
        if not self.intact(name):
            return [f"seam {name} ({seam.where}) was patched by other code since"]
        shims = [
            p.replacement for p in self.patches[name] if hasattr(type(p.replacement), "problem")
        ]
        return [f"seam {name}: {why}" for why in (shim.problem() for shim in shims) if why]

    # --- decisions ---------------------------------------------------------------------------

    def in_force(self) -> Decision:
        """Return the decision for the call that runs on this thread."""
        kind = self.call.kind
        return self.decision if kind is None else self.decisions.get(kind, self.decision)

    def narrow_selections(self) -> list[Selection]:
        """Return how each kind of layer selects if all use logits of two bytes, else nothing."""
        every = [decision.selection for decision in self.decisions.values()]
        chosen = [s for s in every if s is not None and s.dtype != "fp32"]
        return chosen if len(chosen) == len(every) else []

    def decide(self, decision: Decision) -> None:
        """Put one decision into force for every kind of layer."""
        self.kinds.clear()
        self.decisions.clear()
        self._reasons.clear()
        self.decision = decision
        if decision is INERT:
            self.off.clear()

    def reselect(self, change: Callable[[Selection], Selection]) -> None:
        """Change how every kind of layer selects, after something that it relied on failed."""

        def changed(decision: Decision) -> Decision:
            chosen = decision.selection
            return decision if chosen is None else replace(decision, selection=change(chosen))

        self.decision = changed(self.decision)
        self.decisions = {kind: changed(each) for kind, each in self.decisions.items()}

    def forget_decisions(self) -> None:
        """Drop the decisions, so that the next call of each kind decides again."""
        self.decisions.clear()

    def decide_once(
        self,
        kind: Any,
        dtypes: Sequence[str],
        possible: Callable[[envs.Settings, str], tuple[Selection | None, list[str]]],
        report: Callable[[Selection | None, PassedOver], None],
        shard: Callable[[envs.Settings, Selection | None], list[str]] | None = None,
    ) -> Selection | None:
        """Return how calls of ``kind`` select, or None for the engine's own code.

        ``kind`` is hashable, has a ``device``, and its text names it in the log. ``dtypes`` are
        those of ``auto``, best first. ``possible`` and ``report`` run only if nothing is decided.
        ``shard`` returns why the plugin cannot shard prefills of this kind; the adapter calls it if
        ``DSV4_SHARD_PREFILL`` is set. None: it never can.

        Raises:
            SettingError: a setting has a value it cannot have.
            UnmetError: an explicit setting cannot be met; the message has every reason.
        """
        if "topk" in self.off:
            return None
        known = self.decisions.get(kind)
        if known is not None:
            return known.selection
        activation.configure_log()
        if not envs.asked():
            return None
        settings = envs.settings()
        facts.process(self.engine)
        facts.device(kind.device)
        self.decision = Decision(True, settings.strict)
        selection, passed = choose_selection(
            settings, dtypes, lambda dtype: possible(settings, dtype), str(kind)
        )
        if settings.shard_prefill:
            why = shard(settings, selection) if shard else ["no prefill of this kind is sharded"]
            if why:
                raise UnmetError(f"{SETTING}, {kind}", why)
        self.decisions[kind] = self.decision = Decision(True, settings.strict, selection)
        report(selection, passed)
        return selection

    def switch_off(self, part: str, error: Exception) -> None:
        """Leave a failed part (``topk``, ``gather``, ``read``) to the engine from now on.

        The logits are switched off with the top-k, because no code of the engine reads bfloat16
        logits.
        """
        self.off.add(part)
        without = {"topk": "selection", "gather": "gather"}.get(part)
        if without is not None:
            self.decision = replace(self.decision, **{without: None})  # type: ignore[arg-type]
            self.decisions = {
                kind: replace(decision, **{without: None})  # type: ignore[arg-type]
                for kind, decision in self.decisions.items()
            }
        why = f"failed at a call and was switched off ({type(error).__name__}: {error})"
        for name, seam in state.seams.items():
            if name.startswith(part) or (part == "topk" and name == "logits"):
                seam.why = why
        state.fail(part, why)
        log.once(
            logging.ERROR,
            f"{part} {why}; {self.engine} serves this and every later call with its own code",
        )

    # --- reports -----------------------------------------------------------------------------

    def report(
        self,
        what: str,
        names: Sequence[str],
        selection: Selection | None,
        passed: PassedOver,
        also: Mapping[str, str | None] | None = None,
        gather: tuple[str | None, Sequence[str]] | None = None,
        aside: str = "",
    ) -> None:
        """Log in one line what engaged for ``what``, where, and why not; record it at the seams.

        ``names`` are the seams of the selection. ``also`` gives the reasons of further seams (None:
        engaged). ``gather`` is the backend of the key gather, or None and why. ``aside`` names the
        calls that are left to the engine's own kernel, because that is faster there.
        """
        why = "; ".join(f"not {name}: {'; '.join(reasons)}" for name, reasons in passed.items())
        if selection is None:  # the reasons against the last dtype are reasons against all
            why = "; ".join(list(passed.values())[-1])
        reasons: dict[str, str | None] = dict.fromkeys(names, why if selection is None else None)
        if "logits" in names and selection and (selection.dtype, selection.logits) == _UNTOUCHED:
            reasons["logits"] = why or "logits stay as the engine has them"
        parts = []
        if selection is None:
            parts.append(f"top-k: the engine's ({why})")
        else:
            where = ", ".join(
                state.seams[name].where or "?" for name in names if name.startswith("topk")
            )
            kept = f", left to {self.engine} where that is faster: {aside}" if aside else ""
            parts.append(
                f"top-k: {selection.dtype} by {selection.backend} on {selection.on} at "
                f"{where}" + (f" ({why})" if why else "") + kept
            )
        active = selection is not None
        if gather is not None:
            backend, whys = gather
            reasons["gather"] = None if backend else "; ".join(whys)
            active = active or backend is not None
            parts.append(
                f"key gather: {backend} at {state.seams['gather'].where}"
                if backend
                else f"key gather: the engine's ({'; '.join(whys)})"
            )
        for name, reason in {**reasons, **(also or {})}.items():
            seam = state.seams.get(name)
            if seam is not None and seam.where is not None:
                kinds = self._reasons.setdefault(name, {})
                kinds[what] = reason
                engaged = None in kinds.values()
                seam.why = None if engaged else "; ".join(dict.fromkeys(map(str, kinds.values())))
        word = "active" if active else "inactive"
        log.once(logging.INFO, f"dsv4 {word} in {self.engine}, {what}: {'. '.join(parts)}")


_current = Adapter("an engine")


def current() -> Adapter:
    """Return the adapter of this process; before ``register()`` it is one that changes nothing."""
    return _current


def start(adapter: Adapter) -> None:
    """Make ``adapter`` the adapter of this process, in place of an earlier one."""
    global _current
    end()
    _current = adapter
    state.engine = adapter.engine


def end() -> None:
    """End the adapter of this process: restore the originals and drop the state.

    A wrapper that stays in the engine, because other code has patched over it, finds an adapter
    that changes nothing.
    """
    global _current
    _current.ledger.restore(lambda patch: getattr(patch.replacement, "resolved", None))
    _current = Adapter("an engine")
    envs.override(None)
    shadow.forget()
    state.reset()
