"""The side of a vLLM server that is measured (:mod:`.side`), a plugin of ``vllm.general_plugins``.

It fills the weights with random values. vLLM's ``--load-format dummy`` takes ±1e-3, and 0.26
derives one tensor of DeepSeek-V4 only when it loads a checkpoint, so that its first layer fails.
For a fast start it omits a warm-up of router shapes.

Contexts by copying: vLLM computes the first chunk of a long prompt. Each further whole chunk gets
the cache pages of the chunk before instead of a forward pass. The decode steps afterwards read real
keys, but the same chunk's keys many times. A million tokens take seconds instead of minutes.

``E2E_FAULT`` can also be ``seam`` or ``candidate_seam``: then one function that the plugin patches
has other parameters.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.server.side import COPY, asked_fault, fill, folder, options, tally, watch
from dsv4_plugin import log
from dsv4_plugin.engines.shared.import_hooks import after_import

__all__ = ["RUNNERS", "SEAMS", "register"]

INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")  # V1, V2
WHOLE_CHUNK = 4096  # tokens of a forward pass from which it is worth copying
SEAMS = {
    "seam": ("vllm._custom_ops", "top_k_per_row_prefill"),
    "candidate_seam": (
        "vllm.model_executor.kernels.attention.dsa.candidate_blocks", "select_candidate_blocks",
    ),
}  # fmt: skip


def register() -> None:
    """Register import hooks; import neither vLLM nor torch."""
    where = folder()
    if where is None:
        return
    wished = options()
    if wished.get("weights"):
        after_import("vllm.model_executor.model_loader.dummy_loader", _weights)
    if wished.get("fast_start"):
        after_import("vllm.model_executor.warmup.kernel_warmup", _no_router_warmup)
    fault = asked_fault(*SEAMS)
    if fault in SEAMS:  # before the plugin, and vLLM's own imports, look
        module, name = SEAMS[fault]
        after_import(module, functools.partial(_renamed, name=name))
    for module in RUNNERS:
        after_import(module, functools.partial(_runner, where))


def _renamed(module: Any, name: str) -> None:
    """Give a function of vLLM the same behaviour under other parameters.

    A module of vLLM that has already imported the function by name gets the changed one too.
    """
    original = getattr(module, name)

    def changed(*anything: Any) -> Any:
        return original(*anything)

    setattr(module, name, changed)
    for other in [m for key, m in sys.modules.items() if key.partition(".")[0] == "vllm"]:
        for alias in [key for key, value in vars(other).items() if value is original]:
            setattr(other, alias, changed)


def _shares() -> None:
    """Record how many rows of a prefill this rank scores, and of how many (0.32 and later).

    It is called repeatedly, because the module may be imported later. An import hook cannot do it:
    the plugin has one for this module, and a module can have only one.
    """
    owner = getattr(sys.modules.get(INDEXER), "PrefillRowShard", None)
    if owner is None or hasattr(owner.__init__, "__wrapped__"):
        return
    original = owner.__init__

    @functools.wraps(original)
    def init(self: Any, num_decode_tokens: int, sizes: list[int], rank: int) -> None:
        original(self, num_decode_tokens, sizes, rank)
        tally["prefill"] += sum(sizes)
        tally[f"prefill of rank {rank}"] += sizes[rank]

    owner.__init__ = init


# --- weights ---------------------------------------------------------------------------------


def _weights(loader: Any) -> None:
    """Replace vLLM's random values with those of :func:`fill`, in both forms of its loader."""
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


def _no_router_warmup(module: Any) -> None:
    if hasattr(module, "_warmup_ll_bf16_router_gemm"):
        module._warmup_ll_bf16_router_gemm = lambda *model: None  # 0.33 passes one


# --- the process with the model ----------------------------------------------------------------


def _runner(where: Path, module: Any) -> None:
    owner: Any = getattr(module, "GPUModelRunner", None)
    if hasattr(owner, "_model_forward"):
        owner._model_forward = _copying(where / COPY, owner._model_forward)
    elif hasattr(owner, "load_model") and hasattr(owner, "execute_model"):
        owner.load_model = _copying_model(where / COPY, owner.load_model)
    else:
        log.say(logging.WARNING, "e2e: contexts cannot be copied in this vLLM; they are computed")
    watch(_shares)


def _copying_model(flag: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the second runner's ``load_model`` to wrap the model, which the runner calls itself."""

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        forward = self.model.forward
        copying = _copying(flag, lambda runner, *a, **k: forward(*a, **k))
        self.model.forward = functools.wraps(forward)(functools.partial(copying, self))
        return result

    return load_model


def _copying(flag: Path, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a runner's forward pass: copy whole chunks of one prompt while ``flag`` exists."""
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
    """The cache pages of the chunk before, for each layer."""

    def __init__(self) -> None:
        self.end = -1
        self.last: dict[str, Any] = {}

    def chunk(self, runner: Any, positions: Any) -> bool:
        """Copy the chunk before to this one; return False if this prompt has none."""
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
            # Groups share memory, and a page that one group frees can be the new page of another
            # group. So read all pages before writing any.
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
