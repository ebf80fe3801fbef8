"""dsv4_plugin: exact, deterministic, fast indexer ops of DeepSeek-V4 for vLLM, SGLang, TokenSpeed.

Importing this package imports neither torch nor an engine. Each public name is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_plugin.envs import settings
    from dsv4_plugin.ops.cache import (
        gather_indexer_cache,
        read_indexer_cache,
        read_indexer_cache_mxfp4,
    )
    from dsv4_plugin.ops.candidates import (
        block_maxima,
        candidate_logits,
        candidate_logits_ragged,
        candidate_select,
        select_blocks,
        select_candidates,
    )
    from dsv4_plugin.ops.logits import paged_logits, ragged_logits, select
    from dsv4_plugin.ops.topk import topk
    from dsv4_plugin.state import status
    from dsv4_plugin.version import __version__

__all__ = [
    "__version__",
    "block_maxima",
    "candidate_logits",
    "candidate_logits_ragged",
    "candidate_select",
    "gather_indexer_cache",
    "paged_logits",
    "ragged_logits",
    "read_indexer_cache",
    "read_indexer_cache_mxfp4",
    "select",
    "select_blocks",
    "select_candidates",
    "settings",
    "status",
    "topk",
]

_WHERE = {
    "__version__": "dsv4_plugin.version",
    "block_maxima": "dsv4_plugin.ops.candidates",
    "candidate_logits": "dsv4_plugin.ops.candidates",
    "candidate_logits_ragged": "dsv4_plugin.ops.candidates",
    "candidate_select": "dsv4_plugin.ops.candidates",
    "gather_indexer_cache": "dsv4_plugin.ops.cache",
    "paged_logits": "dsv4_plugin.ops.logits",
    "ragged_logits": "dsv4_plugin.ops.logits",
    "read_indexer_cache": "dsv4_plugin.ops.cache",
    "read_indexer_cache_mxfp4": "dsv4_plugin.ops.cache",
    "select": "dsv4_plugin.ops.logits",
    "select_blocks": "dsv4_plugin.ops.candidates",
    "select_candidates": "dsv4_plugin.ops.candidates",
    "settings": "dsv4_plugin.envs",
    "status": "dsv4_plugin.state",
    "topk": "dsv4_plugin.ops.topk",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dsv4_plugin' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
