"""The state of the vLLM adapter, in addition to the state of every adapter."""

from __future__ import annotations

import sys
from typing import Any

from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.row_shard import Group
from dsv4_plugin.engines.vllm.slots import SlotStore

__all__ = ["VllmAdapter", "current"]


class VllmAdapter(adapter.Adapter):
    """``indexer`` is vLLM's indexer module, ``slots`` what the top-k writes for the attention.

    ``configs`` are the configurations under which layers were built. ``published``: the forward
    pass and the buffer in which the plugin wrote candidate blocks last. ``group``: the ranks among
    which the rows of a prefill are sharded, None where they are not.
    """

    def __init__(self, indexer: Any = None) -> None:
        version = getattr(sys.modules.get("vllm"), "__version__", "of unknown version")
        super().__init__(f"vLLM {version}")
        self.indexer = indexer
        self.slots = SlotStore()
        self.configs: list[Any] = []
        self.published: tuple[Any, int] | None = None
        self.group: Group | None = None

    @property
    def platform(self) -> Any:
        """The platform as the indexer sees it."""
        return getattr(self.indexer, "current_platform", None)


def current() -> VllmAdapter:
    """Return the adapter of this process if it is vLLM's, otherwise one that changes nothing."""
    found = adapter.current()
    return found if isinstance(found, VllmAdapter) else VllmAdapter()
