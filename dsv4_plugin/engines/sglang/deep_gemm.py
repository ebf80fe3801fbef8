"""DeepGEMM's logits functions in SGLang's indexer: replaced, asked for bfloat16, or unchanged."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dsv4_plugin import log
from dsv4_plugin.engines.sglang.probe import LOGITS
from dsv4_plugin.engines.sglang.row_shard import tagged
from dsv4_plugin.engines.shared import adapter, logits
from dsv4_plugin.engines.shared.decision import DTYPES, Selection
from dsv4_plugin.engines.shared.deep_gemm import has_logits_dtype
from dsv4_plugin.engines.shared.tensors import rows_of, saved_mib
from dsv4_plugin.state import state

__all__ = ["patch", "unmet"]

_PAGED = ("cache", "weights", "lengths", "table", "schedule", "columns", "clean_logits")
_DENSE = ("keys", "weights", "starts", "ends", "clean_logits", "max_seqlen_k")
_PAIRS = {name: name.replace("fp8_", "fp8_fp4_", 1) for name in LOGITS}


def unmet(ledger: Any, request_bf16: bool = False) -> list[str]:
    """Return why the plugin cannot wrap DeepGEMM's logits functions. It patches nothing.

    With ``request_bf16`` the functions must also be able to write bfloat16 on request.
    """
    try:
        import deep_gemm
    except Exception as error:
        return [f"deep_gemm cannot be imported ({type(error).__name__}: {error})"]
    for name, wide in _PAIRS.items():
        if not callable(vars(deep_gemm).get(name)):
            return [f"deep_gemm has no {name}"]
        if request_bf16 and not has_logits_dtype(vars(deep_gemm).get(wide)):
            return [f"deep_gemm.{wide} is missing or takes no logits_dtype"]
    if not all(patch.in_place for patch in ledger.patches):
        return ["deep_gemm was patched by other code since"]
    return []


def patch(ledger: Any) -> None:
    """Wrap DeepGEMM's logits functions, once."""
    import deep_gemm

    if ledger.patches:
        return
    for (name, wide), plugin in zip(_PAIRS.items(), (_plugin_paged, _plugin_dense), strict=True):
        wrapper = _wrapper(vars(deep_gemm)[name], vars(deep_gemm).get(wide), plugin)
        ledger.replace(deep_gemm, name, wrapper, f"deep_gemm.{name}")


def _wrapper(
    float32: Callable[..., Any],
    with_dtype: Callable[..., Any] | None,
    plugin: Callable[..., torch.Tensor | None],
) -> Callable[..., Any]:
    @functools.wraps(float32)
    def patched(q: Any, *args: Any, **kwargs: Any) -> Any:
        now = adapter.current()
        selection, rows = now.call.selection, now.call.rows
        own = None if rows is None else rows.next_scored(rows_of(q))
        if selection is None:
            return float32(q, *args, **kwargs)
        out, who = None, selection.logits
        if plugin is _plugin_dense and selection.prefill_logits:
            who = selection.prefill_logits
        asks = selection.request_bf16 or who != selection.logits
        if "topk" not in now.off:
            if who != "plugin" and asks and with_dtype and isinstance(q, torch.Tensor):
                if own is None or plugin is not _plugin_dense or len(args) < 4:
                    out = _in_bf16(now, with_dtype, q, args, kwargs)
                else:
                    keys, *of_rows = args[:4]
                    out = _of_rank(
                        own, selection, kwargs.get("max_seqlen_k") or 1,
                        lambda q, *of_rows: _in_bf16(
                            now, with_dtype, q, (keys, *of_rows, *args[4:]), kwargs
                        ),
                        q, *of_rows,
                    )  # fmt: skip
                if out is None:
                    now.call.selection = selection = _without_bf16(selection)
                    who = selection.logits
            if who == "plugin":
                out = _by_plugin(plugin, own, selection, q, args, kwargs)
            if "topk" in now.off:
                now.call.selection = None
        if out is None:
            state.count("logits.upstream", rows_of(q))
            out = float32(q, *args, **kwargs)
        return out

    return patched


