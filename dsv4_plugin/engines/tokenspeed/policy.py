"""The decision on what a kernel of the plugin does, at its first real call by TokenSpeed.

TokenSpeed's registry has already checked dtypes, shapes and the architecture. The policy checks the
settings and DeepGEMM. An explicit setting that cannot be met is one error with every reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_plugin import envs
from dsv4_plugin.engines.shared import adapter, decision, logits, shadow
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.engines.tokenspeed import dsv41

__all__ = ["decide"]


@dataclass(frozen=True)
class _Kind:
    """Calls that share one decision; V4.1's have a ``layer`` and reasons why they are ``unfit``."""

    mode: str
    k: int
    device: torch.device
    layer: str = ""
    unfit: tuple[str, ...] = ()

    def __str__(self) -> str:
        of = f"DeepSeek-V4.1 {self.layer} layers, " if self.layer else ""
        return f"{of}{self.mode}, k {self.k}, {self.device}"


def decide(
    mode: str, k: int, device: torch.device, layer: str = "", unfit: tuple[str, ...] = ()
) -> Selection | None:
    """Return how a call of ``mode`` selects, or None for TokenSpeed's own kernel."""
    kind, now = _Kind(mode, k, device, layer, unfit), adapter.current()

    def report(selection: Selection | None, passed: decision.PassedOver) -> None:
        now.report(str(kind), (f"topk.{mode}",), selection, passed)
        if selection is not None:
            why = "TokenSpeed's kernels compute the scores and select in one call"
            shadow.unavailable(mode, why)

    return now.decide_once(
        kind, ("bf16", "fp32"), lambda settings, dtype: _possible(settings, kind, dtype), report
    )


def _possible(
    settings: envs.Settings, kind: _Kind, dtype: str
) -> tuple[Selection | None, list[str]]:
    def engine() -> list[str]:
        if kind.layer:
            return ["candidates are selected from the plugin's own logits"]
        return _deep_gemm(dtype, "prefill" if "prefill" in kind.mode else "decode")

    which = dsv41.LOGITS_OPS.get(kind.layer, ("paged_logits", "ragged_logits"))
    return logits.select(
        settings,
        dtype,
        [*kind.unfit, *decision.unfit_k(kind.k)],
        [(kind.device, kind.k)],
        engine,
        lambda backend: logits.unmet(dtype, backend, kind.device, which),
    )


_WIDE = {"decode": "fp8_fp4_paged_mqa_logits", "prefill": "fp8_fp4_mqa_logits"}
_PLAIN = {"decode": "fp8_paged_mqa_logits", "prefill": "fp8_mqa_logits"}


def _deep_gemm(dtype: str, phase: str) -> list[str]:
    """Return why DeepGEMM cannot write the index logits in ``dtype``."""
    if dtype == "fp16":
        return ["DeepGEMM writes index logits in float32 or bfloat16 only"]
    try:
        import deep_gemm
    except Exception as error:
        return [f"deep_gemm cannot be imported ({type(error).__name__}: {error})"]
    if has_logits_dtype(getattr(deep_gemm, _WIDE[phase], None)):
        return []
    if dtype == "bf16":
        return [f"deep_gemm.{_WIDE[phase]} is missing or takes no logits_dtype"]
    if not callable(getattr(deep_gemm, _PLAIN[phase], None)):
        return [f"deep_gemm has neither {_WIDE[phase]} with logits_dtype nor {_PLAIN[phase]}"]
    return []
