"""The settings of a run of an engine's code: without the plugin, and in five ways with it."""

from __future__ import annotations

__all__ = ["OFF", "VARIANTS"]

OFF = "off"

# With the plugin: the dtype of the selection, and the source of the scores.
VARIANTS: dict[str, dict[str, str]] = {
    "auto": {"DSV4_TOPK": "auto", "DSV4_LOGITS": "auto"},
    "fp32": {"DSV4_TOPK": "fp32", "DSV4_LOGITS": "engine"},
    "bf16": {"DSV4_TOPK": "bf16", "DSV4_LOGITS": "engine"},
    "fp32 plugin": {"DSV4_TOPK": "fp32", "DSV4_LOGITS": "plugin"},
    "bf16 plugin": {"DSV4_TOPK": "bf16", "DSV4_LOGITS": "plugin"},
}