def _by_plugin(
    plugin: Any, own: slice | None, selection: Selection, q: Any, args: Any, kwargs: Any
) -> Any:
    """Return the plugin's logits; None if the call has another form, or the kernel failed.

    ``own``: this rank's rows, if the rows of the call are sharded. Then the logits have only these.
    """
    try:
        return plugin(own, selection, q, *args, **kwargs)
    except Exception as error:
        logits.failed(error)
        return None


def _in_bf16(now: adapter.Adapter, with_dtype: Any, q: Any, args: Any, kwargs: Any) -> Any:
    """Return DeepGEMM's logits in bfloat16; None if the call failed.

    After a failure no later call asks for them. The top-k stays on.
    """
    try:
        out = with_dtype((q, None), *args, logits_dtype=torch.bfloat16, **kwargs)
    except Exception as error:
        if now.decision.strict:
            raise
        now.reselect(_without_bf16)
        why = f"DeepGEMM's bf16 logits failed at a call ({type(error).__name__}: {error})"
        state.fail("logits.bf16", why)
        log.once(logging.ERROR, f"{why}; the plugin selects on other logits from now on")
        return None
    state.count("logits.bf16", rows_of(q))
    state.peak("logits.saved_mib", saved_mib(out))
    return out


def _without_bf16(selection: Selection) -> Selection:
    """Return a selection that asks DeepGEMM for no bfloat16.

    The plugin's kernel writes the logits if it can, else DeepGEMM in float32.
    """
    if selection.logits == "plugin":
        return replace(selection, prefill_logits="")
    return replace(selection, dtype="fp32", request_bf16=False)


def _plugin_paged(
    own: slice | None, selection: Selection, q: Any, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    """Compute the logits of ``fp8_paged_mqa_logits``; None if the call has another form."""
    given = dict(zip(_PAGED, args, strict=False)) | kwargs
    known = set(_PAGED[:6]) <= set(given) <= set(_PAGED) and len(args) <= len(_PAGED)
    if not known or given.get("clean_logits"):
        return None
    cache, weights, lengths, table, columns = (
        given[name] for name in ("cache", "weights", "lengths", "table", "columns")
    )
    return _of_rank(
        own, selection, columns,
        lambda q, weights, lengths, table: logits.paged(
            selection, q, cache, weights, lengths, table, columns
        ),
        q, weights, lengths, table,
    )  # fmt: skip


def _plugin_dense(
    own: slice | None, selection: Selection, q: Any, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    """Compute the logits of ``fp8_mqa_logits``; None if the call has another form.

    The call must have ``max_seqlen_k``, as SGLang's calls do. Then rows begin at column zero.
    """
    given = dict(zip(_DENSE, args, strict=False)) | kwargs
    known = set(given) == set(_DENSE) and len(args) <= len(_DENSE)
    if not known or given["clean_logits"] or not given["max_seqlen_k"]:
        return None
    keys, weights, starts, ends, columns = (
        given[name] for name in ("keys", "weights", "starts", "ends", "max_seqlen_k")
    )
    return _of_rank(
        own, selection, columns,
        lambda q, weights, starts, ends: logits.dense(
            selection, q, keys, weights, starts, ends, columns
        ),
        q, weights, starts, ends,
    )  # fmt: skip


def _of_rank(
    own: slice | None,
    selection: Selection,
    columns: int,
    score: Callable[..., torch.Tensor | None],
    q: torch.Tensor,
    *of_rows: torch.Tensor,
) -> torch.Tensor | None:
    """Return ``score(q, *of_rows)``; of this rank's rows ``own`` if the call's are sharded.

    A rank without rows scores nothing.
    """
    if own is None:
        return score(q, *of_rows)
    if own.start == own.stop:
        return tagged(q.new_empty((0, columns), dtype=DTYPES[selection.dtype]), own)
    return tagged(score(q[own], *(x[own] for x in of_rows)), own)
