"""The side of an SGLang server that is measured (:mod:`.side`), a plugin of ``sglang.srt.plugins``.

It fills the weights with random values. SGLang's ``--load-format dummy`` takes ±1e-3 with scales of
1, and does not fill the table that assigns experts to tokens.

``E2E_FAULT`` can also be ``seam``: the plugin reads another name in SGLang's source. With
``deep_gemm`` DeepGEMM's function for the logits of prefill raises if it is asked for bfloat16.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from benchmarks.server.side import asked_fault, fill, folder, options, watch
from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["SEAM", "register"]

SEAM = "topk_transform_paged"
DEEP_GEMM = "fp8_fp4_mqa_logits"


def register() -> None:
    """Register import hooks; import neither SGLang nor torch."""
    if folder() is None:
        return
    fault = asked_fault("seam", "deep_gemm")
    if fault == "seam":
        _rename()
    elif fault == "deep_gemm":
        after_import("deep_gemm", _no_bf16)
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


def _rename() -> None:
    """Let the plugin read another name for :data:`SEAM`. It looks in the source, not in memory.

    SGLang's function stays as it is.
    """
    parse = source._parse

    def changed(path: Path, when: int) -> ast.Module:
        tree = parse(path, when)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.alias)) and node.name.startswith(SEAM):
                node.name = f"another_{node.name}"
        return tree

    source._parse = changed  # type: ignore[assignment]


def _no_bf16(deep_gemm: Any) -> None:
    original = getattr(deep_gemm, DEEP_GEMM)

    @functools.wraps(original)
    def logits(*args: Any, logits_dtype: Any = None, **kwargs: Any) -> Any:
        if str(logits_dtype) == "torch.bfloat16":
            raise RuntimeError("drill: deep_gemm")
        more = {} if logits_dtype is None else {"logits_dtype": logits_dtype}
        return original(*args, **more, **kwargs)

    setattr(deep_gemm, DEEP_GEMM, logits)
