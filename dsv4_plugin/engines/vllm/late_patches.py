"""Patches that can only be made when a layer is built. Each has a check and a patch function.

A check (``unmet_…``, :func:`takes_logits_dtype`) changes nothing. It returns why the patch cannot
be used, or an empty list if it can. A patch function (``patch_…``) makes the patch, once.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.engines.shared.patches import Ledger
from dsv4_plugin.engines.shared.seam import Place
from dsv4_plugin.engines.shared.source import Missing
from dsv4_plugin.engines.vllm import fill, row_shard, wrappers
from dsv4_plugin.engines.vllm.adapter import VllmAdapter
from dsv4_plugin.engines.vllm.probe import (
    DEEP_GEMM,
    OP,
    SHARD,
    SHARDS_ITSELF,
    TO_SLOTS,
)
from dsv4_plugin.state import state

__all__ = [
    "around", "patch_logits_dtype", "patch_op", "patch_shard", "patch_slots", "shards_itself",
    "takes_logits_dtype", "unmet_op", "unmet_shard", "unmet_slots",
]  # fmt: skip

_IMPLEMENTATIONS = ("_fp8_fp4_paged_mqa_logits_impl", "_fp8_fp4_mqa_logits_impl")


def around(original: Any, wrapper: Any) -> Any:
    """Return a function with the signature of ``original`` that calls ``wrapper(original, …)``."""

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return patched


def _problems(now: VllmAdapter, name: str) -> list[str] | None:
    """Return the answer for a seam that was not found or is patched already; None otherwise."""
    seam = state.seams.get(name)
    if seam is None or seam.where is None or now.patches.get(name):
        return now.problems(name)
    return None


# --- the slots that the attention takes ------------------------------------------------------


def unmet_slots(now: VllmAdapter) -> list[str]:
    """Return why the attention cannot take slots from the top-k."""
    known = _problems(now, "topk.slots")
    if known is not None:
        return known
    places = _attentions()
    if not places:
        names = " and ".join(place.module for place in TO_SLOTS)
        return [f"neither of {names} is this model's attention"]
    try:
        for place in places:
            place.in_process()
    except Missing as error:
        return [str(error)]
    return []


def _attentions() -> list[Place]:
    return [place for place in TO_SLOTS if place.module in sys.modules]


def patch_slots(now: VllmAdapter) -> None:
    """Let the attention take the slots of the top-k."""
    if not now.patches.get("topk.slots"):
        patches = []
        for place in _attentions():
            found = place.in_process()
            wrapper = around(found.original, wrappers.take_slots)
            patches.append(now.ledger.replace(found.owner, found.name, wrapper, str(place)))
        now.patches["topk.slots"] = patches


# --- the indexer's op ------------------------------------------------------------------------


class IndexerOp:
    """Replaces ``torch.ops.vllm.sparse_attn_indexer``: calls the op by :func:`.fill.run_op`."""

    def __init__(self) -> None:
        self.resolved: Any = torch.ops.vllm.sparse_attn_indexer
        arguments = self.resolved.default._schema.arguments
        self.at = {argument.name: place for place, argument in enumerate(arguments)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.resolved, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the op."""
        if torch.compiler.is_compiling():
            return self.resolved(*args, **kwargs)
        return fill.run_op(self.resolved, self.at, args, kwargs)


def unmet_op(now: VllmAdapter, config: Any) -> list[str]:
    """Return why the plugin cannot replace the indexer's op in this model."""
    known = _problems(now, "topk.fill")
    mode = getattr(getattr(config, "compilation_config", None), "mode", None)
    if not known and getattr(mode, "name", None) != "NONE":
        return ["the model is compiled, so the call of the op is traced"]
    return known or []


def patch_op(now: VllmAdapter) -> None:
    """Replace the indexer's op."""
    if not now.patches.get("topk.fill"):
        patch = now.ledger.replace(torch.ops.vllm, "sparse_attn_indexer", IndexerOp(), OP)
        now.patches["topk.fill"] = [patch]


# --- the rows of a prefill -------------------------------------------------------------------


def shards_itself() -> bool:
    """Whether this vLLM shards the rows of a prefill among ranks."""
    return hasattr(sys.modules.get(SHARDS_ITSELF.module), SHARDS_ITSELF.attribute)


def unmet_shard(now: VllmAdapter) -> list[str]:
    """Return why a step's prefill chunks cannot be narrowed."""
    known = _problems(now, "shard")
    if known is not None:
        return known
    try:
        for place in SHARD:
            place.in_process()
    except Missing as error:
        return [str(error)]
    return []


def patch_shard(now: VllmAdapter) -> None:
    """Narrow a step's prefill chunks, and gather behind the last one of a layer."""
    if not now.patches.get("shard"):
        patches = []
        for place, wrapper in zip(SHARD, (row_shard.narrow, row_shard.gather), strict=True):
            found = place.in_process()
            patched = around(found.original, wrapper)
            patches.append(now.ledger.replace(found.owner, found.name, patched, str(place)))
        now.patches["shard"] = patches


# --- DeepGEMM's bfloat16 ---------------------------------------------------------------------


def _deep_gemm() -> Any:
    """Return vLLM's module of DeepGEMM, after resolving DeepGEMM as vLLM does at its first use."""
    module = sys.modules.get(DEEP_GEMM)
    resolve = getattr(module, "_lazy_init", None)
    if resolve is None:
        return None
    resolve()
    return module


def takes_logits_dtype() -> bool:
    """Whether vLLM's DeepGEMM can write bfloat16 logits on request."""
    module = _deep_gemm()
    return all(has_logits_dtype(getattr(module, name, None)) for name in _IMPLEMENTATIONS)


def patch_logits_dtype(ledger: Ledger) -> None:
    """Let the calls of the indexer ask DeepGEMM for bfloat16."""
    module = _deep_gemm()
    for name in _IMPLEMENTATIONS:
        earlier = [p for p in ledger.patches if p.owner is module and p.name == name]
        if earlier and earlier[0].in_place:
            continue
        if earlier:  # vLLM resolved DeepGEMM again
            ledger.patches.remove(earlier[0])
        wrapper = around(getattr(module, name), wrappers.with_logits_dtype)
        ledger.replace(module, name, wrapper, f"{DEEP_GEMM}.{name}")
