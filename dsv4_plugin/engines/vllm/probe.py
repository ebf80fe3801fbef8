"""The seams of vLLM, one record each. If a release changes a seam, its record gets a further form.

``dsv4-plugin doctor`` shows what :func:`look` finds in vLLM's source. :mod:`.install` patches what
the same records find in the imported modules. The list in ``docs/development/vllm.md`` comes from
the records.
"""

from __future__ import annotations

from dsv4_plugin.engines.shared import seam
from dsv4_plugin.engines.shared.seam import Place, Seam
from dsv4_plugin.engines.shared.source import Site

__all__ = [
    "APPLY_MASK", "DEEP_GEMM", "INDEXER", "NEIGHBOURS", "OP", "SEAMS",
    "SELECT_BLOCKS", "SHARD", "SHARDS_ITSELF", "SKIP_FILL", "TO_SLOTS", "TO_SLOTS_TAKES", "look",
]  # fmt: skip

INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
TOPK = "vllm.model_executor.layers.indexer_topk"
OPS = "vllm._custom_ops"
PLANNER = "vllm.v1.attention.backends.mla.indexer"
DEEP_GEMM = "vllm.utils.deep_gemm"
# Patched when the indexer's module is imported.
NEIGHBOURS = (TOPK, OPS, PLANNER, DEEP_GEMM)
OP = "torch.ops.vllm.sparse_attn_indexer"

BLOCKS = "vllm.model_executor.kernels.attention.dsa.candidate_blocks"
SELECT_BLOCKS = Place(
    INDEXER, "_select_candidate_blocks",
    ("logits", "row_ks", "row_ke", "topk_blocks", "block_size", "out", "row_repeat"),
    exactly=True, source=BLOCKS, defined="select_candidate_blocks",
)  # fmt: skip
APPLY_MASK = Place(
    INDEXER, "_apply_candidate_mask",
    ("logits", "row_ks", "row_ke", "candidate_blocks", "block_size", "row_repeat"),
    exactly=True, source=BLOCKS, defined="apply_candidate_mask",
)  # fmt: skip

_OP_CALLED = (INDEXER, "sparse_attn_indexer")
_CHUNKS = ("workspace_size", "max_logits_bytes", "request_offset")
SKIP_FILL = "skip_topk_buffer_clear"
TO_SLOTS_TAKES = (
    "topk_indices", "token_to_req_indices", "block_table", "block_size", "is_valid_token"
)  # fmt: skip


def _to_slots(model: str) -> Place:
    attention, name = f"vllm.models.{model}.nvidia.flashmla", "compute_global_topk_indices_and_lens"
    return Place(
        attention, name, TO_SLOTS_TAKES, exactly=True,
        source=f"vllm.models.{model}.common.ops.cache_utils", shown=f"{attention}.{name}",
    )  # fmt: skip


# In the attention of each model; a server has imported the one of its model.
TO_SLOTS = (_to_slots("deepseek_v4"), _to_slots("deepseek_v41"))


def _chunks(method: str) -> Place:
    return Place(
        PLANNER, method, _CHUNKS, exactly=True, skip=2,
        used=(PLANNER, method, "max_logits_bytes // 4"),
    )  # fmt: skip


# Where a step's chunks are made, and what is called for each of them in each layer.
SHARD = (
    Place(
        PLANNER, "DeepseekV32IndexerMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"), exactly=True,
        used=(PLANNER, "DeepseekV32IndexerMetadataBuilder.build", "seq_lens_cpu_upper_bound"),
    ),
    Place(
        INDEXER, "_merge_dcp_topk_global", ("logits", "topk_indices", "topk_tokens"),
        used=(*_OP_CALLED, "row_starts=chunk.cu_seqlen_ks"),
    ),
)  # fmt: skip


SHARDS_ITSELF = Place(PLANNER, "tp_prefill_row_sharding_supported", ("vllm_config",))  # from 0.32


def _compiled(name: str, optional: bool = False) -> Place:
    return Place(
        "torch.ops._C", name, used=(*_OP_CALLED, f"torch.ops._C.{name}("), op=True,
        optional=optional, shown=f"torch.ops._C.{name}",
    )  # fmt: skip


