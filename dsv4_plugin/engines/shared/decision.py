"""How a setting becomes a top-k: the same rules in every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from dsv4_plugin import backends, envs, log
from dsv4_plugin.engines.shared.plan import KS, Topk
from dsv4_plugin.envs import Settings
from dsv4_plugin.errors import SettingError, UnmetError

__all__ = [
    "DTYPES",
    "Passed",
    "choose_topk",
    "explicit",
    "topk_backend",
    "unfit_k",
    "unique",
    "unmet_topk",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Passed = dict[str, list[str]]  # dtype -> why it was passed over


def unique(reasons: Iterable[str]) -> list[str]:
    """Drop repeated reasons, keeping their order."""
    return list(dict.fromkeys(reasons))


def explicit() -> bool:
    """Whether the settings ask for something that has to be met or refused."""
    try:
        now = envs.settings()
    except SettingError:
        return True
    if now.topk == "off":
        return False
    return (
        now.strict or now.topk != "auto" or now.logits == "own" or now.backend in ("cuda", "torch")
    )


def unfit_k(k: object) -> list[str]:
    """Return why a layer's k stays with the engine, if it does."""
    return [] if k in KS else [f"index_topk is {k}, not one of {', '.join(map(str, KS))}"]


def topk_backend(settings: Settings, on_gpu: bool) -> str:
    """Return the implementation that ``DSV4_BACKEND`` means for the top-k inside an engine."""
    if settings.backend in ("cuda", "torch"):  # top-k has no Triton form
        return settings.backend
    # auto never puts torch ops in the place of the engine's CUDA kernel.
    return "cuda" if on_gpu else "torch"


def unmet_topk(dtype: str, backend: str, device: torch.device, k: int) -> list[str]:
    """Return why ``backend`` cannot select ``k`` in ``dtype`` on ``device``."""
    call = backends.Call("topk", device, DTYPES[dtype], k)
    return [f"backend {backend}: {why}" for why in backends.unmet(call, backend)]


def choose_topk(
    settings: Settings,
    candidates: Sequence[str],
    possible: Callable[[str], tuple[Topk | None, list[str]]],
    what: str,
) -> tuple[Topk | None, Passed]:
    """Decide from ``DSV4_TOPK``; ``candidates`` are the dtypes of ``auto``, best first.

    ``possible(dtype)`` returns how a dtype can be had, or every reason why it cannot. ``what`` the
    decision is about is for the log alone.

    Raises:
        UnmetError: an explicit setting cannot be met (or, with ``DSV4_STRICT=1``,
            ``DSV4_LOGITS=own`` or an explicit ``DSV4_BACKEND``, the default); the message has every
            reason.
    """

    def ask(dtype: str) -> tuple[Topk | None, list[str]]:
        chosen, reasons = possible(dtype)
        if log.tells_everything():
            said = f"{chosen.backend} on {chosen.on}" if chosen else f"no: {'; '.join(reasons)}"
            log.debug(f"{what}: DSV4_TOPK={settings.topk}, top-k in {dtype}: {said}")
        return chosen, reasons

    if settings.topk == "off":
        if settings.logits == "own":
            raise UnmetError("DSV4_LOGITS=own", ["DSV4_TOPK=off leaves the logits to the engine"])
        return None, {"top-k": ["DSV4_TOPK=off"]}
    if settings.topk != "auto":
        chosen, reasons = ask(settings.topk)
        if chosen is None:
            own = ", DSV4_LOGITS=own" if settings.logits == "own" else ""
            raise UnmetError(f"DSV4_TOPK={settings.topk}{own}", reasons)
        return chosen, {}
    passed: Passed = {}
    for dtype in candidates:
        chosen, reasons = ask(dtype)
        if chosen is not None:
            return chosen, passed
        passed[dtype] = reasons
    everything = unique(reason for reasons in passed.values() for reason in reasons)
    if settings.strict or settings.logits == "own" or settings.backend in ("cuda", "torch"):
        wish = f"DSV4_BACKEND={settings.backend} for the top-k"
        if settings.logits == "own":
            wish = "DSV4_LOGITS=own"
        elif settings.strict:
            wish = "DSV4_STRICT=1: the top-k"
        raise UnmetError(wish, everything)
    return None, passed
