"""What the plugin does for a kind of call, and the rules that derive it from the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from dsv4_plugin import envs, log
from dsv4_plugin.envs import Settings
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.ops import dispatch as backends

__all__ = [
    "DTYPES", "INERT", "KS", "Decision", "PassedOver", "Selection", "backend_for_topk",
    "binding", "choose_selection", "explicit", "unfit_k", "unique", "unmet_topk",
]  # fmt: skip

KS = (512, 1024, 2048)  # the k of the engines' own kernels; the engine serves every other k
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PassedOver = dict[str, list[str]]  # dtype -> why it was passed over


@dataclass(frozen=True)
class Selection:
    """How the plugin selects: in ``dtype`` (``bf16``, ``fp16`` or ``fp32``) with ``backend``.

    ``logits`` is the writer of the logits: ``"plugin"`` (with ``backend``), or ``"engine"`` (its
    DeepGEMM). ``request_bf16``: DeepGEMM writes bfloat16 only on request. ``slots``: the
    top-k writes pool slots beside the indices, for the engine's attention. ``skip_fill``: the
    plugin omits the engine's fill with -1 where the top-k writes every row. ``followers``: later
    layers attend to the same indices. ``candidates``: the layer chooses or uses candidate blocks,
    and its logits are computed once it is known which. ``aside``: the engine whose own kernel gets
    the calls in which it is faster (:mod:`.aside`), ``""`` where the plugin serves every call.
    ``prefill_logits``: the writer of the logits of prefill, if it is not ``logits``.
    """

    dtype: str
    backend: str
    request_bf16: bool = False
    logits: str = "engine"
    slots: bool = False
    skip_fill: bool = False
    followers: bool = False
    candidates: bool = False
    aside: str = ""
    prefill_logits: str = ""

    @property
    def on(self) -> str:
        """Name the logits for people."""
        prefill = f" (prefill: the {self.prefill_logits}'s)" if self.prefill_logits else ""
        dtype = "float32" if self.dtype == "fp32" else self.dtype
        return f"the {self.logits}'s {dtype} logits{prefill}"


@dataclass(frozen=True)
class Decision:
    """What the plugin does at a call. A part that is ``None`` is the engine's.

    ``enabled`` False: every patched name calls the original. ``gather`` is a backend.
    """

    enabled: bool = False
    strict: bool = False
    selection: Selection | None = None
    gather: str | None = None


INERT = Decision()


def unique(reasons: Iterable[str]) -> list[str]:
    """Drop repeated reasons, keeping their order."""
    return list(dict.fromkeys(reasons))


def explicit() -> bool:
    """Whether a setting is explicit: the plugin meets it or raises. True if a setting is wrong."""
    try:
        now = envs.settings()
    except SettingError:
        return True
    asked = now.topk != "off" and (now.topk != "auto" or binding(now) is not None)
    return asked or now.shard_prefill


def binding(settings: Settings) -> str | None:
    """Return the setting that makes ``DSV4_TOPK=auto`` an error if the plugin cannot serve."""
    if settings.logits == "plugin":
        return "DSV4_LOGITS=plugin"
    if settings.strict:
        return "DSV4_STRICT=1: the top-k"
    if settings.backend in ("cuda", "torch"):  # the top-k has no Triton form
        return f"DSV4_BACKEND={settings.backend} for the top-k"
    return None


def unfit_k(k: object) -> list[str]:
    """Return why the engine serves a layer's k, if it does."""
    return [] if k in KS else [f"index_topk is {k}, not one of {', '.join(map(str, KS))}"]


def backend_for_topk(settings: Settings, on_gpu: bool) -> str:
    """Return the implementation that ``DSV4_BACKEND`` selects for the top-k inside an engine."""
    if settings.backend in ("cuda", "torch"):
        return settings.backend
    # auto never replaces the engine's CUDA kernel with torch ops.
    return "cuda" if on_gpu else "torch"


def unmet_topk(dtype: str, backend: str, device: torch.device, k: int) -> list[str]:
    """Return why ``backend`` cannot select ``k`` in ``dtype`` on ``device``."""
    call = backends.Call("topk", device, DTYPES[dtype], k)
    return [f"backend {backend}: {why}" for why in backends.unmet(call, backend)]


def choose_selection(
    settings: Settings,
    dtypes: Sequence[str],
    possible: Callable[[str], tuple[Selection | None, list[str]]],
    what: str,
) -> tuple[Selection | None, PassedOver]:
    """Decide from ``DSV4_TOPK``; ``dtypes`` are those of ``auto``, best first.

    ``possible(dtype)`` returns how the plugin can select in a dtype, or every reason why it cannot.
    ``what`` names the subject of the decision in the log.

    Raises:
        UnmetError: an explicit setting cannot be met (or, with ``DSV4_STRICT=1``,
            ``DSV4_LOGITS=plugin`` or an explicit ``DSV4_BACKEND``, the default); the message has
            every reason.
    """

    def attempt(dtype: str) -> tuple[Selection | None, list[str]]:
        chosen, reasons = possible(dtype)
        if log.tells_everything():
            said = f"{chosen.backend} on {chosen.on}" if chosen else f"no: {'; '.join(reasons)}"
            log.debug(f"{what}: DSV4_TOPK={settings.topk}, top-k in {dtype}: {said}")
        return chosen, reasons

    if settings.topk == "off":
        if settings.logits == "plugin":
            raise UnmetError(
                "DSV4_LOGITS=plugin", ["DSV4_TOPK=off leaves the logits to the engine"]
            )
        return None, {"top-k": ["DSV4_TOPK=off"]}
    if settings.topk != "auto":
        chosen, reasons = attempt(settings.topk)
        if chosen is None:
            logits = ", DSV4_LOGITS=plugin" if settings.logits == "plugin" else ""
            raise UnmetError(f"DSV4_TOPK={settings.topk}{logits}", reasons)
        return chosen, {}
    passed: PassedOver = {}
    for dtype in dtypes:
        chosen, reasons = attempt(dtype)
        if chosen is not None:
            return chosen, passed
        passed[dtype] = reasons
    setting = binding(settings)
    if setting is not None:
        raise UnmetError(setting, unique(r for reasons in passed.values() for r in reasons))
    return None, passed
