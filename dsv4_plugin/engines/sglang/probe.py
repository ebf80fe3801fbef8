"""The seams of SGLang, one record each. A release that moves one gets a further form here.

Names move between releases: ``topk_transform_512`` became ``topk_transform_paged`` in 0.5.20.
Nothing is registered for a seam that is not recognised.
"""

from __future__ import annotations

from dsv4_plugin.engines.shared import seam
from dsv4_plugin.engines.shared.seam import Place, Seam
from dsv4_plugin.engines.shared.source import Site

__all__ = ["DSA", "INDEXER", "LOGITS", "PAGED", "SEAMS", "SERVER_ARGS", "look"]

INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
DSA = "sglang.srt.layers.attention.dsa.dsa_topk_backend"
SERVER_ARGS = "sglang.srt.server_args"
LOGITS = ("fp8_paged_mqa_logits", "fp8_mqa_logits")
PAGED = ("scores", "seq_lens", "page_tables", "out_page_indices", "page_size")


def _paged(name: str) -> tuple[Place, ...]:
    return Place(INDEXER, name), Place(INDEXER, f"{name}_v2")


SEAMS = (
    Seam(
        "flag",
        ((Place(SERVER_ARGS, "ServerArgs.add_cli_args", ("parser",)),),),
        puts="the option `--dsv4-topk`, behind SGLang's own",
        why="SGLang has no option that enables a plugin, and an unknown option ends the command",
        until="SGLang lets a plugin declare options; an option of SGLang's of that name wins",
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
        puts="the decision for this indexer, in force for the calls below it",
        why="the logits and top-k functions are shared with other models; only here the plugin "
        "knows whose scores come",
        until="SGLang hands the backend choice to its top-k functions",
    ),
    Seam(
        "topk.paged",
        (_paged("topk_transform_paged"), _paged("topk_transform_512")),
        puts="the plugin's top-k with the fused page table, raw indices too",
        why="SGLang's kernels read float32 only, and leave the order of ties open",
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
        puts="below a forward that wants it, the plugin's logits, or bfloat16 asked of DeepGEMM "
        "(`logits_dtype` of the `fp8_fp4_` siblings). Patched when the indexer's forward first "
        "runs: DeepGEMM loads a CUDA extension, which a launcher must not",
        why="SGLang calls the functions that write float32 only, though V4 was trained with "
        "bfloat16 scores; half the bytes are written and read",
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
        why="for V3.2 and GLM as for V4: exact, with ties to the lowest index",
        until="as topk.paged",
    ),
)  # fmt: skip


def look() -> dict[str, Site]:
    """Look for every seam in SGLang's source; imports nothing."""
    return seam.look(SEAMS)
