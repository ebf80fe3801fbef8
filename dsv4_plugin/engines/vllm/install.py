"""Patch the seams of vLLM's indexer module and its neighbours, and restore the originals.

A seam that is not recognised (:mod:`.probe`) stays as vLLM has it, with one line in the log.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import log, processes
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.patches import Patch
from dsv4_plugin.engines.shared.seam import Found, Place, shown
from dsv4_plugin.engines.shared.source import Missing
from dsv4_plugin.engines.vllm import candidates, policy, wrappers
from dsv4_plugin.engines.vllm.adapter import VllmAdapter
from dsv4_plugin.engines.vllm.late_patches import around
from dsv4_plugin.engines.vllm.probe import SEAMS

__all__ = ["install", "uninstall"]

Make = Callable[[Place, Found], Any]


def install(module: Any) -> None:
    """Look for every seam of vLLM, and patch those that are there; ``module`` is its indexer."""
    before = adapter.current()
    if isinstance(before, VllmAdapter) and before.indexer is module:
        log.debug(f"{before.engine}: {module.__name__} is patched already")
        return
    now = VllmAdapter(module)
    adapter.start(now)
    for seam in SEAMS:
        try:
            places = seam.first(Place.in_source if seam.late else Place.in_process)
            make = _REPLACEMENTS.get(seam.name)
            now.patches[seam.name] = [
                _patch(now, place, found, make) for place, found in places if make is not None
            ]
            now.found(seam.name, shown(place for place, _ in places), "no layer was built yet")
        except Missing as error:
            now.found(seam.name, None, str(error))
        except Exception as error:  # an engine of an unknown form counts as one without the seam
            why = f"could not be patched ({type(error).__name__}: {error})"
            now.found(seam.name, None, why)
    now.missing(without=[seam.name for seam in SEAMS if seam.optional])


def uninstall() -> None:
    """Restore every attribute, and end the adapter."""
    adapter.end()


def _patch(now: VllmAdapter, place: Place, found: Found, make: Make) -> Patch:
    replacement = make(place, found)
    if isinstance(found.original, staticmethod):
        replacement = staticmethod(replacement)
    return now.ledger.replace(found.owner, found.name, replacement, str(place))


def _init(place: Place, found: Found) -> Any:
    original = found.original

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        policy.built(self)

    return __init__


def _decode_topk(place: Place, found: Found) -> Any:
    if place.op:
        return TopkOp(found)
    original = found.original

    @functools.wraps(original)
    def forward(
        self: Any,
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        next_n: int,
        topk_indices: torch.Tensor,
        topk_tokens: int,
        max_seq_len: int,
    ) -> None:
        def engine(plain: torch.Tensor, out: torch.Tensor) -> None:
            original(self, plain, seq_lens, next_n, out, topk_tokens, max_seq_len)

        wrappers.decode_topk(
            logits, seq_lens, next_n, topk_indices, topk_tokens, engine, max_seq_len
        )

    return forward


_OP_TAKES = ("logits", "lengths", "output", "workspace", "k", "max_seq_len")


_resolving = processes.lock()


class TopkOp:
    """Replaces ``torch.ops._C.<name>``: it takes the calls; other attributes are the real ones."""

    def __init__(self, found: Found) -> None:
        self._space, self._name = found.owner, found.name
        # If another plugin, or torch's cache, has set the attribute already, keep its value.
        self.resolved: Any = found.original

    def packet(self) -> Any:
        """Return the real op; it is resolved late, because vLLM may load its library after this."""
        if self.resolved is None:
            with _resolving:
                try:
                    # Finds the op in the dispatcher, and stores it under its name.
                    self.resolved = type(self._space).__getattr__(self._space, self._name)
                finally:
                    setattr(self._space, self._name, self)
        return self.resolved

    def problem(self) -> str | None:
        """Return why the plugin cannot read the op's calls, or None."""
        where = f"torch.ops._C.{self._name}"
        try:
            packet = self.packet()
        except AttributeError:
            return f"{where} is not registered"
        schema = getattr(getattr(packet, "default", None), "_schema", None)
        if schema is not None:
            got = tuple(argument.name for argument in schema.arguments)
            if got != _OP_TAKES:
                return f"{where} takes ({', '.join(got)}), not ({', '.join(_OP_TAKES)})"
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.packet(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the call if it has the form that the indexer uses."""
        now = adapter.current().in_force()
        if kwargs or len(args) != len(_OP_TAKES) or now.selection is None:
            return wrappers.topk_op_by_engine(self.packet(), args, kwargs)
        logits, lengths, output, workspace, k, max_seq_len = args
        # [batch, next_n] has one length for each row; fewer lengths than rows mean one a request.
        if lengths.dim() == 2 and lengths.shape[1] > 1:
            next_n = lengths.shape[1]
        else:
            next_n = max(1, logits.shape[0] // max(1, lengths.numel()))

        def engine(plain: torch.Tensor, out: torch.Tensor) -> None:
            self.packet()(plain, lengths, out, workspace, k, max_seq_len)

        return wrappers.decode_topk(logits, lengths, next_n, output, k, engine, max_seq_len)


def _around(wrapper: Callable[..., Any]) -> Make:
    return lambda place, found: around(found.function, wrapper)


_LOGITS = {
    "fp8_fp4_paged_mqa_logits": wrappers.paged_logits,
    "fp8_fp4_mqa_logits": wrappers.dense_logits,
    "as_fp32_logits": wrappers.as_fp32_logits,
}
_CANDIDATES = {
    "_select_candidate_blocks": candidates.select_blocks,
    "_apply_candidate_mask": candidates.apply_mask,
}
# The function for each seam. Seams without an entry are patched when a layer needs them
# (:mod:`.late_patches`).
_REPLACEMENTS: dict[str, Make] = {
    "guard": _init,
    "topk.decode": _decode_topk,
    "topk.prefill": _around(wrappers.prefill_topk),
    "logits": lambda place, found: around(found.function, _LOGITS[place.attribute]),
    "candidates": lambda place, found: around(found.function, _CANDIDATES[place.attribute]),
    "gather": _around(wrappers.gather),
    "budget": _around(wrappers.prefill_chunks),
}
