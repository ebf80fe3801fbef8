"""What a call gets: decided once for each kind of call, at its first real use.

That is during SGLang's start (memory profiling, graph capture, warm-up), so an explicit wish that
cannot be met ends the start with one error that lists every unmet condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv4_plugin import backends, envs
from dsv4_plugin.engines.sglang import install
from dsv4_plugin.engines.shared import decision, logits, shadow
from dsv4_plugin.engines.shared.decisions import Decisions, announce
from dsv4_plugin.engines.shared.plan import Topk
from dsv4_plugin.state import state

__all__ = ["forget", "for_dsa", "for_v4"]

_V4 = "DeepSeek-V4 indexer"
_DSA = "DSA top-k"
# SGLang's own switches that put another implementation in; absent names are ignored.
_OTHER_TOPK = ("SGLANG_TOPK_TRANSFORM_512_TORCH",)
_OTHER_LOGITS = (
    "SGLANG_OPT_USE_TILELANG_INDEXER",
    "SGLANG_OPT_USE_AITER_INDEXER",
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH",
)


@dataclass(frozen=True)
class _Kind:
    """What a decision depends on; everything here is fixed for a model and a backend."""

    name: str
    k: int
    device: torch.device
    backend: Any  # SGLang's DSATopKBackend, or None before 0.5.17
    fp4: bool = False

    def __str__(self) -> str:
        return f"{self.name}, k {self.k}, {self.device}"


_decisions: Decisions[_Kind] = Decisions()
forget = _decisions.forget


def for_v4(backend_mixin: Any, c4_indexer: Any, device: torch.device) -> Topk | None:
    """Return how the indexer of DeepSeek-V4 selects, or None: upstream."""
    k = getattr(c4_indexer, "index_topk", 0)
    chosen = getattr(backend_mixin, "dsa_topk_backend", None)
    fp4 = bool(getattr(c4_indexer, "use_fp4_indexer", False))
    return _get(_Kind(_V4, k, device, chosen, fp4))


def for_dsa(dsa_backend: Any, k: int, device: torch.device) -> Topk | None:
    """Return how a decode-shaped PAGED top-k of V3.2 or GLM selects, or None: upstream."""
    return _get(_Kind(_DSA, k, device, dsa_backend))


def _get(kind: _Kind) -> Topk | None:
    if not install.installed():
        return None
    names = ("forward", "topk.paged", "logits") if kind.name == _V4 else ("topk.dsa",)

    def decided(topk: Topk | None, passed: decision.Passed) -> None:
        announce(str(kind), names, topk, passed)
        if topk is not None:
            shadow.prepare(kind.device, "paged" if kind.name == _V4 else "dsa")

    return _decisions.get(
        kind,
        ("bf16", "fp32") if kind.name == _V4 else ("fp32",),
        lambda settings, dtype: _possible(dtype, settings, kind),
        decided,
    )


def _possible(dtype: str, settings: envs.Settings, kind: _Kind) -> tuple[Topk | None, list[str]]:
    reasons = decision.unfit_k(kind.k)
    if settings.indexer_read not in ("auto", "off"):
        reasons.append(
            f"DSV4_INDEXER_READ={settings.indexer_read} has no seam: {state.host} gathers the "
            "indexer's keys with one kernel of its own"
        )
    if kind.fp4:
        reasons.append("the indexer cache is MXFP4 (--enable-deepseek-v4-fp4-indexer)")
    if kind.backend is not None and not kind.backend.is_sgl_kernel():
        name = getattr(kind.backend, "value", kind.backend)
        reasons.append(f"SGLang was told to use --dsa-topk-backend {name}")
    reasons += [f"SGLang was told to use its own top-k by {n}" for n in _OTHER_TOPK if _set(n)]
    for name in ("forward", "topk.paged") if kind.name == _V4 else ("topk.dsa",):
        reasons += install.problems(name)
    backend = decision.topk_backend(settings, kind.device.type != "cpu")
    reasons += decision.unmet_topk(dtype, backend, kind.device, kind.k)
    who, why = logits.choose(
        settings,
        dtype,
        lambda: _host_logits(dtype, kind),
        lambda: _own_logits(dtype, backend, kind),
    )
    reasons = decision.unique([*reasons, *why])
    ask = dtype == "bf16" and who == "host"
    return (None, reasons) if reasons else (Topk(dtype, backend, ask, who), [])


def _elsewhere(kind: _Kind) -> list[str]:
    """Return why the logits of this call do not come from the functions that can be wrapped."""
    if kind.name != _V4:
        return ["V3.2 and GLM select on float32 logits; they were not trained with bfloat16 ones"]
    reasons = install.problems("logits")
    return reasons + [
        f"SGLang was told to compute its index logits elsewhere by {name}"
        for name in _OTHER_LOGITS
        if _set(name)
    ]


def _own_logits(dtype: str, backend: str, kind: _Kind) -> list[str]:
    """Return why our kernel cannot write the logits here."""
    if kind.name != _V4:
        return ["own logits: V3.2 and GLM have no seam for them in SGLang"]
    reasons = [] if kind.fp4 else _elsewhere(kind)
    reasons += logits.unmet(dtype, backend, kind.device)
    return reasons or ([] if kind.fp4 else install.wrap_deep_gemm())  # fp4: said already


def _host_logits(dtype: str, kind: _Kind) -> list[str]:
    """Return why DeepGEMM cannot write this dtype here."""
    if dtype == "fp32" or kind.fp4:  # said already
        return []
    if dtype == "fp16":
        return ["DeepGEMM writes index logits in float32 or bfloat16 only"]
    reasons = _elsewhere(kind)
    if kind.device.type == "cuda" and backends.capability(kind.device) < (9, 0):
        reasons.append("DeepGEMM's index logits need a GPU of compute capability 9.0 or later")
    return reasons or install.wrap_deep_gemm(asked=True)


def _set(name: str) -> bool:
    from sglang.srt.environ import envs as theirs

    variable = getattr(theirs, name, None)
    try:
        return bool(variable is not None and variable.get())
    except Exception:  # not a switch any more
        return False
