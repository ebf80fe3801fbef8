"""Which layers may be changed, and what the settings mean for them.

Called when vLLM builds an indexer layer: the only moment at which its configuration can be read,
and the one at which an explicit wish that cannot be met is an error a user sees.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4_plugin import backends, envs, facts, log
from dsv4_plugin.engines.shared import activation, decision, logits, plan, shadow
from dsv4_plugin.engines.shared.decision import unique
from dsv4_plugin.engines.shared.plan import Plan, Topk
from dsv4_plugin.engines.vllm import slots
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.state import state

__all__ = ["built", "forget"]

_V4 = re.compile(r"deepseek_?v4(?![0-9])")  # not V4.1, which is deepseek_v41


@dataclass(frozen=True)
class _Layer:
    """What was seen of a layer. ``unfit``: why upstream keeps it."""

    k: int
    device: torch.device
    is_v4: bool
    unfit: tuple[str, ...]
    no_gather: tuple[str, ...]


# vLLM may build a second model in a process (drafts; tests): a layer that is gone has no say.
_layers: weakref.WeakKeyDictionary[Any, _Layer] = weakref.WeakKeyDictionary()


def forget() -> None:
    """Forget the layers and the engine's configuration."""
    _layers.clear()
    envs.override(None)


def built(layer: Any) -> None:
    """Look at a layer that has just been built and decide what this process does from now on.

    Raises:
        SettingError: a setting has a value it cannot have.
        UnmetError: an explicit setting cannot be met (or, with ``DSV4_STRICT=1``, the default);
            the message has every reason.
    """
    config = _config()
    for wrong in envs.override(None if envs.killed() else _own(config)):
        log.once(logging.WARNING, f"{wrong}. The plugin is not switched on, so nothing follows")
    activation.configure_log()
    facts.process(state.host or "vLLM")
    if not envs.asked():
        log.debug(f"{_name(layer)}: the plugin is not switched on; vLLM's own code runs")
        plan.decide(plan.INERT)
        return
    settings = envs.settings()
    _layers[layer] = seen = _seen(layer, config)
    facts.device(seen.device)
    _tell(layer, seen)
    layers = list(_layers.values())
    # Until all is decided nothing is changed: an error leaves upstream behind.
    plan.decide(Plan(enabled=True, strict=settings.strict))
    topk, topk_why = _decide_topk(settings, layers)
    gather, gather_why = _decide_gather(settings, layers)
    beside = {} if topk is None else _beside(layer, layers, config)
    if topk is not None:
        slotted, unfilled = (not beside[name] for name in ("topk.slots", "topk.fill"))
        topk = replace(topk, slots=slotted, unfilled=unfilled)
    plan.decide(Plan(True, settings.strict, topk, gather))
    if topk is not None:
        shadow.prepare(layers[0].device, "decode", "prefill")
    _report(topk, topk_why, gather, gather_why, beside)


def _beside(layer: Any, layers: list[_Layer], config: Any) -> dict[str, str | None]:
    """Return why each of what goes with the decode top-k does not; prepare what does."""
    from dsv4_plugin.engines.vllm import install

    why = _unlike(layer, layers)
    if why:
        return dict.fromkeys(("topk.slots", "topk.fill"), why)
    no_slots, no_fill = install.reach_slots(), install.reach_fill(config)
    if not no_slots:
        buffer = layer.topk_indices_buffer
        slots.prepare(buffer, _decode_rows(config, buffer.shape[0]))
    return {"topk.slots": "; ".join(no_slots) or None, "topk.fill": "; ".join(no_fill) or None}


def _unlike(layer: Any, layers: list[_Layer]) -> str:
    """Return in what a layer, or one before it, is not as DeepSeek-V4's are."""
    if not all(seen.is_v4 for seen in layers):
        return "a layer is not DeepSeek-V4's"
    if getattr(layer, "use_pcp", False):
        return "prefill context parallelism"
    buffer = getattr(layer, "topk_indices_buffer", None)
    if not (
        isinstance(buffer, torch.Tensor)
        and buffer.dtype == torch.int32
        and buffer.dim() == 2
        and buffer.shape[1] == layer.topk_tokens
        and buffer.is_contiguous()
        and buffer.device.type != "meta"
    ):
        return "the index buffer has another form"
    return ""


def _decode_rows(config: Any, most: int) -> int:
    """Return how many rows the decode part of a batch can have, ``most`` if that is not known."""
    requests = getattr(getattr(config, "scheduler_config", None), "max_num_seqs", None)
    drafts = getattr(getattr(config, "speculative_config", None), "num_speculative_tokens", None)
    if not isinstance(requests, int):
        return most
    return min(most, requests * (1 + (drafts or 0)))


