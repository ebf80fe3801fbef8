"""What is loaded into the vLLM server that is measured: a ``vllm.general_plugins`` entry point.

:mod:`.server` puts it on the path of the servers it starts and nowhere else. The folder named by
``E2E_DIR`` is how the two talk:

``options.json``
    ``weights``: fill the weights with random values of a useful size. vLLM's ``--load-format
    dummy`` takes ±1e-3, which FP8 rounds to zero; and 0.26 derives one tensor of DeepSeek-V4 only
    when it loads a checkpoint, so that its first layer fails. ``fast_start``: leave out a warm-up
    of router shapes that this model does not have.
``copy``
    While this file is there, contexts are made by copying: of a long prompt the first chunk is
    computed, and each further whole chunk gets the cache pages of the one before instead of a
    forward pass. What decodes afterwards reads real keys, one chunk's of them again and again; a
    million tokens take seconds instead of minutes.
``status-<pid>.json``
    ``dsv4_plugin.status()`` of the process with the model, whenever it changes.
``memory-<pid>.json``
    What torch has of the GPU's memory in that process, likewise.

``E2E_FAULT`` breaks something of the plugin's, for drills (:mod:`.drills`): the name of an op
(``topk``, ``logits``, ``gather``, ``block_maxima``, ``select_blocks``, ``candidate_logits``,
``select_candidates``) makes that op raise at every call, ``capability`` makes the plugin see a GPU
of compute capability 7.5, ``seam`` and ``candidate_seam`` give one function that it patches other
parameters.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_plugin import log, status
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["COPY", "OPTIONS", "register"]

OPTIONS = "options.json"
COPY = "copy"
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")  # V1, V2
WHOLE_CHUNK = 4096  # tokens of a forward pass from which it is worth copying
STATUS_EVERY_S = 1.0
FAULTS = {
    "topk": ("dsv4_plugin", "topk"),
    "logits": ("dsv4_plugin.ops.logits", "paged_logits"),
    "gather": ("dsv4_plugin", "gather_indexer_cache"),
    "block_maxima": ("dsv4_plugin.ops.candidates", "block_maxima"),
    "select_blocks": ("dsv4_plugin.ops.candidates", "select_blocks"),
    "candidate_logits": ("dsv4_plugin.ops.candidates", "candidate_logits"),
    "select_candidates": ("dsv4_plugin.ops.candidates", "select_candidates"),
    "capability": ("dsv4_plugin.ops.dispatch", "capability"),
    "seam": ("vllm._custom_ops", "top_k_per_row_prefill"),
    "candidate_seam": (
        "vllm.model_executor.kernels.attention.dsa.candidate_blocks", "select_candidate_blocks",
    ),
}  # fmt: skip
SEAMS = ("seam", "candidate_seam")  # broken before the plugin, and vLLM's own imports, look


def register() -> None:
    """Leave notes with Python's import system; imports neither vLLM nor torch."""
    folder = os.environ.get("E2E_DIR")
    if not folder:
        return
    options = json.loads((Path(folder) / OPTIONS).read_text())
    if options.get("weights"):
        after_import("vllm.model_executor.model_loader.dummy_loader", _weights)
    if options.get("fast_start"):
        after_import("vllm.model_executor.warmup.kernel_warmup", _no_router_warmup)
    fault = os.environ.get("E2E_FAULT", "")
    if fault in SEAMS:
        _break(fault)
    for module in RUNNERS:
        after_import(module, functools.partial(_runner, Path(folder)))


def _break(fault: str) -> None:
    if fault not in FAULTS:
        raise ValueError(f"E2E_FAULT is {fault!r}; it can be {', '.join(map(repr, FAULTS))}")
    module, name = FAULTS[fault]
    if fault in SEAMS:
        after_import(module, functools.partial(_renamed, name=name))
        return

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"drill: {fault}")

    value = (lambda device: (7, 5)) if fault == "capability" else fail
    setattr(importlib.import_module(module), name, value)


