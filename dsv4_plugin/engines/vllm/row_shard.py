"""Shards the rows of a prefill among tensor-parallel ranks in vLLM up to 0.31; 0.32 does it itself.

vLLM's metadata builder cuts the prefill of a step into chunks, once for all layers. The plugin
narrows the chunks to this rank's slice (:func:`narrow`) and appends a chunk without rows. For each
chunk vLLM's indexer calls ``_merge_dcp_topk_global``, which does nothing without decode context
parallelism. At the call for the appended chunk the plugin gathers (:func:`gather`). Two ranks may
have different chunks: only the slices matter, and each layer has one gather.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dsv4_plugin.engines.shared.row_shard import SETTING, Group, Shard, exchange, join, shard
from dsv4_plugin.engines.vllm.adapter import current
from dsv4_plugin.engines.vllm.layers import Layer
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.state import state

__all__ = ["gather", "group", "narrow", "unmet"]

_ATTRIBUTE = "_dsv4_shard"


def unmet(config: Any, platform: Any, layers: Iterable[Layer]) -> list[str]:
    """Return why this configuration excludes sharding; the same on every rank."""
    import vllm.envs

    parallel: Any = getattr(config, "parallel_config", None)
    if parallel is None:
        return ["vLLM shows no configuration"]
    ranks = parallel.tensor_parallel_size
    why = [] if ranks > 1 else [f"tensor_parallel_size is {ranks}: there is no other rank"]
    if platform is None or not platform.is_cuda():
        why.append("vLLM does not run on CUDA")
    for name in (
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
    ):  # fmt: skip
        size = getattr(parallel, name, 1)
        why += [f"{name} is {size}, not 1"] if size != 1 else []
    if getattr(parallel, "use_ubatching", False):
        why.append("two halves of a batch run at once (enable_dbo)")
    why += [
        f"{name} is set"
        for name in ("VLLM_BATCH_INVARIANT", "VLLM_USE_NCCL_SYMM_MEM")
        if getattr(vllm.envs, name, False)
    ]
    graphs = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
    if graphs is not None and graphs.mixed_mode().name == "FULL":
        why.append(f"cudagraph_mode is {graphs.name}: prefills run in full CUDA graphs")
    draft = getattr(getattr(config, "speculative_config", None), "draft_parallel_config", None)
    if draft is not None and draft.tensor_parallel_size != ranks:
        why.append(f"the draft model has {draft.tensor_parallel_size} tensor-parallel ranks")
    if any(layer.candidates for layer in layers):
        why.append("DeepSeek-V4.1's candidate blocks stay whole on every rank")
    return why


def group() -> Group:
    """Return vLLM's tensor-parallel group, once its ranks have agreed to shard.

    Raises:
        UnmetError: they have not.
    """
    from vllm.distributed.parallel_state import get_tp_group

    return join(get_tp_group())


# --- a step --------------------------------------------------------------------------------------


def narrow(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a step's metadata, and narrow its prefill chunks to the rows of this rank."""
    made, now = original(self, *args, **kwargs), current()
    # A subclass of vLLM's builder belongs to other layers, which read the chunks in another way.
    if now.group is None or type(self).__name__ != "DeepseekV32IndexerMetadataBuilder":
        return made
    if not now.intact("shard"):
        raise UnmetError(SETTING, now.problems("shard"))
    if made.prefill is None or not made.prefill.chunks:
        return made
    common: Any = kwargs.get("common_attn_metadata", args[1] if len(args) > 1 else None)
    begin, end = made.num_decodes, made.num_decodes + made.num_prefills
    starts = common.query_start_loc_cpu[begin : end + 1]
    cut = shard(
        now.group, starts.diff(), common.seq_lens_cpu_upper_bound[begin:end], self.compress_ratio,
        max((seen.k for seen in now.layers.values()), default=0), int(starts[0]),
    )  # fmt: skip
    if cut is not None:
        made.prefill.chunks = _chunks(made.prefill.chunks, cut)
    return made


def _chunks(chunks: list[Any], cut: Shard) -> list[Any]:
    """Return the chunks with the rows of this rank alone, and one without rows at the end.

    A chunk that skips the gather of the keys reads the keys that the chunk before it gathered. If
    this rank does not have that chunk, the chunk gathers the keys itself.
    """
    narrowed, gathered = [], False
    for chunk in chunks:
        gathered = gathered and chunk.skip_kv_gather
        rows = cut.within(slice(chunk.token_start, chunk.token_end))
        if rows.start < rows.stop:
            narrowed.append(
                dataclasses.replace(
                    chunk,
                    token_start=chunk.token_start + rows.start,
                    token_end=chunk.token_start + rows.stop,
                    cu_seqlen_ks=chunk.cu_seqlen_ks[rows],
                    cu_seqlen_ke=chunk.cu_seqlen_ke[rows],
                    skip_kv_gather=gathered,
                )
            )
            gathered = True
    first, none = cut.bounds[0], chunks[-1].cu_seqlen_ks[:0]
    setattr(none, _ATTRIBUTE, cut)
    last = dataclasses.replace(
        chunks[-1], token_start=first, token_end=first, cu_seqlen_ks=none, cu_seqlen_ke=none,
        local_total_seq_lens=0, skip_kv_gather=True,
    )  # fmt: skip
    return [*narrowed, last]


def gather(
    original: Callable[..., Any], logits: torch.Tensor, indices: torch.Tensor, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Bring the indices of all rows to all ranks, at the call for a layer's appended chunk."""
    cut = getattr(kwargs.get("row_starts"), _ATTRIBUTE, None)
    if cut is None:
        return original(logits, indices, *args, **kwargs)
    # The appended chunk has no rows; its view begins at the prefill's first row in vLLM's buffer.
    rows = cut.every_row.stop - cut.every_row.start
    shape, stride = (rows, indices.shape[1]), indices.stride()
    exchange(cut, indices.as_strided(shape, stride, indices.storage_offset()))
    state.count("shard.gather")
    return None
