"""Decides how a call selects, once for each kind of call, at its first real use.

This happens during SGLang's start (memory profiling, graph capture, warm-up). So an explicit
setting that cannot be met ends the start with one error that lists every unmet condition.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4_plugin import envs
from dsv4_plugin.engines.sglang import deep_gemm, row_shard
from dsv4_plugin.engines.sglang.adapter import SglangAdapter, current
from dsv4_plugin.engines.shared import aside, decision, logits, shadow
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.row_shard import say
from dsv4_plugin.ops import dispatch as backends

__all__ = ["KINDS", "V41_HEADS", "V41_K", "LayerKind", "for_dsa", "for_v4", "for_v41"]

V41_HEADS, V41_K = 32, 512  # of DeepSeek-V4.1's index layers

# SGLang's own switches that choose another implementation; absent names are ignored.
_OTHER_TOPK = ("SGLANG_TOPK_TRANSFORM_512_TORCH",)
_OTHER_LOGITS = (
    "SGLANG_OPT_USE_TILELANG_INDEXER",
    "SGLANG_OPT_USE_AITER_INDEXER",
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH",
)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layers. A new one is a new record in :data:`KINDS` and a hook that names it.

    ``dtypes`` are those that ``DSV4_TOPK=auto`` tries, best first. ``seams`` are those that the
    selection needs. ``counters`` name its calls. ``float32_logits``: why it can select only on
    SGLang's own logits; empty if the plugin can write them, or ask for bfloat16.
    ``fp4_ops``: the ops that score FP4 keys for it, where it selects on the plugin's own logits.
    ``steps_aside``: SGLang's own kernel gets the calls in which it is faster.
    """

    name: str
    dtypes: tuple[str, ...]
    seams: tuple[str, ...]
    counters: tuple[str, ...]
    float32_logits: str = ""
    fp4_ops: tuple[str, ...] = ()
    steps_aside: bool = False


_SCAN = ("paged_logits", "block_maxima", "candidate_logits", "candidate_select")

KINDS = {
    "v4": LayerKind("DeepSeek-V4 indexer", ("bf16", "fp32"), ("forward", "topk.paged"), ("paged",)),
    "dsa": LayerKind(
        "DSA top-k",
        ("fp32",),
        ("topk.dsa",),
        ("dsa",),
        "V3.2 and GLM select on float32 logits; they were not trained with bfloat16 ones",
        steps_aside=True,
    ),
    # The scores of FP4 keys are bfloat16 numbers in SGLang too.
    "v41.candidates": LayerKind(
        "DeepSeek-V4.1 source and consumers",
        ("bf16",),
        ("topk.candidates",),
        ("v41.source", "v41.consumer"),
        fp4_ops=_SCAN,
    ),
    "v41.full": LayerKind(
        "DeepSeek-V4.1 plain", ("bf16",), ("topk.full",), ("v41.plain",), fp4_ops=_SCAN
    ),
}


@dataclass(frozen=True)
class _Call:
    """What a decision depends on; everything here is fixed for a model and a backend."""

    kind: LayerKind
    k: int
    device: torch.device
    backend: Any = None  # SGLang's DSATopKBackend; None before 0.5.17, and where it has no say
    fp4: bool = False  # MXFP4 where V4 has FP8
    unfit: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind.name}, k {self.k}, {self.device}"


def for_v4(backend_mixin: Any, c4_indexer: Any, device: torch.device) -> Selection | None:
    """Return how the indexer of DeepSeek-V4 selects, or None if SGLang selects."""
    k = getattr(c4_indexer, "index_topk", 0)
    chosen = getattr(backend_mixin, "dsa_topk_backend", None)
    fp4 = bool(getattr(c4_indexer, "use_fp4_indexer", False))
    return _get(_Call(KINDS["v4"], k, device, chosen, fp4))


def for_dsa(dsa_backend: Any, k: int, device: torch.device) -> Selection | None:
    """Return how a decode-shaped PAGED top-k of V3.2 or GLM selects, or None if SGLang selects."""
    return _get(_Call(KINDS["dsa"], k, device, dsa_backend))


def for_v41(which: str, device: torch.device, unfit: tuple[str, ...] = ()) -> Selection | None:
    """Return how ``candidates`` or ``full`` of DeepSeek-V4.1 select, or None if SGLang selects.

    ``unfit``: why the plugin cannot stand before the object that SGLang has made.
    """
    return _get(_Call(KINDS[f"v41.{which}"], V41_K, device, unfit=unfit))


def _get(call: _Call) -> Selection | None:
    now = current()
    if now is None:
        return None
    kind = call.kind
    names = kind.seams if kind.float32_logits or kind.fp4_ops else (*kind.seams, "logits")

    def report(selection: Selection | None, passed: decision.PassedOver) -> None:
        also = {}
        if kind is KINDS["v4"]:
            narrow = selection is not None and selection.dtype != "fp32"
            also["budget"] = None if narrow else "logits are float32"
        left = aside.said(selection, (call.k,))
        now.report(str(call), names, selection, passed, also, aside=left)
        if selection is not None:
            if "logits" in names and (selection.logits == "plugin" or selection.request_bf16):
                deep_gemm.patch(now.ledger)
            shadow.prepare(call.device, *kind.counters)

    return now.decide_once(
        call,
        kind.dtypes,
        lambda settings, dtype: _possible(now, settings, call, dtype),
        report,
        functools.partial(_shard, now) if kind is KINDS["v4"] else None,
    )


