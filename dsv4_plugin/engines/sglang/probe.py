"""Where SGLang can be changed, found in its source by name and signature, never by version.

Names move between releases: ``topk_transform_512`` became ``topk_transform_paged`` in 0.5.20. A
seam that is not recognised has no target, so nothing is registered for it.
"""

from __future__ import annotations

from dsv4_plugin.engines.shared import source
from dsv4_plugin.engines.shared.source import Missing, Site

__all__ = ["DSA", "INDEXER", "SERVER_ARGS", "look"]

INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
DSA = "sglang.srt.layers.attention.dsa.dsa_topk_backend"
SERVER_ARGS = "sglang.srt.server_args"

TOPK = ("topk_transform_paged", "topk_transform_512")  # newest first; each has a sibling _v2
FORWARD = "C4IndexerBackendMixin.forward_c4_indexer"
DSA_TOPK = "DSATopKBackend.topk_transform"
DSA_PARAMETERS = (
    "self",
    "logits",
    "lengths",
    "topk",
    "topk_transform_method",
    "attn_metadata",
)
LOGITS = ("fp8_paged_mqa_logits", "fp8_mqa_logits")


def look() -> dict[str, Site]:
    """Look for every seam."""
    return {
        "flag": source.guarded(_flag),
        "forward": source.guarded(_forward),
        "topk.paged": source.guarded(_paged),
        "logits": source.guarded(_logits),
        "topk.dsa": source.guarded(_dsa),
    }


def _flag() -> Site:
    source.find(SERVER_ARGS).require("ServerArgs.add_cli_args", ("parser",))
    return Site("ServerArgs.add_cli_args", None, (f"{SERVER_ARGS}.ServerArgs.add_cli_args",))


def _forward() -> Site:
    got = source.find(INDEXER).parameters(FORWARD)
    if not {"self", "x", "c4_indexer", "forward_batch"} <= set(got):
        raise Missing(f"{FORWARD} takes ({', '.join(got)})")
    return Site(FORWARD, None, (f"{INDEXER}.{FORWARD}",))


def _paged() -> Site:
    module = source.find(INDEXER)
    for name in TOPK:
        pair = (name, f"{name}_v2")
        if all(module.binds(n) for n in pair):
            return Site("/".join(pair), None, tuple(f"{INDEXER}.{n}" for n in pair))
    raise Missing(f"{INDEXER} has neither {' nor '.join(TOPK)}")


def _logits() -> Site:
    module = source.find(INDEXER)
    missing = [name for name in LOGITS if not module.mentions(name)]
    if missing:
        raise Missing(f"{INDEXER} does not call deep_gemm.{' and '.join(missing)}")
    # Not hooked by the registry: DeepGEMM loads a CUDA extension, which a launcher must not.
    return Site("deep_gemm." + "/".join(LOGITS))


def _dsa() -> Site:
    source.find(DSA).require(DSA_TOPK, DSA_PARAMETERS)
    return Site(DSA_TOPK, None, (f"{DSA}.{DSA_TOPK}",))
