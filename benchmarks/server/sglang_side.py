"""The side of an SGLang server that is measured (:mod:`.side`), a plugin of ``sglang.srt.plugins``.

It fills the weights with random values. SGLang's ``--load-format dummy`` takes ±1e-3 with scales of
1, and does not fill the table that assigns experts to tokens.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.server.side import FAULTS, fill, folder, options, watch
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["register"]


def register() -> None:
    """Register import hooks; import neither SGLang nor torch."""
    if folder() is None:
        return
    fault = os.environ.get("E2E_FAULT", "")
    if fault and fault not in FAULTS:
        raise ValueError(f"E2E_FAULT is {fault!r}; it can be {', '.join(map(repr, FAULTS))}")
    if options().get("weights"):
        after_import("sglang.srt.model_loader.loader", _weights)
    after_import("sglang.srt.model_executor.model_runner", lambda module: watch())


def _weights(loader: Any) -> None:
    """Replace SGLang's random values with those of :func:`.side.fill`."""

    def initialize_dummy_weights(model: Any, *args: Any, **kwargs: Any) -> None:
        config = getattr(model, "config", None)
        experts = getattr(config, "n_routed_experts", 1)
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.is_floating_point() or name.endswith("tid2eid"):
                fill(name, tensor.data, experts, seed)

    loader.initialize_dummy_weights = initialize_dummy_weights