SEAMS = (
    Seam(
        "guard",
        ((Place(INDEXER, "SparseAttnIndexer.__init__", ("self", "k_cache")),),),
        puts="a check of every indexer layer after its own `__init__`",
        why="what the plugin can do depends on the layer and on the engine's configuration. Both "
        "are readable only while layers are built. An explicit setting that cannot be met fails "
        "here",
        until="vLLM shows plugins the layers that it builds",
    ),
    Seam(
        "topk.decode",
        (
            (
                Place(
                    TOPK, "SparseIndexerTopk.forward",
                    ("self", "logits", "seq_lens", "next_n", "topk_indices", "topk_tokens",
                     "max_seq_len"),
                    exactly=True,
                ),
            ),
            (_compiled("persistent_topk"), _compiled("cooperative_topk", optional=True)),
        ),
        puts="the plugin's top-k, for logits that carry its tag. Before 0.30 vLLM has no such "
        "class, and the plugin replaces the compiled ops if it knows their schemas",
        why="vLLM's kernels read float32 only, and drop or reorder candidates in ties",
        until="vLLM's own top-k reads bfloat16, is exact, breaks ties by the lowest index and is "
        "not slower; or vLLM has a registry for top-k backends",
    ),
    Seam(
        "topk.prefill",
        (
            (
                Place(
                    OPS, "top_k_per_row_prefill",
                    ("logits", "cu_seqlen_ks", "cu_seqlen_ke", "raw_topk_indices", "num_rows",
                     "stride0", "stride1", "topk_tokens"),
                    exactly=True,
                    used=(*_OP_CALLED, "ops.top_k_per_row_prefill("),
                    shown=f"{OPS}.top_k_per_row_prefill",
                ),
            ),
        ),
        puts="the plugin's top-k. One rule covers absolute columns (up to 0.32) and compressed "
        "ones (from 0.33), because the caller passes the start of each row",
        why="as at decode; vLLM's prefill kernel has no bfloat16 form",
        until="vLLM's prefill top-k reads bfloat16, is exact and is not slower",
    ),
    Seam(
        "topk.slots",
        tuple((place,) for place in TO_SLOTS),
        puts="the slots and counts that the plugin's decode top-k wrote beside its indices, if the "
        "attention's request matches that call; otherwise vLLM's function runs. The plugin patches "
        "it when a layer is built, because the attention's module imports the indexer's",
        why="after every top-k vLLM runs a kernel that turns its indices into slots",
        until="vLLM's top-k writes slots, or its attention reads indices",
        late=True,
    ),
    Seam(
        "topk.fill",
        (
            (
                Place(
                    INDEXER, "sparse_attn_indexer",
                    has=("hidden_states", "k_cache_prefix", "topk_tokens", "topk_indices_buffer",
                         SKIP_FILL),
                    shown=OP,
                ),
            ),
        ),
        puts="the same op, with `skip_topk_buffer_clear` in batches that have only decode rows; "
        "the replacement also tells which kind of layer calls, and to which requests the rows of "
        "a draft belong. Only if the model is not compiled, so that no compiler traces the call",
        why="vLLM fills every row with -1 before every selection, in a kernel of its own, and the "
        "layer never passes the argument",
        until="the layer passes it, or vLLM's top-k is known to write every row",
    ),
    Seam(
        "logits",
        (
            (
                Place(INDEXER, "fp8_fp4_paged_mqa_logits", ("q", "kv_cache", "weights"),
                      source=DEEP_GEMM),
                Place(INDEXER, "fp8_fp4_mqa_logits", ("q", "kv", "weights"), source=DEEP_GEMM),
                Place(INDEXER, "as_fp32_logits", ("logits",), optional=True),
            ),
        ),
        puts="wrappers that compute the logits or ask DeepGEMM for bfloat16 (`logits_dtype`), tag "
        "them for the top-k, and prevent vLLM from widening them",
        why="V4 was trained with bfloat16 scores, and bfloat16 halves the bytes that are written "
        "and read. vLLM never asks for bfloat16, and 0.33's DeepGEMM cannot write it on Hopper",
        until="vLLM can be configured to write bfloat16 logits and its top-k reads them",
    ),
    Seam(
        "candidates",
        ((SELECT_BLOCKS, APPLY_MASK),),
        puts="functions that compute the logits that a layer of DeepSeek-V4.1 needs: the maxima of "
        "the blocks for the source, the scores of its candidates for a consumer. The plugin defers "
        "the logits of such layers until vLLM calls one of the two functions. Both get vLLM's own "
        "logits if the plugin does not serve",
        why="on Hopper vLLM scores the whole context in every consumer, writes -inf over rows as "
        "wide as `max_model_len`, and selects the blocks with `torch.topk`",
        until="vLLM scores candidates only on compute capability 9.0 and selects blocks exactly",
        upstream="vLLM #56254 does it for compute capability 10.0",
        optional=True,
    ),
    Seam(
        "gather",
        (
            (
                Place(
                    OPS, "cp_gather_indexer_k_quant_cache",
                    ("kv_cache", "dst_k", "dst_scale", "block_table", "cu_seq_lens"),
                    exactly=True,
                    shown=f"{OPS}.cp_gather_indexer_k_quant_cache",
                ),
            ),
        ),
        puts="the plugin's gather of the quantised keys of a prefill chunk, FP8 pages only. If the "
        "logits are deferred, the gather waits until code reads the keys",
        why="it writes the same bytes with fewer instructions, and it also works on a platform "
        "without vLLM's compiled op",
        until="vLLM's kernel reaches the byte floor",
    ),
    Seam(
        "budget",
        # A method from 0.27 on, a function before.
        (
            (_chunks("DeepseekV32IndexerMetadataBuilder._split_indexer_prefill_chunks"),),
            (_chunks("split_indexer_prefill_chunks"),),
        ),
        puts="twice the budget if the logits are bfloat16",
        why="vLLM keeps a prefill chunk's logits below `VLLM_SPARSE_INDEXER_MAX_LOGITS_MB` and "
        "counts four bytes for each; in bfloat16 the same bytes hold twice the rows",
        until="vLLM's planner asks for the logits' dtype",
    ),
    Seam(
        "shard",
        ((SHARDS_ITSELF,), SHARD),
        puts="a step's prefill chunks with the rows of this rank alone, and after the last chunk "
        "of a layer a gather of all indices. The plugin patches only with "
        "`DSV4_SHARD_PREFILL=1`, when a layer is built, and only the second form: the first is "
        "vLLM's own sharding",
        why="every tensor-parallel rank scores and selects all rows of a prefill",
        until="the oldest release that the plugin serves is 0.32, which shards them itself",
        upstream="vLLM #53691, #54394",
        late=True,
        optional=True,
    ),
)  # fmt: skip


def look() -> dict[str, Site]:
    """Look for every seam in vLLM's source; imports nothing."""
    return seam.look(SEAMS)
