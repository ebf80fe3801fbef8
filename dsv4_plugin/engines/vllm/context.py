"""The wrappers' facts about a call: its arguments, the forward pass, and the tag of its logits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dsv4_plugin.engines.vllm.deferred import Deferred

__all__ = ["LogitsTag", "Requests", "by_name", "forward_pass", "tag_logits", "tag_of"]

_ATTRIBUTE = "_dsv4_logits"


class Requests(NamedTuple):
    """Decode requests of ``rows`` rows each, which vLLM has split into requests of one row.

    ``table``: the pages of the requests, as the attention has them; None if vLLM keeps none.
    """

    rows: int
    table: torch.Tensor | None


@dataclass(slots=True)
class LogitsTag:
    """Marks the tensor that the indexer's logits function returned, and describes its content.

    Other callers of the same top-k (GLM's pooled indexer, V4.1's specialised decode) pass logits
    without a tag. ``shifted``: every row begins at column zero, although the caller passes its
    begin among all keys (the plugin's prefill logits in releases up to 0.32). ``next_n``: the
    rows of a request at decode. ``table`` and ``page_size``: the pages on which the logits were
    computed, if the top-k needs them. ``deferred``: the call whose logits are not computed yet; the
    tensor holds none.
    """

    shifted: bool = False
    next_n: int = 1
    table: torch.Tensor | None = None
    page_size: int = 0
    deferred: Deferred | None = None


def tag_logits(logits: torch.Tensor, tag: LogitsTag) -> torch.Tensor:
    """Set the tag of ``logits``, and return them."""
    setattr(logits, _ATTRIBUTE, tag)
    return logits


def tag_of(logits: Any) -> LogitsTag | None:
    """Return the tag of index logits; None for any other value."""
    return getattr(logits, _ATTRIBUTE, None)


def by_name(names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name; none if there are more positional ones than names."""
    if len(args) > len(names):
        return {}
    return {**dict(zip(names, args, strict=False)), **kwargs}


def forward_pass() -> Any:
    """Return vLLM's object of this forward pass, new for each pass; None outside of a pass."""
    module: Any = sys.modules.get("vllm.forward_context")
    if module is None or not module.is_forward_context_available():
        return None
    return module.get_forward_context()
