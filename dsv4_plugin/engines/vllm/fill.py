"""The stand-in for vLLM's indexer op: it tells the kind of layer, and skips the fill with -1.

vLLM fills every row with -1 before every selection. ``vllm::sparse_attn_indexer`` has an argument
that leaves the fill out, ``skip_topk_buffer_clear``, which the layer never passes. The plugin
passes it for a batch of nothing but decode rows: its top-k then writes every slot of every row.
Where it turns out at the call that vLLM's own code selects after all, the rows get the fill that it
counts on (:func:`fill_skipped_rows`).

The fill stays where a row may be left over: with a prefill in the batch (a prompt shorter than one
compressed key has no row of scores), with rows that pad a batch, and while pieces of a model are
captured, because those pieces are called again with other batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import KS
from dsv4_plugin.engines.vllm import layers
from dsv4_plugin.engines.vllm.context import forward_pass
from dsv4_plugin.engines.vllm.probe import SKIP_FILL
from dsv4_plugin.state import state

__all__ = ["fill_skipped_rows", "run_op"]


def run_op(op: Any, at: Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the op; ``at`` is the position of each of its arguments.

    For the calls below, the decision is that of this kind of layer.
    """
    now = adapter.current()
    call = now.call

    def given(name: str) -> Any:
        place = at.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    if now.kinds:
        call.kind = now.kinds.get(layers.key_of_call(given))
    try:
        if given(SKIP_FILL) or not _every_row_is_selected(now, given):
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
        call.gather = call.kind = None


def fill_skipped_rows(out: Any) -> None:
    """Fill the rows that vLLM's own selection is about to write, if their fill was left out."""
    if adapter.current().call.fill_skipped and isinstance(out, torch.Tensor):
        out.fill_(-1)


def _every_row_is_selected(now: adapter.Adapter, given: Callable[[str], Any]) -> bool:
    """Whether the plugin's top-k will write all rows of the batch; asked of the host only."""
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
    context = forward_pass()
    mode = getattr(getattr(context, "cudagraph_runtime_mode", None), "name", None)
    metadata_of = getattr(context, "attn_metadata", None)
    if mode not in ("NONE", "FULL") or not isinstance(metadata_of, dict):
        return False
    metadata = metadata_of.get(layers.plain_name(given("k_cache_prefix")))
    decode = getattr(metadata, "decode", None)
    if metadata is None or decode is None:
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
