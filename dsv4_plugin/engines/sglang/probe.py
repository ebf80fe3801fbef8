"""The seams of SGLang, one record each. A release that changes a seam needs a further form in it.

Names move between releases: ``topk_transform_512`` became ``topk_transform_paged`` in 0.5.20.
The plugin registers nothing for a seam that it does not recognise.
"""

from __future__ import annotations

from dsv4_plugin.engines.shared import seam, source
from dsv4_plugin.engines.shared.seam import Place, Seam
from dsv4_plugin.engines.shared.source import Site

__all__ = [
    "DSA",
    "INDEXER",
    "LOGITS",
    "METADATA",
    "PAGED",
    "SEAMS",
    "SERVER_ARGS",
    "V41",
    "absent",
    "look",
]

INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
V41 = "sglang.srt.layers.attention.dsv4.v41_indexer"
METADATA = "sglang.srt.layers.attention.dsv4.metadata"
DSA = "sglang.srt.layers.attention.dsa.dsa_topk_backend"
SERVER_ARGS = "sglang.srt.server_args"
LOGITS = ("fp8_paged_mqa_logits", "fp8_mqa_logits")
PAGED = ("scores", "seq_lens", "page_tables", "out_page_indices", "page_size")


def _paged(name: str) -> tuple[Place, ...]:
    return Place(INDEXER, name), Place(INDEXER, f"{name}_v2")


def _method(module: str, name: str, *takes: str, field: str = "") -> Place:
    """Return a method before which the plugin stands: it takes exactly these arguments.

    ``field`` is a field of the inputs that the plugin uses.
    """
    used = (f"{V41}.types", "", f"    {field}: ") if field else None
    return Place(f"{V41}.{module}", name, ("self", *takes), exactly=True, used=used)


SEAMS = (
    Seam(
        "flag",
        ((Place(SERVER_ARGS, "ServerArgs.add_cli_args", ("parser",)),),),
        puts="the option `--dsv4-topk`, after SGLang's own",
        why="SGLang has no option that enables a plugin, and an unknown option ends the command",
        until="SGLang lets a plugin declare options; SGLang's own option of that name wins",
    ),
    Seam(
        "forward",
        (
            (
                Place(
                    INDEXER, "C4IndexerBackendMixin.forward_c4_indexer",
                    has=("self", "x", "c4_indexer", "forward_batch"),
                ),
            ),
        ),
        puts="the decision for this indexer, in force for the calls inside it",
        why="other models share the logits and top-k functions; only here the plugin knows which "
        "model's scores come",
        until="SGLang hands the backend choice to its top-k functions",
    ),
    Seam(
        "topk.paged",
        (_paged("topk_transform_paged"), _paged("topk_transform_512")),
        puts="the plugin's top-k with the fused page table, raw indices too",
        why="SGLang's kernels read float32 only, and do not define the order of ties",
        until="SGLang's kernels read bfloat16, are exact, break ties by the lowest index and are "
        "not slower",
    ),
    Seam(
        "logits",
        (
            tuple(
                Place("deep_gemm", name, used=(INDEXER, "", name), op=True,
                      shown=f"deep_gemm.{name}")
                for name in LOGITS
            ),
        ),
        puts="inside a forward that the plugin serves, the plugin's logits, or DeepGEMM's in "
        "bfloat16 (`logits_dtype` of the `fp8_fp4_` functions). The plugin patches when the "
        "indexer's forward first runs, because DeepGEMM loads a CUDA extension, and a launcher "
        "must not do that",
        why="SGLang calls the functions that write float32 only, though V4 was trained with "
        "bfloat16 scores, which are half as many bytes to write and to read",
        until="SGLang can be told to write bfloat16 logits",
    ),
    Seam(
        "topk.dsa",
        (
            (
                Place(
                    DSA, "DSATopKBackend.topk_transform",
                    ("self", "logits", "lengths", "topk", "topk_transform_method",
                     "attn_metadata"),
                ),
            ),
        ),
        puts="the plugin's float32 top-k where the call is decode-shaped and PAGED",
        why="the selection of V3.2 and GLM becomes exact, with ties to the lowest index",
        until="as topk.paged",
    ),
    Seam(
        "budget",
        (
            (
                Place(METADATA, "plan_indexer_row_chunks", has=("num_rows", "num_cols",
                                                                "budget_bytes")),
                Place(
                    INDEXER, "C4IndexerBackendMixin._get_nonpaged_indexer_plan",
                    has=("self", "indexer_metadata"),
                    used=(INDEXER, "C4IndexerBackendMixin._get_nonpaged_indexer_plan",
                          "budget_bytes=indexer_metadata.mqa_logits_budget_bytes"),
                ),
            ),
        ),
        puts="twice the budget, once all logits take two bytes",
        why="SGLang cuts a long prefill of DeepSeek-V4 so that float32 logits fit its budget, and "
        "each part reads all keys",
        until="SGLang's budget counts the bytes of its logits' dtype",
        optional=True,
    ),
    Seam(
        "topk.candidates",
        (
            (
                Place(
                    V41, "make_candidate_indexer",
                    has=("token_to_kv_pool", "req_to_token", "candidate_topk_blocks",
                         "candidate_block_size"),
                ),
                _method("dense_blocks", "DenseBlocksBackend.publish_decode", "inputs",
                        field="paged_metadata"),
                _method("dense_blocks", "DenseBlocksBackend.publish_prefill", "inputs",
                        field="rows_per_request_device"),
                _method("dense_blocks", "DenseBlocksBackend.consume_decode", "inputs",
                        "published"),
                _method("dense_blocks", "DenseBlocksBackend.consume_prefill", "inputs",
                        "published"),
            ),
        ),
        puts="an object before the one that serves DeepSeek-V4.1's source and consumers: exact "
        "candidate blocks, and consumers that score only the keys of these, without a read on the "
        "host",
        why="on Hopper SGLang's consumers score every key, its prefill runs in eager torch, and it "
        "promises no order among equal scores",
        until="SGLang has kernels for Hopper that do the same; the plugin puts nothing before an "
        "object of another class",
        upstream="#40574",
        optional=True,
    ),
    Seam(
        "topk.full",
        (
            (
                Place(V41, "make_full_topk_indexer", has=("token_to_kv_pool", "req_to_token")),
                _method("full_topk", "FullTopKIndexer.topk_decode", "inputs",
                        field="paged_metadata"),
                _method("full_topk", "FullTopKIndexer.topk_prefill", "inputs",
                        field="rows_per_request_device"),
            ),
        ),
        puts="the same for DeepSeek-V4.1's layers without candidates",
        why="as topk.candidates",
        until="as topk.candidates",
        upstream="#40574",
        optional=True,
    ),
)  # fmt: skip


def absent() -> list[str]:
    """Return the seams that a release may be without: those of a model that it does not have."""
    names = [record.name for record in SEAMS if record.optional]
    try:
        source.find(V41)
    except source.Missing:
        return names
    return [name for name in names if not name.startswith("topk.")]


def look() -> dict[str, Site]:
    """Look for every seam in SGLang's source; imports nothing."""
    return seam.look(SEAMS)
