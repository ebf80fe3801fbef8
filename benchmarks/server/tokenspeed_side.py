"""The side of a TokenSpeed engine that is measured (:mod:`.side`), a ``tokenspeed.plugins`` plugin.

It fills the weights with random values before TokenSpeed prepares them for its kernels.
TokenSpeed's ``--load-format dummy`` fills them afterwards, and leaves packed FP4 as it was.
"""

from __future__ import annotations

import functools
from typing import Any

from benchmarks.server.side import asked_fault, fill, folder, options, watch
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["register"]


def register() -> None:
    """Register import hooks; import neither TokenSpeed nor torch."""
    if folder() is None:
        return
    asked_fault()
    weights = bool(options().get("weights"))
    after_import("tokenspeed.runtime.model_loader.loader", functools.partial(_loading, weights))


def _loading(weights: bool, loader: Any) -> None:
    """Watch the process that makes a model; fill the model if its weights are random."""
    original = loader._initialize_model

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        watch()
        model = original(*args, **kwargs)
        if weights:
            experts = getattr(model.config, "n_routed_experts", 1)
            for seed, (name, tensor) in enumerate(model.state_dict().items()):
                fill(name, tensor.data, experts, seed)
        return model

    loader._initialize_model = initialize
    if weights:
        loader.initialize_dummy_weights = lambda model: None
