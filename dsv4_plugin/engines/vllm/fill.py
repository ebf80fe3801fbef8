"""Leaving out the fill with -1 that vLLM runs before the selection, where every row is selected.

``vllm::sparse_attn_indexer`` has an argument for it, ``skip_topk_buffer_clear``, which the layer
never passes. Ours does, for a batch of nothing but decode rows: then our top-k writes every slot of
every row of the batch. Where it turns out at the call that vLLM's own selects after all, it gets
the fill it counts on first (:func:`make_up`).

The fill stays where a row may be left over: with a prefill in the batch (a prompt shorter than one
compressed key has no row of scores), with rows that pad a batch, and while pieces of a model are
captured, for what is kept then is called again with other batches.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from dsv4_plugin.engines.shared import plan
from dsv4_plugin.engines.vllm.engine_calls import by_name, forward_pass
from dsv4_plugin.state import state

__all__ = ["ARGUMENT", "NEEDED", "left_out", "make_up"]

ARGUMENT = "skip_topk_buffer_clear"
NEEDED = ("hidden_states", "k_cache_prefix", "topk_tokens", "topk_indices_buffer", ARGUMENT)


class _Left(threading.local):
    """Whether the call of the op below this frame leaves the fill out."""

    out = False


_left = _Left()


def left_out(packet: Any, names: tuple[str, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call the op, ``names`` its arguments, without the fill where nothing can be left over."""
    given = by_name(names, args, kwargs)
    if given.get(ARGUMENT) or not _every_row_is_selected(given):
        return packet(*args, **kwargs)
    at = names.index(ARGUMENT)
    if len(args) > at:
        args = (*args[:at], True, *args[at + 1 :])
    else:
        kwargs = {**kwargs, ARGUMENT: True}
    state.count("topk.unfilled")
    _left.out = True
    try:
        return packet(*args, **kwargs)
    finally:
        _left.out = False


def make_up(out: Any) -> None:
    """Fill the rows that vLLM's own selection is about to write, if their fill was left out."""
    if _left.out and isinstance(out, torch.Tensor):
        out.fill_(-1)


def _every_row_is_selected(given: dict[str, Any]) -> bool:
    """Whether our top-k will write all rows of the batch; asked of the host only."""
    from dsv4_plugin.engines.vllm import install

    topk = plan.current().topk
    buffer, hidden = given.get("topk_indices_buffer"), given.get("hidden_states")
    k = given.get("topk_tokens")
    if (
        topk is None
        or not topk.unfilled
        or k not in plan.KS
        or not isinstance(buffer, torch.Tensor)
        or not isinstance(hidden, torch.Tensor)
        or buffer.dim() != 2
        or buffer.shape[1] != k
        or not install.intact("topk.decode")
    ):
        return False
    context = forward_pass()
    mode = getattr(getattr(context, "cudagraph_runtime_mode", None), "name", None)
    layers = getattr(context, "attn_metadata", None)
    if mode not in ("NONE", "FULL") or not isinstance(layers, dict):
        return False
    name = given.get("k_cache_prefix")
    metadata = layers.get(getattr(name, "value", name))
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