def _renamed(module: Any, name: str) -> None:
    """Give a function of vLLM the same behaviour under other parameters.

    A module of vLLM that has imported the function by name before gets the changed one too.
    """
    original = getattr(module, name)

    def changed(*anything: Any) -> Any:
        return original(*anything)

    setattr(module, name, changed)
    for other in [m for key, m in sys.modules.items() if key.partition(".")[0] == "vllm"]:
        for alias in [key for key, value in vars(other).items() if value is original]:
            setattr(other, alias, changed)


# --- weights ---------------------------------------------------------------------------------


def _weights(loader: Any) -> None:
    """Put :func:`fill` in the place of vLLM's random values; both forms of its loader."""
    experts, seed = [1], [0]

    def one(tensor: Any, *args: Any, name: str = "", **kwargs: Any) -> None:
        seed[0] += 1
        fill(name, tensor.data, experts[0], seed[0])

    def layer_by_layer(layer: Any, *args: Any, **kwargs: Any) -> None:
        kept = layer.state_dict()
        for tensors in (layer.named_parameters, layer.named_buffers):
            for name, tensor in tensors(recurse=False):
                if name in kept:
                    one(tensor, name=name)

    original = loader.DummyModelLoader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        experts[0] = getattr(model_config.hf_config, "n_routed_experts", 1)
        result = original(self, model, model_config, *args, **kwargs)
        for module in model.modules():
            derive = getattr(module, "finalize_mhc_broadcast_weights", None)
            if callable(derive):
                derive()
        return result

    if hasattr(loader, "initialize_dummy_weights"):  # 0.26
        loader.initialize_dummy_weights = layer_by_layer
    loader.initialize_single_dummy_weight = one
    loader.DummyModelLoader.load_weights = load_weights


def fill(name: str, tensor: Any, experts: int, seed: int) -> None:
    """Fill one tensor so that activations stay near 1; the same values for the same ``seed``.

    A matrix gets a standard deviation of 1/√inputs, FP8 and FP4 ones by their scales (2⁻⁶, 2⁻⁷:
    powers of two, as the checkpoint has them); norms get 1, biases and sinks 0, integer tables
    (which experts a token goes to) different experts in each row.
    """
    import torch

    if tensor.device.type == "meta" or tensor.numel() == 0:
        return
    g = torch.Generator(device=tensor.device).manual_seed(seed)
    with torch.no_grad():
        if tensor.dtype == torch.uint8:  # packed FP4, and its scales
            if "scale" in name:
                tensor.fill_(127 - 7)
            else:
                tensor.random_(0, 256, generator=g)
        elif tensor.dtype == torch.float8_e8m0fnu:
            tensor.view(torch.uint8).fill_(127 - 6)
        elif tensor.dtype == torch.float8_e4m3fn:
            for part in tensor if tensor.dim() == 3 else (tensor,):
                values = torch.randn(part.shape, device=tensor.device, generator=g)
                part.copy_(values.to(tensor.dtype))
        elif not tensor.is_floating_point():
            if tensor.dim() == 2:
                rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
                columns = torch.arange(tensor.shape[1], device=tensor.device)[None, :]
                tensor.copy_((rows + columns) % experts)
            else:
                tensor.zero_()
        elif any(part in name for part in ("base", "bias", "sink")):
            tensor.zero_()
        elif "ape" in name:
            tensor.normal_(0, 0.1, generator=g)
        elif tensor.dim() >= 2:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=g)
        else:
            tensor.fill_(1)


def _no_router_warmup(module: Any) -> None:
    if hasattr(module, "_warmup_ll_bf16_router_gemm"):
        module._warmup_ll_bf16_router_gemm = lambda *model: None  # 0.33 gives it one


# --- the process with the model ----------------------------------------------------------------


def _runner(folder: Path, module: Any) -> None:
    owner: Any = getattr(module, "GPUModelRunner", None)
    if hasattr(owner, "_model_forward"):
        owner._model_forward = _copying(folder / COPY, owner._model_forward)
    elif hasattr(owner, "load_model") and hasattr(owner, "execute_model"):
        owner.load_model = _copying_model(folder / COPY, owner.load_model)
    else:
        log.say(logging.WARNING, "e2e: contexts cannot be copied in this vLLM; they are computed")
    _once(folder)


