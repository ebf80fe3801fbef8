"""The seams of TokenSpeed, one record each: modes of its kernel registry, readers of the cache."""

from __future__ import annotations

from dsv4_plugin.engines.shared import seam
from dsv4_plugin.engines.shared.seam import Place, Seam
from dsv4_plugin.engines.shared.source import Site

__all__ = ["DSV41", "FACADES", "MODES", "OPS", "READERS", "SEAMS", "look"]

OPS = "tokenspeed.runtime.layers.attention.deepseek_v4_ops"
REGISTRY = "tokenspeed_kernel.registry"
FACADES = "tokenspeed_kernel.ops.attention"
DSV41 = "dsv41_index_topk"
# mode -> the arguments that its facade passes to a kernel; the probe looks for these first ones.
MODES: dict[str, tuple[str, ...]] = {
    "dsa_decode_topk": ("q", "weights", "seq_lens", "block_table"),
    "dsa_prefill_topk": ("q", "weights", "kv_workspace_slots", "row_starts", "row_ends"),
    "dsv4_decode_topk": ("index_q", "weights", "index_k_cache", "context_lens", "block_table"),
    "dsv4_prefill_topk": ("index_q", "weights", "index_k_cache", "block_table", "cu_seq_lens"),
    DSV41: (
        "index_q", "weights", "index_cache", "page_table", "visible_lens", "candidate_blocks",
        "topk", "candidate_topk", "candidate_block_size", "query_chunk_size", "score_chunk_size",
        "process_group", "out",
    ),
}  # fmt: skip
_HOPPER = "on Hopper DeepSeek-V4 calls this op, which runs portable Triton logits, radix launches, "
_HOPPER += "a scatter and a sort"
_DSV4 = "it costs nothing, and serves an engine that calls this op"
_DSV41 = "on Hopper DeepSeek-V4.1's layers write, copy and read float32 logits of all keys; at "
_DSV41 += "prefill the consumers do this too"
_PUTS = {
    "dsa_decode_topk": "logits by the plugin or DeepGEMM, and the plugin's top-k: q bfloat16, "
    "weights float32 or bfloat16, `q_len` 1, 32 or 64 heads, head_dim 128, pages of 64, k 512, "
    "1024, 2048, `fp8_scaled`, `page_planar`; logical offsets or pool slots; `batch_invariant`",
    "dsa_prefill_topk": "the same for the rows of a workspace, in blocks below "
    "`max_logits_bytes`; the keys by one vectorised gather by slot, from strided arenas too",
    "dsv4_decode_topk": "the same for FP8 queries",
    "dsv4_prefill_topk": "the same for FP8 queries",
    DSV41: "the plugin's logits, blocks and keys of DeepSeek-V4.1's layers, decode and prefill: "
    "index_q bfloat16, 32 or 64 heads that are not divided among ranks, pages of 64 in FP8, blocks "
    "of 8, int32 tables",
}


def _mode(mode: str) -> Seam:
    registry = (Place(REGISTRY, n) for n in ("register_kernel", "KernelRegistry", "Priority"))
    family, _, op = mode.partition("_")
    facade = Place(f"{FACADES}.{family}", op if mode == DSV41 else mode, MODES[mode])
    return Seam(
        f"topk.{mode}",
        ((facade, *registry),),
        puts=_PUTS[mode],
        why=_DSV41 if mode == DSV41 else _HOPPER if mode.startswith("dsa") else _DSV4,
        until="TokenSpeed has a kernel for these traits that reads bfloat16 logits, is exact and "
        "is not slower",
    )


def _reader(name: str, attribute: str, why: str, upstream: str = "") -> Seam:
    takes = ("cache_2d", "slot_mapping", "block_size")
    return Seam(
        name,
        ((Place(OPS, attribute, takes, exactly=True, shown=f"{OPS}.{attribute}"),),),
        puts="the plugin's vectorised read, with the same bits",
        why=why,
        until="TokenSpeed's reader is vectorised, or gone",
        upstream=upstream,
    )


READERS = {
    "read.fp8": _reader(
        "read.fp8",
        "read_deepseek_v4_indexer_fp8_cache",
        "TokenSpeed's reader loops over `slot_mapping.tolist()` with several GPU ops a token and a "
        "synchronisation, so it cannot be captured",
        "#242 removed its callers",
    ),
    "read.mxfp4": _reader(
        "read.mxfp4",
        "read_deepseek_v4_indexer_mxfp4_cache",
        "the padding of TokenSpeed's reader reads row 0 of an empty cache; not every release has "
        "the reader",
    ),
}
SEAMS = (*map(_mode, MODES), *READERS.values())


def look() -> dict[str, Site]:
    """Look for every seam in TokenSpeed's source; imports nothing."""
    found = seam.look(SEAMS)
    for mode in MODES:
        site = found[f"topk.{mode}"]
        if site.where is not None:
            found[f"topk.{mode}"] = Site(f"the kernel registry: attention, {mode}")
    return found
