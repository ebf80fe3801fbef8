"""Where an engine's own top-k is faster than the plugin's; do not edit."""

SINCE: dict[str, tuple[int, ...]] = {"vllm": (0, 33), "sglang": (0, 5, 23)}

LONGEST: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {}