def _name(layer: Any) -> str:
    """Name a layer as its cache does, where it has a name."""
    return f"layer {getattr(getattr(layer, 'k_cache', None), 'prefix', '') or 'of no name'}"


def _tell(layer: Any, seen: _Layer) -> None:
    if log.tells_everything():
        kept = f"vLLM keeps it: {'; '.join(seen.unfit)}" if seen.unfit else "eligible"
        family = "DeepSeek-V4" if seen.is_v4 else "not DeepSeek-V4, so float32 scores"
        log.debug(f"{_name(layer)}: k {seen.k}, {seen.device}, {family}; {kept}")


def _config() -> Any:
    """Return the configuration of the engine that builds this layer."""
    try:
        from vllm.config import get_current_vllm_config

        return get_current_vllm_config()
    except Exception:  # none is set: a layer built by hand
        return None


def _own(config: Any) -> Mapping[str, Any] | None:
    additional = getattr(config, "additional_config", None)
    own = additional.get("dsv4") if isinstance(additional, Mapping) else None
    if isinstance(own, bool):  # YAML has `dsv4: off` so
        return {"plugin": own}
    if own is None or own == "" or isinstance(own, Mapping):
        return own or None
    raise SettingError(
        f"additional_config['dsv4'] is {own!r}; it must map names to values, as "
        "--additional-config.dsv4.topk bf16 does"
    )


def _platform() -> Any:
    """Return the platform as the indexer itself sees it."""
    from dsv4_plugin.engines.vllm import install

    return getattr(install.indexer(), "current_platform", None)


def _seen(layer: Any, config: Any) -> _Layer:
    platform = _platform()
    unfit: list[str] = []
    if platform is None or not platform.is_cuda():
        unfit.append(
            f"vLLM runs on {getattr(platform, 'device_type', 'an unknown platform')!r}; its "
            "indexer takes another way there"
        )
    k = getattr(layer, "topk_tokens", None)
    unfit += decision.unfit_k(k)
    chosen = getattr(layer, "topk_backend", "auto")
    if chosen != "auto":
        unfit.append(f"vLLM was told to use sparse_indexer_topk_backend={chosen!r}")
    no_gather: list[str] = []
    ranks = getattr(layer, "dcp_world_size", 1)
    if ranks != 1:
        no_gather.append(f"decode context parallelism over {ranks} ranks needs float32 logits")
    if getattr(layer, "candidate_blocks", None) is not None:
        no_gather.append("the layer masks its scores with candidate blocks (DeepSeek-V4.1)")
    if getattr(layer, "use_fp4_cache", False):
        no_gather.append("the indexer cache is MXFP4")
    buffer = getattr(layer, "topk_indices_buffer", None)
    if isinstance(buffer, torch.Tensor) and buffer.device.type != "meta":
        device = buffer.device
    else:
        device = torch.device(getattr(platform, "device_type", "") or "cpu")
    number = k if isinstance(k, int) else 0
    return _Layer(number, device, _is_v4(config), (*unfit, *no_gather), tuple(no_gather))


def _is_v4(config: Any) -> bool:
    model = getattr(config, "model_config", None)
    names: list[str] = []
    for attribute in ("hf_config", "hf_text_config"):
        hf = getattr(model, attribute, None)
        names.append(getattr(hf, "model_type", None) or "")
        names.extend(getattr(hf, "architectures", None) or ())
    return any(_V4.search(str(name).lower()) for name in names)


def _decide_topk(
    settings: envs.Settings, layers: list[_Layer]
) -> tuple[Topk | None, decision.Passed]:
    """Return the choice, and for each dtype that was passed over why."""
    dtypes = ("bf16", "fp32") if all(layer.is_v4 for layer in layers) else ("fp32",)
    return decision.choose_topk(
        settings,
        dtypes,
        lambda dtype: _possible(dtype, settings, layers),
        f"{len(layers)} layers so far" if len(layers) > 1 else "the first layer",
    )


def _possible(
    dtype: str, settings: envs.Settings, layers: list[_Layer]
) -> tuple[Topk | None, list[str]]:
    """Return how top-k in ``dtype`` can be done for every layer, or every reason why it cannot."""
    from dsv4_plugin.engines.vllm import install

    reasons = [reason for layer in layers for reason in layer.unfit]
    for name in ("guard", "topk.decode", "topk.prefill", "logits"):
        reasons += install.problems(name)
    on_gpu = any(layer.device.type == "cuda" for layer in layers)
    backend = decision.topk_backend(settings, on_gpu)
    for layer in layers:
        reasons += decision.unmet_topk(dtype, backend, layer.device, layer.k)
    ask = False

    def host() -> list[str]:
        nonlocal ask
        ask, why = _host_logits(dtype)
        return why

    def own() -> list[str]:
        return [why for layer in layers for why in logits.unmet(dtype, backend, layer.device)]

    who, why = logits.choose(settings, dtype, host, own)
    reasons = unique([*reasons, *why])
    return (None, reasons) if reasons else (Topk(dtype, backend, ask, who), [])


