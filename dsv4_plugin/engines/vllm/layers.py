"""The kinds of indexer layers, one record each, and the facts about a layer.

A model may have layers of several kinds, and each kind has its own decision. A new kind is a new
record in :data:`KINDS`: how the plugin recognises a layer of that kind, which ops it needs, and
which dtype is its default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_plugin.engines.shared import decision
from dsv4_plugin.engines.shared.candidates import PIECE
from dsv4_plugin.kernels.arguments import MAX_K

__all__ = [
    "KINDS", "Layer", "LayerKind", "key", "key_of_call", "kind_of", "plain_name",
    "see",
]  # fmt: skip

# The version in a model's type or architecture. V4.1 is deepseek_v41, deepseek_v4_1 and the like.
_VERSION = re.compile(r"deepseek[_-]?v([0-9]+(?:[._p-]?[0-9]+)*)")


@dataclass(frozen=True)
class Layer:
    """The policy's facts about a layer.

    ``key`` names it as a call of the indexer's op does. ``family`` is the family of its model,
    ``""`` for models other than DeepSeek-V4 and V4.1. ``candidates``: ``""``, ``"source"`` (it
    selects the candidate blocks) or ``"consumer"`` (it masks its scores with them). ``unfit``: why
    the engine keeps its top-k. ``no_gather``: why the engine keeps its key gather.
    """

    key: Hashable
    name: str
    k: int
    device: torch.device
    family: str
    candidates: str
    unfit: tuple[str, ...]
    no_gather: tuple[str, ...]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layers: ``matches`` recognises a layer; the first record that matches counts.

    ``dtypes`` are those that ``DSV4_TOPK=auto`` tries, best first. ``logits_ops`` are the ops that
    must be able to write a dtype before the plugin's logits serve this kind. ``with_slots``: the
    decode top-k writes slots and skips the fill where it can. ``followers``: later layers also
    attend to the indices of a layer of this kind. ``candidates``: the layer chooses or uses
    candidate blocks, so the plugin computes its logits, and only those that are needed.
    """

    name: str
    matches: Callable[[Layer], bool]
    dtypes: tuple[str, ...]
    logits_ops: tuple[str, ...] = ("paged_logits", "ragged_logits")
    with_slots: bool = False
    followers: bool = False
    candidates: bool = False

    def __str__(self) -> str:
        """Return the name, for the log."""
        return self.name


KINDS = (
    # V4.1's kernels for compute capability 10.0 write bfloat16 logits, in vLLM itself.
    LayerKind(
        "DeepSeek-V4.1 source",
        lambda layer: layer.candidates == "source",
        ("bf16", "fp32"),
        ("block_maxima", "select_blocks", "candidate_select", "ragged_logits"),
        with_slots=True,
        followers=True,
        candidates=True,
    ),
    LayerKind(
        "DeepSeek-V4.1 consumer",
        lambda layer: layer.candidates == "consumer",
        ("bf16", "fp32"),
        ("candidate_select", "ragged_logits"),
        with_slots=True,
        followers=True,
        candidates=True,
    ),
    LayerKind(
        "DeepSeek-V4.1 plain",
        lambda layer: layer.family == "DeepSeek-V4.1",
        ("bf16", "fp32"),
        with_slots=True,
        followers=True,
    ),
    # Trained with bfloat16 scores.
    LayerKind(
        "DeepSeek-V4",
        lambda layer: layer.family == "DeepSeek-V4",
        ("bf16", "fp32"),
        with_slots=True,
    ),
    # DeepSeek-V3.2 and GLM, trained with float32 scores, and models that the plugin does not know.
    LayerKind("DeepSeek-V3.2-like", lambda layer: True, ("fp32",)),
)


def kind_of(layer: Layer) -> LayerKind:
    """Return the kind of a layer."""
    return next(kind for kind in KINDS if kind.matches(layer))


def plain_name(name: Any) -> Any:
    """Return a layer's name as the metadata has it; vLLM may wrap it for the compiler."""
    return getattr(name, "value", name)


def key(prefix: Any, candidates: Any, writes: Any) -> Hashable:
    """Return the key of a layer's kind, the same at a call and when the layer is built.

    V4.1's source and consumers share one cache and therefore one ``prefix``.
    """
    return plain_name(prefix), candidates is not None, bool(writes)


def key_of_call(given: Callable[[str], Any]) -> Hashable:
    """Return the key of the layer that calls the indexer's op; ``given`` has its arguments."""
    return key(given("k_cache_prefix"), given("candidate_blocks"), given("candidate_write"))


def see(layer: Any, config: Any, platform: Any) -> Layer:
    """Look at a layer that has just been built."""
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
        unfit.append(f"vLLM's setting sparse_indexer_topk_backend is {chosen!r}")
    no_gather: list[str] = []
    ranks = getattr(layer, "dcp_world_size", 1)
    if ranks != 1:
        no_gather.append(f"decode context parallelism over {ranks} ranks needs float32 logits")
    if getattr(layer, "use_fp4_cache", False):
        no_gather.append("the indexer cache is MXFP4")
    buffer = getattr(layer, "topk_indices_buffer", None)
    if isinstance(buffer, torch.Tensor) and buffer.device.type != "meta":
        device = buffer.device
    else:
        device = torch.device(getattr(platform, "device_type", "") or "cpu")
    blocks = getattr(layer, "candidate_blocks", None)
    writes = bool(getattr(layer, "candidate_write", False))
    if blocks is not None:
        unfit += _unfit_candidates(layer, blocks, k)
    prefix = getattr(getattr(layer, "k_cache", None), "prefix", "") or "of no name"
    return Layer(
        key(prefix, blocks, writes),
        f"layer {prefix}",
        k if isinstance(k, int) else 0,
        device,
        _family(config),
        "" if blocks is None else "source" if writes else "consumer",
        (*unfit, *no_gather),
        tuple(no_gather),
    )


def _unfit_candidates(layer: Any, blocks: Any, k: Any) -> list[str]:
    """Return why the plugin does not serve a layer with these candidate blocks."""
    why = []
    size = getattr(layer, "candidate_block_size", 0)
    if size != PIECE:
        why.append(f"candidate blocks have {size} keys, not {PIECE}")
    held = blocks.shape[-1] if isinstance(blocks, torch.Tensor) and blocks.dim() == 2 else 0
    if not 1 <= held <= MAX_K or (isinstance(k, int) and held * PIECE < k):
        why.append(f"{held} candidate blocks a row, not {k} keys' worth and at most {MAX_K}")
    if getattr(layer, "use_pcp", False):
        why.append("prefill context parallelism")
    return why


def _family(config: Any) -> str:
    model = getattr(config, "model_config", None)
    names: list[str] = []
    for attribute in ("hf_config", "hf_text_config"):
        hf = getattr(model, attribute, None)
        names.append(getattr(hf, "model_type", None) or "")
        names.extend(getattr(hf, "architectures", None) or ())
    found = {v for name in names for v in _VERSION.findall(str(name).lower())}
    versions = {re.sub(r"[^0-9]", "", version) for version in found}
    if "41" in versions:
        return "DeepSeek-V4.1"
    return "DeepSeek-V4" if versions == {"4"} else ""
