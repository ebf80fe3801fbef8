"""Decides what the plugin does, from the layers, the settings and the engine's configuration.

vLLM's configuration can be read only while vLLM builds a layer. An explicit setting that cannot be
met is an error there, where a user sees it. Each kind of layer (:mod:`.layers`) has a decision.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv4_plugin import envs, facts, log
from dsv4_plugin.engines.shared import activation, aside, decision, logits, shadow
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection, unique
from dsv4_plugin.engines.shared.row_shard import SETTING, say
from dsv4_plugin.engines.vllm import late_patches, row_shard
from dsv4_plugin.engines.vllm.adapter import VllmAdapter, current
from dsv4_plugin.engines.vllm.layers import KINDS, Layer, LayerKind, kind_of, see
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.ops import dispatch as backends
from dsv4_plugin.state import state

__all__ = ["built"]


def built(layer: Any) -> None:
    """Look at a new layer, and decide what this process does from now on.

    Raises:
        SettingError: a setting has a value it cannot have.
        UnmetError: an explicit setting cannot be met (or, with ``DSV4_STRICT=1``, the default);
            the message has every reason.
    """
    now, config = current(), _config()
    for wrong in envs.override(None if envs.killed() else _given_settings(config)):
        log.once(logging.WARNING, f"{wrong}. The plugin is not switched on, so nothing follows")
    activation.configure_log()
    facts.process(now.engine)
    seen = see(layer, config, now.platform)
    if not any(config is known for known in now.configs):
        now.configs.append(config)
    if not envs.asked():
        log.debug(f"{seen.name}: the plugin is not switched on; vLLM's own code runs")
        now.decide(INERT)
        now.group = None
        return
    settings = envs.settings()
    now.layers[layer] = seen
    facts.device(seen.device)
    _say(seen)
    # Until all is decided nothing is changed: after an error the engine's own code runs.
    now.decide(Decision(True, settings.strict))
    _decide(now, settings, config)


@dataclass
class _Group:
    """Layers that share one decision, and the decision.

    ``alike``: why the plugin cannot tell calls of these kinds apart.
    """

    kinds: tuple[LayerKind, ...]
    layers: list[tuple[Any, Layer]]
    alike: str = ""
    selection: Selection | None = None
    passed: decision.PassedOver | None = None
    gather: str | None = None
    gather_why: list[str] | None = None
    also: dict[str, str | None] | None = None

    def __str__(self) -> str:
        """Name the kinds for the log."""
        return f"{' and '.join(map(str, self.kinds))} layers"

    @property
    def seen(self) -> list[Layer]:
        """The facts about the layers."""
        return [seen for _, seen in self.layers]

    @property
    def candidates(self) -> bool:
        """Whether some of the layers choose or use candidate blocks."""
        return any(kind.candidates for kind in self.kinds)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that every kind has as a default, best first."""
        first, *rest = (kind.dtypes for kind in self.kinds)
        return tuple(dtype for dtype in first if all(dtype in other for other in rest))


def _groups(now: VllmAdapter, config: Any) -> list[_Group]:
    """Group the layers by kind, or into one group if calls of several kinds look the same.

    The order is that of :data:`.layers.KINDS`: a consumer's decision depends on the source's.
    """
    of: dict[LayerKind, list[tuple[Any, Layer]]] = {}
    for layer, seen in now.layers.items():
        of.setdefault(kind_of(seen), []).append((layer, seen))
    alike = late_patches.unmet_op(now, config) if len(of) > 1 else []
    if alike:
        together = [pair for pairs in of.values() for pair in pairs]
        return [_Group(tuple(of), together, "; ".join(alike))]
    return [_Group((kind,), of[kind]) for kind in KINDS if kind in of]


def _decide(now: VllmAdapter, settings: envs.Settings, config: Any) -> None:
    groups = _groups(now, config)
    for group in groups:
        so_far = len(group.layers)
        group.selection, group.passed = decision.choose_selection(
            settings,
            group.dtypes,
            functools.partial(_possible, now, settings, config, group, _no_blocks(groups, group)),
            f"{so_far} {group} so far" if so_far > 1 else f"the first of the {group}",
        )
        group.gather, group.gather_why = _choose_gather(settings, group, now)
        group.also = {"guard": None, **_beside_topk(group, now, config)}
        group.selection = aside.engage(group.selection, settings, now.engine, group.seen[0].device)
    _shard(now, settings, config)
    _act(now, groups, config)
    decisions: dict[Hashable, Decision] = {
        kind.name: Decision(True, settings.strict, group.selection, group.gather)
        for group in groups
        for kind in group.kinds
    }
    common, *others = decisions.values()
    if any(other != common for other in others):
        alike = all(other.gather == common.gather for other in others)
        common = Decision(True, settings.strict, None, common.gather if alike else None)
        now.kinds = _kinds(list(now.layers.values()))
    now.decisions, now.decision = decisions, common
    for group in groups:
        _report(now, group)


