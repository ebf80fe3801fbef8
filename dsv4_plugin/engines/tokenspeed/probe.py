"""Where TokenSpeed can be changed, found in its source by name and signature, never by version."""

from __future__ import annotations

from functools import partial

from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.source import Missing, Site

__all__ = ["MODES", "OPS", "READERS", "look"]

OPS = "tokenspeed.runtime.layers.attention.deepseek_v4_ops"
REGISTRY = "tokenspeed_kernel.registry"
FACADES = {
    "dsa": "tokenspeed_kernel.ops.attention.dsa",
    "dsv4": "tokenspeed_kernel.ops.attention.dsv4",
}
# mode → what its facade hands a kernel, of which the first are looked for.
MODES: dict[str, tuple[str, ...]] = {
    "dsa_decode_topk": ("q", "weights", "seq_lens", "block_table"),
    "dsa_prefill_topk": ("q", "weights", "kv_workspace_slots", "row_starts", "row_ends"),
    "dsv4_decode_topk": ("index_q", "weights", "index_k_cache", "context_lens", "block_table"),
    "dsv4_prefill_topk": ("index_q", "weights", "index_k_cache", "block_table", "cu_seq_lens"),
}
READERS = {
    "read.fp8": "read_deepseek_v4_indexer_fp8_cache",
    "read.mxfp4": "read_deepseek_v4_indexer_mxfp4_cache",
}


def look() -> dict[str, Site]:
    """Look for every seam."""
    found = {f"topk.{mode}": source.guarded(partial(_kernel, mode)) for mode in MODES}
    found |= {name: source.guarded(partial(_reader, name)) for name in READERS}
    return found


def _kernel(mode: str) -> Site:
    registry = source.find(REGISTRY)
    for name in ("register_kernel", "KernelRegistry", "Priority"):
        if not registry.binds(name):
            raise Missing(f"{REGISTRY} has no {name}")
    family = mode.partition("_")[0]
    source.find(FACADES[family]).require(mode, MODES[mode])
    return Site(f"the kernel registry: attention, {mode}")


def _reader(name: str) -> Site:
    source.find(OPS).require(READERS[name], ("cache_2d", "slot_mapping", "block_size"))
    return Site(f"{OPS}.{READERS[name]}")
