"""The settings an engine's code is run under: without the plugin, and in four ways with it."""

from __future__ import annotations

__all__ = ["OFF", "VARIANTS"]

OFF = "off"

# With the plugin: what selects, and who writes the scores.
VARIANTS: dict[str, dict[str, str]] = {
    "fp32": {"DSV4_TOPK": "fp32", "DSV4_LOGITS": "host"},
    "bf16": {"DSV4_TOPK": "bf16", "DSV4_LOGITS": "host"},
    "fp32 own": {"DSV4_TOPK": "fp32", "DSV4_LOGITS": "own"},
    "bf16 own": {"DSV4_TOPK": "bf16", "DSV4_LOGITS": "own"},
}