def _shard(now: VllmAdapter, settings: envs.Settings, config: Any) -> None:
    """Shard the rows of prefills among the tensor-parallel ranks, if that is asked for."""
    before, now.group = now.group, None
    if not settings.shard_prefill:
        _note_shard("DSV4_SHARD_PREFILL=0")
        return
    if late_patches.shards_itself():
        _note_shard("vLLM does it itself")
        log.once(
            logging.INFO,
            f"{now.engine} shards the rows of prefills itself, under conditions of its own; "
            f"{SETTING} changes nothing",
        )
        return
    why = [
        *late_patches.unmet_shard(now),
        *row_shard.unmet(config, now.platform, now.layers.values()),
    ]
    if why:
        raise UnmetError(SETTING, why)
    now.group = before or row_shard.group()
    late_patches.patch_shard(now)
    _note_shard(None)
    say(now.engine, now.group)


def _note_shard(why: str | None) -> None:
    seam = state.seams.get("shard")
    if seam is not None and seam.where is not None:
        seam.why = why


def _no_blocks(groups: list[_Group], group: _Group) -> list[str]:
    """Return why the plugin does not select the candidates of a group, if it does not."""
    uses = {layer.candidates for layer in group.seen}
    if "consumer" not in uses or "source" in uses:
        return []
    for other in groups:
        if other.selection is not None and any(x.candidates == "source" for x in other.seen):
            return []
    return ["the plugin selects no candidate blocks here, and vLLM's are in no order"]


def _kinds(layers: list[Layer]) -> dict[Hashable, Hashable]:
    """Map the key in a call to the kind of layer; omit keys that two kinds share."""
    kinds: dict[Hashable, set[str]] = {}
    for seen in layers:
        kinds.setdefault(seen.key, set()).add(kind_of(seen).name)
    return {key: found.pop() for key, found in kinds.items() if len(found) == 1}


def _act(now: VllmAdapter, groups: list[_Group], config: Any) -> None:
    """Make the patches that the decisions need."""
    chosen = [group.selection for group in groups if group.selection is not None]
    if any(selection.request_bf16 for selection in chosen):
        late_patches.patch_logits_dtype(now.ledger)
    if any(selection.slots for selection in chosen):
        late_patches.patch_slots(now)
    stands_in = any(selection.skip_fill or selection.candidates for selection in chosen)
    if stands_in or len(groups) > 1:
        late_patches.patch_op(now)
    for group in groups:
        if group.selection is not None:
            blocks = ("blocks",) if group.candidates else ()
            shadow.prepare(group.seen[0].device, "decode", "prefill", *blocks)
            if group.selection.slots:
                for layer, _ in group.layers:
                    buffer = layer.topk_indices_buffer
                    now.slots.prepare(buffer, _decode_rows(config, buffer.shape[0]))


def _possible(
    now: VllmAdapter,
    settings: envs.Settings,
    config: Any,
    group: _Group,
    reasons: list[str],
    dtype: str,
) -> tuple[Selection | None, list[str]]:
    """Return how every layer can select in ``dtype``, or every reason why it cannot."""
    reasons = [reason for layer in group.seen for reason in layer.unfit] + reasons
    if reasons and group.alike:
        reasons.append(f"calls of these kinds look the same: {group.alike}")
    for name in ("guard", "topk.decode", "topk.prefill", "logits"):
        reasons += now.problems(name)
    if group.candidates:
        reasons += now.problems("candidates") + late_patches.unmet_op(now, config)

    def plugin(backend: str) -> list[str]:
        return [
            why
            for kind in group.kinds
            for layer in group.seen
            for why in logits.unmet(dtype, backend, layer.device, kind.logits_ops)
        ]

    def engine() -> list[str]:
        if group.candidates:
            return ["candidates are selected from the plugin's own logits"]
        return _engine_logits(now, dtype)

    calls = [(layer.device, layer.k) for layer in group.seen]
    asks = late_patches.takes_logits_dtype
    chosen, why = logits.select(settings, dtype, reasons, calls, engine, plugin, asks)
    if chosen is not None:
        chosen = replace(chosen, candidates=group.candidates)
    return chosen, why