def _host_logits(dtype: str) -> tuple[bool, list[str]]:
    """Return whether DeepGEMM has to be asked for this dtype, and why it cannot be had from it."""
    from dsv4_plugin.engines.vllm import install

    if dtype == "fp32":
        return False, []
    if dtype == "fp16":
        return False, ["vLLM's DeepGEMM writes index logits in float32 or bfloat16 only"]
    platform = _platform()
    if platform is None or not platform.has_device_capability(90):
        return False, ["DeepGEMM's index logits need a GPU of compute capability 9.0 or later"]
    if install.takes_logits_dtype():
        return True, []
    # From 0.33 DeepGEMM writes bfloat16 on 10.x, unasked, and vLLM widens it afterwards.
    if hasattr(install.indexer(), "as_fp32_logits"):
        if platform.is_device_capability_family(100):
            return False, []
        return False, [
            f"{state.host}'s DeepGEMM takes no logits_dtype and writes float32 on this GPU"
        ]
    return False, [f"{state.host}'s DeepGEMM takes no logits_dtype"]


def _decide_gather(settings: envs.Settings, layers: list[_Layer]) -> tuple[str | None, list[str]]:
    from dsv4_plugin.engines.vllm import install

    mode = settings.indexer_read
    if mode == "off":
        return None, ["DSV4_INDEXER_READ=off"]
    wish = "DSV4_STRICT=1: the key gather" if settings.strict else None
    device = layers[0].device
    # auto never puts torch ops in the place of the engine's CUDA kernel.
    candidates = ["cuda", "triton"] if device.type == "cuda" else ["torch"]
    if mode != "auto":
        wish, candidates = f"DSV4_INDEXER_READ={mode}", [mode]
    elif settings.backend != "auto":
        wish, candidates = f"DSV4_BACKEND={settings.backend} for the key gather", [settings.backend]
    reasons = [why for layer in layers for why in layer.no_gather] + install.problems("gather")
    possible = not reasons
    call = backends.Call("gather", device, torch.uint8)
    for backend in candidates:
        unmet = backends.unmet(call, backend)
        if log.tells_everything():
            said = f"no: {'; '.join(unmet or reasons)}" if unmet or not possible else "yes"
            log.debug(f"DSV4_INDEXER_READ={mode}, key gather by {backend}: {said}")
        if possible and not unmet:
            return backend, []
        reasons += [f"backend {backend}: {why}" for why in unmet]
    if wish is not None:
        raise UnmetError(wish, unique(reasons))
    return None, unique(reasons)


def _report(
    topk: Topk | None,
    topk_why: dict[str, list[str]],
    gather: str | None,
    gather_why: list[str],
    beside: dict[str, str | None],
) -> None:
    """Say in one line what engaged, where, and why not; again only when it changes."""
    if topk is None:  # what keeps float32 away keeps everything away
        not_topk = "; ".join(list(topk_why.values())[-1])
    else:
        not_topk = "; ".join(f"not {name}: {'; '.join(why)}" for name, why in topk_why.items())
    theirs = topk is None or (topk.dtype == "fp32" and topk.logits == "host")
    not_bf16 = "logits stay as vLLM has them" if theirs else None
    wide = topk is None or topk.dtype == "fp32"
    whys = {
        "guard": None,
        "topk.decode": None if topk else not_topk,
        "topk.prefill": None if topk else not_topk,
        "topk.slots": not_topk,
        "topk.fill": not_topk,
        "logits": not_topk or not_bf16 if not_bf16 else None,
        "gather": None if gather else "; ".join(gather_why),
        "budget": not_topk or "logits are float32" if wide else None,
        **beside,
    }
    for name, why in whys.items():
        seam = state.seams.get(name)
        if seam is not None and seam.where is not None:
            seam.why = why
    parts = []
    if topk is None:
        parts.append(f"top-k: upstream's ({not_topk})")
    else:
        where = ", ".join(
            state.seams[name].where or "?" for name in ("topk.decode", "topk.prefill")
        )
        passed = f" ({not_topk})" if not_topk else ""
        on = topk.on
        if topk.dtype != "fp32" and state.seams["budget"].where is not None:
            on += " (half the bytes, so twice the rows in a prefill chunk's budget)"
        parts.append(f"top-k: {topk.dtype} by {topk.backend} on {on} at {where}{passed}")
    if gather is None:
        parts.append(f"key gather: upstream's ({'; '.join(gather_why)})")
    else:
        parts.append(f"key gather: {gather} at {state.seams['gather'].where}")
    log.once(logging.INFO, f"dsv4 in {state.host}: {'. '.join(parts)}.")
