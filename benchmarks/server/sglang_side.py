"""What is loaded into an SGLang server that is measured (:mod:`.side`): an ``sglang.srt.plugins``.

Random weights: SGLang's ``--load-format dummy`` takes ±1e-3 with scales of 1, and leaves the table
of which experts a token goes to as it is.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.server.side import FAULTS, fill, folder, options, watch
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["register"]


def register() -> None:
    """Leave notes with Python's import system; imports neither SGLang nor torch."""
    if folder() is None:
        return
    fault = os.environ.get("E2E_FAULT", "")
    if fault and fault not in FAULTS:
        raise ValueError(f"E2E_FAULT is {fault!r}; it can be {', '.join(map(repr, FAULTS))}")
    if options().get("weights"):
        after_import("sglang.srt.model_loader.loader", _weights)
    after_import("sglang.srt.model_executor.model_runner", lambda module: watch())


def _weights(loader: Any) -> None:
    """Put :func:`.side.fill` in the place of SGLang's random values."""

    def initialize_dummy_weights(model: Any, *args: Any, **kwargs: Any) -> None:
        config = getattr(model, "config", None)
        experts = getattr(config, "n_routed_experts", 1)
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.is_floating_point() or name.endswith("tid2eid"):
                fill(name, tensor.data, experts, seed)

    loader.initialize_dummy_weights = initialize_dummy_weights