def _engine_logits(now: VllmAdapter, dtype: str) -> list[str]:
    """Return why DeepGEMM cannot write this dtype."""
    if dtype == "fp32":
        return []
    if dtype == "fp16":
        return ["vLLM's DeepGEMM writes index logits in float32 or bfloat16 only"]
    platform = now.platform
    if platform is None or not platform.has_device_capability(90):
        return ["DeepGEMM's index logits need a GPU of compute capability 9.0 or later"]
    if late_patches.takes_logits_dtype():
        return []
    if not hasattr(now.indexer, "as_fp32_logits"):
        return [f"{now.engine}'s DeepGEMM takes no logits_dtype"]
    # From 0.33 DeepGEMM writes bfloat16 on 10.x, unasked, and vLLM widens it afterwards.
    if platform.is_device_capability_family(100):
        return []
    return [f"{now.engine}'s DeepGEMM takes no logits_dtype and writes float32 on this GPU"]


def _choose_gather(
    settings: envs.Settings, group: _Group, now: VllmAdapter
) -> tuple[str | None, list[str]]:
    mode = settings.indexer_read
    if mode == "off":
        return None, ["DSV4_INDEXER_READ=off"]
    binding = "DSV4_STRICT=1: the key gather" if settings.strict else None
    device = group.seen[0].device
    # auto never replaces the engine's CUDA kernel with torch ops.
    candidates = ["cuda", "triton"] if device.type == "cuda" else ["torch"]
    if mode != "auto":
        binding, candidates = f"DSV4_INDEXER_READ={mode}", [mode]
    elif settings.backend != "auto":
        binding = f"DSV4_BACKEND={settings.backend} for the key gather"
        candidates = [settings.backend]
    reasons = [why for layer in group.seen for why in layer.no_gather]
    reasons += now.problems("gather")
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
    if binding is not None:
        raise UnmetError(binding, unique(reasons))
    return None, unique(reasons)


def _beside_topk(group: _Group, now: VllmAdapter, config: Any) -> dict[str, str | None]:
    """Decide which parts go with the decode top-k; return the reasons for each that does not."""
    if group.selection is None:
        return {}
    why = "; ".join(unique(filter(None, (_without_slots(*pair) for pair in group.layers))))
    if why:
        return {"topk.slots": why, "topk.fill": why}
    no_slots, no_fill = late_patches.unmet_slots(now), late_patches.unmet_op(now, config)
    followers = all(kind.followers for kind in group.kinds)
    group.selection = replace(
        group.selection, slots=not no_slots, skip_fill=not no_fill, followers=followers
    )
    return {"topk.slots": "; ".join(no_slots) or None, "topk.fill": "; ".join(no_fill) or None}


def _without_slots(layer: Any, seen: Layer) -> str:
    """Return why the top-k of a layer neither writes slots nor skips the fill; empty if it may."""
    if not kind_of(seen).with_slots:
        return "a layer is neither DeepSeek-V4's nor V4.1's"
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
    """Return how many rows the decode part of a batch can have, ``most`` if unknown."""
    requests = getattr(getattr(config, "scheduler_config", None), "max_num_seqs", None)
    drafts = getattr(getattr(config, "speculative_config", None), "num_speculative_tokens", None)
    if not isinstance(requests, int):
        return most
    return min(most, requests * (1 + (drafts or 0)))


def _config() -> Any:
    """Return the configuration of the engine that builds this layer."""
    try:
        from vllm.config import get_current_vllm_config

        return get_current_vllm_config()
    except Exception:  # none is set: a layer built by hand
        return None


def _given_settings(config: Any) -> Mapping[str, Any] | None:
    """Return the plugin's settings in vLLM's configuration."""
    additional = getattr(config, "additional_config", None)
    given = additional.get("dsv4") if isinstance(additional, Mapping) else None
    if isinstance(given, bool):  # YAML has `dsv4: off` so
        return {"plugin": given}
    if given is None or given == "" or isinstance(given, Mapping):
        return given or None
    raise SettingError(
        f"additional_config['dsv4'] is {given!r}; it must map names to values, as "
        "--additional-config.dsv4.topk bf16 does"
    )


def _say(seen: Layer) -> None:
    if log.tells_everything():
        kind = kind_of(seen)
        said = f"vLLM keeps it: {'; '.join(seen.unfit)}" if seen.unfit else "eligible"
        log.debug(f"{seen.name}: k {seen.k}, {seen.device}, {kind}; {said}")


def _report(now: VllmAdapter, group: _Group) -> None:
    """Log in one line what engaged for these layers."""
    selection, also = group.selection, dict(group.also or {})
    also["budget"] = None if now.narrow_selections() else "logits are float32"
    topks = ("topk.decode", "topk.prefill")
    names = (*topks, "logits") if selection else (*topks, "topk.slots", "topk.fill", "logits")
    if group.candidates:
        names = (*names, "candidates")
    now.report(
        str(group), names, selection, group.passed or {}, also,
        (group.gather, group.gather_why or []),
        aside.said(selection, (layer.k for layer in group.seen)),
    )  # fmt: skip
