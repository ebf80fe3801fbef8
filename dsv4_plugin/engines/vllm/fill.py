"""The replacement for vLLM's indexer op: it identifies the layer and the rows, and skips the fill.

It tells the kind of the calling layer, and the requests of a decode batch.

vLLM fills every row with -1 before every selection. The op has an argument that omits the fill, and
the layer never passes it. The plugin passes it for a batch that has only decode rows, because its
top-k then writes every slot of every row. If vLLM's own code selects after all, the plugin fills
the rows first (:func:`fill_skipped_rows`). ``docs/development/vllm.md`` says in which batches the
top-k may leave a row unwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import KS
from dsv4_plugin.engines.vllm import layers
from dsv4_plugin.engines.vllm.adapter import VllmAdapter
from dsv4_plugin.engines.vllm.context import Requests, forward_pass
from dsv4_plugin.engines.vllm.probe import SKIP_FILL
from dsv4_plugin.state import state

__all__ = ["fill_skipped_rows", "run_op"]


def run_op(op: Any, at: Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the op; ``at`` is the position of each of its arguments.

    The decision of this kind of layer holds for the calls inside the op.
    """
    now = adapter.current()
    call = now.call

    def given(name: str) -> Any:
        place = at.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    if now.kinds:
        call.kind = now.kinds.get(layers.key_of_call(given))
    metadata, mode = _batch(given)
    call.requests = _requests(now, metadata, mode)
    try:
        if given(SKIP_FILL) or not _every_row_is_selected(now, given, metadata, mode):
            return op(*args, **kwargs)
        place = at[SKIP_FILL]
        if len(args) > place:
            args = (*args[:place], True, *args[place + 1 :])
        else:
            kwargs = {**kwargs, SKIP_FILL: True}
        state.count("topk.unfilled")
        call.fill_skipped = True
        return op(*args, **kwargs)
    finally:
        call.fill_skipped = False
        call.gather = call.kind = call.requests = None


def fill_skipped_rows(out: Any) -> None:
    """Fill the rows that vLLM's own selection is about to write, if their fill was omitted."""
    if adapter.current().call.fill_skipped and isinstance(out, torch.Tensor):
        out.fill_(-1)


def _every_row_is_selected(
    now: adapter.Adapter, given: Callable[[str], Any], metadata: Any, mode: str | None
) -> bool:
    """Whether the plugin's top-k will write all rows of the batch; reads only host data."""
    selection = now.in_force().selection
    if selection is None or not selection.skip_fill:
        return False
    buffer, hidden, k = given("topk_indices_buffer"), given("hidden_states"), given("topk_tokens")
    if (
        k not in KS
        or not isinstance(buffer, torch.Tensor)
        or not isinstance(hidden, torch.Tensor)
        or buffer.dim() != 2
        or buffer.shape[1] != k
        or not now.intact("topk.decode")
    ):
        return False
    decode = getattr(metadata, "decode", None)
    if mode not in ("NONE", "FULL") or decode is None:
        return False
    rows, requests = metadata.num_decode_tokens, decode.decode_lens.shape[0]
    return bool(
        metadata.num_prefills == 0
        and metadata.num_decodes > 0
        and rows == hidden.shape[0]
        and not decode.requires_padding
        and requests > 0
        and rows % requests == 0
        and decode.global_seq_lens is None
    )


def _batch(given: Callable[[str], Any]) -> tuple[Any, str | None]:
    """Return vLLM's metadata of the batch, and the mode in which CUDA graphs run it."""
    context = forward_pass()
    mode = getattr(getattr(context, "cudagraph_runtime_mode", None), "name", None)
    metadata_of = getattr(context, "attn_metadata", None)
    if not isinstance(metadata_of, dict):
        return None, mode
    return metadata_of.get(layers.plain_name(given("k_cache_prefix"))), mode


def _requests(now: adapter.Adapter, metadata: Any, mode: str | None) -> Requests | None:
    """Return the requests of the rows, if vLLM has made a request of each row; host data only.

    Without a kernel for this number of rows a request (on Hopper: all but 1, 2 and 4) vLLM repeats
    a request's block table for each row. From 0.30 on its metadata say how many rows every request
    has. This holds for every replay of a full graph if such graphs are captured for uniform batches
    only. Under adaptive verification only the device knows the numbers of rows.
    """
    decode: Any = getattr(metadata, "decode", None)
    rows = getattr(decode, "write_max_decode_len", 0)
    if (
        rows < 2
        or not decode.decode_is_uniform
        or decode.requires_padding
        or decode.global_seq_lens is not None
        or getattr(decode, "indices", None) is not None
        or decode.decode_lens.shape[0] != metadata.num_decode_tokens
        or metadata.num_decodes * rows != metadata.num_decode_tokens
        or not isinstance(now, VllmAdapter)
        or any(_rows_vary(config, mode) for config in now.configs)
    ):
        return None
    table = getattr(metadata, "block_table", None)
    return Requests(rows, None if table is None else table[: metadata.num_decodes])


def _rows_vary(config: Any, mode: str | None) -> bool:
    """Whether a batch may have other numbers of rows than its metadata, or than its graph."""
    speculative = getattr(config, "speculative_config", None)
    graphs = getattr(getattr(config, "compilation_config", None), "cudagraph_mode", None)
    return bool(getattr(speculative, "enable_adaptive_verification", False)) or (
        mode == "FULL" and (graphs is None or graphs.mixed_mode().name == "FULL")
    )
