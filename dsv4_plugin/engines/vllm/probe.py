"""Where vLLM can be changed, found in its source: what ``dsv4-plugin doctor`` shows.

The patches look at the imported modules (:mod:`.install`); this module asks the same question
without importing an engine.
"""

from __future__ import annotations

from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.source import Missing, Site

__all__ = ["ATTENTION", "TO_SLOTS", "TO_SLOTS_TAKES", "look", "slots"]

INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
TOPK = "vllm.model_executor.layers.indexer_topk"
OPS = "vllm._custom_ops"
PLANNER = "vllm.v1.attention.backends.mla.indexer"
ATTENTION = "vllm.models.deepseek_v4.nvidia.flashmla"
TO_SLOTS = "compute_global_topk_indices_and_lens"
TO_SLOTS_TAKES = (
    "topk_indices",
    "token_to_req_indices",
    "block_table",
    "block_size",
    "is_valid_token",
)
_DEFINES_TO_SLOTS = "vllm.models.deepseek_v4.common.ops.cache_utils"


def look() -> dict[str, Site]:
    """Look for every seam."""
    return {
        "guard": source.guarded(_guard),
        "topk.decode": source.guarded(_decode),
        "topk.prefill": source.guarded(_prefill),
        "topk.slots": source.guarded(slots),
        "topk.fill": source.guarded(_fill),
        "logits": source.guarded(_logits),
        "gather": source.guarded(_gather),
        "budget": source.guarded(_budget),
    }


def _guard() -> Site:
    source.find(INDEXER).require("SparseAttnIndexer.__init__", ("self", "k_cache"))
    return Site("SparseAttnIndexer.__init__")


def _decode() -> Site:
    try:
        wanted = ("self", "logits", "seq_lens", "next_n", "topk_indices", "topk_tokens")
        source.find(TOPK).require("SparseIndexerTopk.forward", wanted)
    except Missing as error:
        if not source.find(INDEXER).mentions("persistent_topk"):
            raise error
        return Site("torch.ops._C.persistent_topk")
    return Site("SparseIndexerTopk.forward")


def _prefill() -> Site:
    wanted = ("logits", "cu_seqlen_ks", "cu_seqlen_ke", "raw_topk_indices")
    source.find(OPS).require("top_k_per_row_prefill", wanted)
    return Site(f"{OPS}.top_k_per_row_prefill")


def slots() -> Site:
    """Look for the function by which the attention turns indices into slots."""
    attention = source.find(ATTENTION)
    if not attention.binds(TO_SLOTS):
        raise Missing(f"{ATTENTION} has no {TO_SLOTS}")
    source.find(_DEFINES_TO_SLOTS).require(TO_SLOTS, TO_SLOTS_TAKES)
    return Site(f"{ATTENTION}.{TO_SLOTS}")


def _fill() -> Site:
    got = source.find(INDEXER).parameters("sparse_attn_indexer")
    if "skip_topk_buffer_clear" not in got:
        raise Missing("sparse_attn_indexer takes no skip_topk_buffer_clear")
    return Site("torch.ops.vllm.sparse_attn_indexer")


def _logits() -> Site:
    names = ("fp8_fp4_paged_mqa_logits", "fp8_fp4_mqa_logits")
    missing = [name for name in names if not source.find(INDEXER).binds(name)]
    if missing:
        raise Missing(f"{INDEXER} has no {' and no '.join(missing)}")
    return Site("/".join(names))


def _gather() -> Site:
    wanted = ("kv_cache", "dst_k", "dst_scale", "block_table", "cu_seq_lens")
    source.find(OPS).require("cp_gather_indexer_k_quant_cache", wanted)
    return Site(f"{OPS}.cp_gather_indexer_k_quant_cache")


def _budget() -> Site:
    planner = source.find(PLANNER)
    method = "DeepseekV32IndexerMetadataBuilder._split_indexer_prefill_chunks"
    names = (method, "split_indexer_prefill_chunks")  # a function to 0.26, a method later
    for name in names:
        try:
            got = planner.parameters(name)
        except Missing:
            continue
        if got[2:] == ("workspace_size", "max_logits_bytes", "request_offset"):
            return Site(name)
        raise Missing(f"{name} takes ({', '.join(got)})")
    raise Missing(f"{PLANNER} has neither {' nor '.join(names)}")
