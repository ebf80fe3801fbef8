"""Which hooks are put where. Each is looked for first (:mod:`.probe`), AROUND, and reversible.

DeepGEMM is not hooked by the registry: resolving such a target imports it, and it loads a CUDA
extension, in launchers too. Its functions are wrapped when the indexer's forward first runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any

from dsv4_plugin import log
from dsv4_plugin.engines.sglang import probe, registry
from dsv4_plugin.engines.shared import decision, plan, shadow
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.engines.shared.patches import Ledger
from dsv4_plugin.state import Seam, state

__all__ = ["install", "installed", "intact", "problems", "uninstall", "wrap_deep_gemm"]

_ledger = Ledger()
_targets: dict[str, tuple[str, ...]] = {}
_PAGED = ("scores", "seq_lens", "page_tables", "out_page_indices", "page_size")


def install() -> None:
    """Register a hook for every seam that is there."""
    from dsv4_plugin.engines.sglang import wrappers

    if _targets:
        return
    state.host = f"SGLang {_version()}"
    found = probe.look()
    hooks: dict[str, tuple[Callable[..., Any], ...]] = {
        "forward": (wrappers.forward,),
        "topk.paged": (wrappers.topk_v1, wrappers.topk_v2),
        "topk.dsa": (wrappers.topk_dsa,),
    }
    for name, site in found.items():
        state.found(Seam(name, site.where, site.why or "no call came yet"))
        if name in hooks:
            _targets[name] = site.targets
            for target, hook in zip(site.targets, hooks[name], strict=False):
                registry.around(target, hook)
    state.seams["flag"].why = found["flag"].why
    missing = [f"{name} ({site.why})" for name, site in found.items() if site.where is None]
    if missing:
        # Nothing else can tell of a wish for a seam that is not there: no call would reach us.
        level = logging.ERROR if decision.explicit() else logging.INFO
        log.once(level, f"{state.host}: upstream's stays at {'; '.join(missing)}")


def _version() -> str:
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def uninstall() -> None:
    """Put DeepGEMM back and forget what was decided; the registry's hooks are its own business."""
    from dsv4_plugin.engines.sglang import policy

    _ledger.restore()
    _targets.clear()
    policy.forget()
    plan.decide(plan.INERT)
    shadow.forget()
    state.reset()


def installed() -> bool:
    """Whether the hooks may act; after ``unregister()`` one that is left passes through."""
    return bool(_targets)


def intact(name: str) -> bool:
    """Whether every call of a seam reaches our hook first."""
    targets = _targets.get(name)
    return bool(targets) and all(registry.intact(target) for target in targets or ())


def problems(name: str) -> list[str]:
    """Return why a seam cannot be used; an empty list if it can."""
    seam = state.seams.get(name)
    if seam is None or seam.where is None:
        return [f"seam {name} was not found in {state.host}: {seam.why if seam else 'not looked'}"]
    reasons = []
    for target in _targets.get(name, ()):
        if not registry.intact(target):
            others = registry.other_hooks(target)
            who = f" ({', '.join(others)})" if others else ""
            reasons.append(f"seam {name} ({target}) is hooked by somebody else as well{who}")
        elif name == "topk.paged":
            reasons += _signature_problem(target)
    return reasons


def _signature_problem(target: str) -> list[str]:
    """Return why a top-k function of SGLang's cannot be stood in for."""
    want = (*_PAGED, "metadata") if target.endswith("_v2") else _PAGED
    try:
        got = tuple(inspect.signature(registry.hooked(target)).parameters)
    except (TypeError, ValueError):
        return [f"{target} has no readable signature"]
    if got not in (want, (*want, "out_raw_indices")):  # 0.5.19's v2 has none
        return [f"{target} takes ({', '.join(got)}), not ({', '.join(want)}, out_raw_indices)"]
    return []


def wrap_deep_gemm(asked: bool = False) -> list[str]:
    """Wrap DeepGEMM's logits functions, so that the decision counts; return why that cannot be.

    With ``asked`` they also have to write bfloat16 when they are asked for it.

    Why: SGLang calls the functions that write float32 only, though V4 was trained with bfloat16
    scores; half the bytes are written and read. Our own kernel writes them, or DeepGEMM where ours
    cannot and it has the functions. May go when SGLang can be told to write bfloat16.
    """
    from dsv4_plugin.engines.sglang import wrappers

    try:
        import deep_gemm
    except Exception as error:
        return [f"deep_gemm cannot be imported ({type(error).__name__}: {error})"]
    pairs = {name: name.replace("fp8_", "fp8_fp4_", 1) for name in probe.LOGITS}
    for name, wide in pairs.items():
        if not callable(vars(deep_gemm).get(name)):
            return [f"deep_gemm has no {name}"]
        if asked and not has_logits_dtype(vars(deep_gemm).get(wide)):
            return [f"deep_gemm.{wide} is missing or takes no logits_dtype"]
    if _ledger.patches:
        if all(patch.ours for patch in _ledger.patches):
            return []
        return ["deep_gemm was patched by somebody else since"]
    for (name, wide), ours in zip(
        pairs.items(), (wrappers.own_paged, wrappers.own_dense), strict=True
    ):
        wrapper = wrappers.logits(vars(deep_gemm)[name], vars(deep_gemm).get(wide), ours)
        _ledger.replace(deep_gemm, name, wrapper, f"deep_gemm.{name}")
    return []