@functools.cache
def _once(folder: Path) -> None:
    """Do what a process needs once, whichever of vLLM's runners it imports."""
    fault = os.environ.get("E2E_FAULT", "")
    if fault and fault not in SEAMS:
        _break(fault)
    threading.Thread(target=_report, args=(folder,), daemon=True, name="e2e-status").start()


def _report(folder: Path) -> None:
    said: dict[str, Any] = {}
    while True:
        seen = {"status": status(), "memory": _memory()}
        for name, now in seen.items():
            if now is None or now == said.get(name):
                continue
            if name == "memory" or now["engine"] is not None:
                file = folder / f"{name}-{os.getpid()}.json"
                part = file.with_suffix(".part")
                part.write_text(json.dumps(now, indent=1) + "\n")
                part.replace(file)
                said[name] = now
        time.sleep(STATUS_EVERY_S)


def _memory() -> dict[str, float] | None:
    """Return what torch has of the GPU, in GiB; None in a process that does not use it."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    kinds = ("allocated_bytes", "reserved_bytes")
    stats = torch.cuda.memory_stats()
    return {
        f"{kind.partition('_')[0]}{suffix}_gib": round(stats[f"{kind}.all.{which}"] / 2**30, 3)
        for kind in kinds
        for which, suffix in (("current", ""), ("peak", "_peak"))
    }


def _copying_model(flag: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the second runner's ``load_model``: it calls the model itself, so that is wrapped."""

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        forward = self.model.forward
        copying = _copying(flag, lambda runner, *a, **k: forward(*a, **k))
        self.model.forward = functools.wraps(forward)(functools.partial(copying, self))
        return result

    return load_model


def _copying(flag: Path, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a runner's forward pass: whole chunks of one prompt are copied while ``flag`` is."""
    pages = _Pages()

    @functools.wraps(forward)
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, positions = kwargs.get("input_ids"), kwargs.get("positions")
        if ids is None or positions is None or ids.shape[0] < WHOLE_CHUNK or not flag.exists():
            return forward(self, *args, **kwargs)
        try:
            copied = pages.chunk(self, positions)
        except Exception:
            log.exception("e2e: contexts are computed from now on, copying failed")
            flag.unlink(missing_ok=True)
            copied = False
        if not copied:
            return forward(self, *args, **kwargs)
        hidden = self.model_config.get_hidden_size()
        return positions.new_zeros((ids.shape[0], hidden), dtype=self.dtype)

    return model_forward


class _Pages:
    """The cache pages of the chunk before, of each layer."""

    def __init__(self) -> None:
        self.end = -1
        self.last: dict[str, Any] = {}

    def chunk(self, runner: Any, positions: Any) -> bool:
        """Copy the chunk before to this one; False where there is none, or not this prompt's."""
        from vllm.forward_context import get_forward_context

        n = positions.shape[0]
        begin, end = int(positions[0]), int(positions[-1]) + 1
        if end - begin != n:  # tokens of several requests
            return False
        context = get_forward_context()
        blocks = runner.kv_cache_config.num_blocks
        pages, caches = {}, {}
        for group in runner.kv_cache_config.kv_cache_groups:
            found: dict[int, Any] = {}  # layers of a group may have pages of several sizes
            for name in group.layer_names:
                cache = context.no_compile_layers[name].kv_cache
                tokens = blocks * group.kv_cache_spec.block_size // cache.shape[0]
                if tokens not in found:
                    slots = context.slot_mapping[name][:n]
                    found[tokens] = (slots[slots >= 0] // tokens).unique_consecutive()
                pages[name], caches[name] = found[tokens], cache
        follows = begin > 0 and begin == self.end
        if follows:
            # Groups share memory, and a page given free by one can be another's new page: read
            # all before writing any.
            moves = []
            for name, target in pages.items():
                source = self.last[name]
                k = min(len(source), len(target))
                if k:
                    moves.append((caches[name], target[-k:], caches[name][source[-k:]]))
            for cache, target, content in moves:
                cache[target] = content
        self.end, self.last = end, pages
        return follows