def _shard(now: SglangAdapter, settings: envs.Settings, selection: Selection | None) -> list[str]:
    """Shard the rows of prefills among the tensor-parallel ranks, or return why not."""
    why = row_shard.unmet(selection, settings.shadow)
    if not why and now.group is None:
        now.group = row_shard.group()
        say(now.engine, now.group)
    return why


def _possible(
    now: SglangAdapter, settings: envs.Settings, call: _Call, dtype: str
) -> tuple[Selection | None, list[str]]:
    reasons = [*decision.unfit_k(call.k), *call.unfit]
    if settings.indexer_read not in ("auto", "off"):
        reasons.append(
            f"DSV4_INDEXER_READ={settings.indexer_read} has no seam: {now.engine} gathers the "
            "indexer's keys with one kernel of its own"
        )
    if call.fp4:
        reasons.append("the indexer cache is MXFP4 (--enable-deepseek-v4-fp4-indexer)")
    if call.backend is not None and not call.backend.is_sgl_kernel():
        name = getattr(call.backend, "value", call.backend)
        reasons.append(f"SGLang's option --dsa-topk-backend is {name}")
    if not call.kind.fp4_ops:
        reasons += [f"SGLang's switch {n} chooses its own top-k" for n in _OTHER_TOPK if _set(n)]
    for name in call.kind.seams:
        reasons += now.problems(name)
    chosen, why = logits.select(
        settings,
        dtype,
        reasons,
        [(call.device, call.k)],
        lambda: _engine_logits(now, call, dtype),
        lambda backend: _plugin_logits(now, call, dtype, backend),
    )
    if call.kind.steps_aside:
        chosen = aside.engage(chosen, settings, now.engine, call.device)
    if chosen is not None and _prefill_by_deep_gemm(now, settings, call, chosen):
        chosen = replace(chosen, prefill_logits="engine")
    return chosen, why


def _prefill_by_deep_gemm(
    now: SglangAdapter, settings: envs.Settings, call: _Call, chosen: Selection
) -> bool:
    """Whether DeepGEMM writes the bfloat16 logits of prefill: it is faster there, and as exact.

    The plugin's kernel takes 1.01 to 1.05 of its time (benchmarks/results/h200_logits.json), and
    SGLang's forward with it 1.13 of that with DeepGEMM's (benchmarks/results/h100_sglang.json).
    """
    return (
        settings.logits == "auto"
        and (chosen.dtype, chosen.logits) == ("bf16", "plugin")
        and chosen.backend in aside.BACKENDS
        and not call.kind.fp4_ops
        and not _engine_logits(now, call, chosen.dtype)
    )


def _elsewhere(now: SglangAdapter, call: _Call) -> list[str]:
    """Return why the logits of this call do not come from functions that the plugin can wrap."""
    if call.kind.float32_logits:
        return [call.kind.float32_logits]
    return now.problems("logits") + [
        f"SGLang's switch {name} has its index logits computed elsewhere"
        for name in _OTHER_LOGITS
        if _set(name)
    ]


def _plugin_logits(now: SglangAdapter, call: _Call, dtype: str, backend: str) -> list[str]:
    """Return why the plugin's kernel cannot write the logits here."""
    if call.kind.fp4_ops:
        return _fp4_scores(call, dtype, backend)
    if call.kind.float32_logits:
        return ["plugin's logits: V3.2 and GLM have no seam for them in SGLang"]
    reasons = [] if call.fp4 else _elsewhere(now, call)  # MXFP4 is a reason already
    reasons += logits.unmet(dtype, backend, call.device)
    return reasons or ([] if call.fp4 else deep_gemm.unmet(now.ledger))


def _fp4_scores(call: _Call, dtype: str, backend: str) -> list[str]:
    """Return why the plugin cannot score the FP4 keys of DeepSeek-V4.1."""
    if dtype != "bf16":
        return [f"the scores of DeepSeek-V4.1's FP4 keys are bfloat16 numbers, not {dtype}"]
    why = [
        reason
        for op in call.kind.fp4_ops
        for reason in backends.unmet(
            backends.Call(op, call.device, torch.bfloat16, heads=V41_HEADS, fp4=True), backend
        )
    ]
    return [f"plugin's scores by {backend}: {reason}" for reason in decision.unique(why)]


def _engine_logits(now: SglangAdapter, call: _Call, dtype: str) -> list[str]:
    """Return why DeepGEMM cannot write this dtype here."""
    if call.kind.fp4_ops:
        return ["DeepSeek-V4.1 is served on the plugin's own scores only"]
    if dtype == "fp32" or call.fp4:  # MXFP4 is a reason already
        return []
    if dtype == "fp16":
        return ["DeepGEMM writes index logits in float32 or bfloat16 only"]
    reasons = _elsewhere(now, call)
    if call.device.type == "cuda" and backends.capability(call.device) < (9, 0):
        reasons.append("DeepGEMM's index logits need a GPU of compute capability 9.0 or later")
    return reasons or deep_gemm.unmet(now.ledger, request_bf16=True)


def _set(name: str) -> bool:
    from sglang.srt.environ import envs as switches

    variable = getattr(switches, name, None)
    try:
        return bool(variable is not None and variable.get())
    except Exception:  # no longer a switch
        return False
