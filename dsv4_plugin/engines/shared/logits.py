"""The writer of an engine's index logits: the plugin's kernels, or the engine's DeepGEMM.

:func:`choose` makes the choice for all adapters. The other functions call the plugin's ops on the
arguments that an engine passes to its logits functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4_plugin import envs, log
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import (
    DTYPES,
    Selection,
    backend_for_topk,
    unique,
    unmet_topk,
)
from dsv4_plugin.engines.shared.tensors import LENGTHS, dtype_name, saved_mib
from dsv4_plugin.envs import Settings
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.ops import dispatch as backends
from dsv4_plugin.ops import logits as ops
from dsv4_plugin.state import state

__all__ = [
    "AUTO", "choose", "dense", "failed", "is_gathered", "is_paged", "paged", "select", "unmet",
]  # fmt: skip

# The order of DSV4_LOGITS=auto: the first writer that supports the dtype. In bfloat16 the plugin's
# kernel is faster for one request and as fast as DeepGEMM for many
# (benchmarks/results/h200_logits.json). In float32 the engine comes first, so that its scores stay
# the same as without the plugin.
AUTO: dict[str, tuple[str, ...]] = {
    "bf16": ("plugin", "engine"),
    "fp16": ("plugin", "engine"),
    "fp32": ("engine", "plugin"),
}


def choose(
    settings: Settings, dtype: str, engine: Callable[[], list[str]], plugin: Callable[[], list[str]]
) -> tuple[str, list[str]]:
    """Return the writer of logits of ``dtype``, ``"engine"`` or ``"plugin"``, or why neither can.

    ``engine`` and ``plugin`` return the reasons why they cannot. They are called in the order of
    preference, the second only if the first has reasons.
    """
    reasons: list[str] = []
    for who in AUTO[dtype] if settings.logits == "auto" else (settings.logits,):
        why = engine() if who == "engine" else plugin()
        if log.tells_everything():
            said = f"no: {'; '.join(why)}" if why else "yes"
            log.debug(f"DSV4_LOGITS={settings.logits}, {dtype} logits by {who}: {said}")
        if not why:
            return who, []
        reasons += why
    return "engine", reasons


def select(
    settings: Settings,
    dtype: str,
    reasons: Sequence[str],
    calls: Sequence[tuple[torch.device, int]],
    engine: Callable[[], list[str]],
    plugin: Callable[[str], list[str]],
    asks: Callable[[], bool] = lambda: True,
) -> tuple[Selection | None, list[str]]:
    """Return how ``dtype`` can be selected, or every reason why it cannot.

    ``reasons`` are known already. ``calls`` are the devices and k. ``engine`` and ``plugin`` (with
    its backend) return why they cannot write the logits. ``asks`` tells whether the engine's
    DeepGEMM writes bfloat16 only on request.
    """
    backend = backend_for_topk(settings, any(device.type != "cpu" for device, _ in calls))
    unmet = [why for device, k in calls for why in unmet_topk(dtype, backend, device, k)]
    who, why = choose(settings, dtype, engine, lambda: plugin(backend))
    found = unique([*reasons, *unmet, *why])
    if found:
        return None, found
    return Selection(dtype, backend, dtype == "bf16" and who == "engine" and asks(), who), []


def unmet(
    dtype: str,
    backend: str,
    device: torch.device,
    which: Sequence[str] = ("paged_logits", "ragged_logits"),
) -> list[str]:
    """Return why the plugin cannot write logits of ``dtype`` on ``device``, as far as known.

    ``which`` are the ops that must write them. Heads and block size become known at the first call.
    """
    why = [
        reason
        for op in which
        for reason in backends.unmet(backends.Call(op, device, DTYPES[dtype]), backend)
    ]
    return [f"plugin's logits by {backend}: {reason}" for reason in unique(why)]


def paged(
    selection: Selection, q: Any, cache: Any, weights: Any, lengths: Any, table: Any, columns: int
) -> torch.Tensor | None:
    """Return ``[rows, columns]`` logits of FP8 queries on FP8 pages; None for another form."""
    if not is_paged(q, cache, weights, lengths, table):
        return None
    out = ops.new_logits(weights.shape[0], columns, DTYPES[selection.dtype], q.device)
    ops.paged_logits(
        q, cache, weights, lengths, table,
        block_size=cache.shape[1], out=out, backend=selection.backend,
    )  # fmt: skip
    return _counted(selection, out)


def is_paged(q: Any, cache: Any, weights: Any, lengths: Any, table: Any) -> bool:
    """Whether a call for logits has the form of the plugin's ops on pages."""
    return (
        _is(q, 4, torch.float8_e4m3fn, packed=2)
        and isinstance(cache, torch.Tensor)
        and cache.dtype == torch.uint8
        and cache.dim() in (3, 4)
        and cache.shape[-1] == q.shape[3] + 4
        and _is(weights, 2, torch.float32)
        and isinstance(lengths, torch.Tensor)
        and lengths.dtype in LENGTHS
        and _is(table, 2, torch.int32)
        and table.shape[0] == q.shape[0]
        and weights.shape[0] == q.shape[0] * q.shape[1]
    )


def dense(
    selection: Selection, q: Any, keys: Any, weights: Any, starts: Any, ends: Any, columns: int
) -> torch.Tensor | None:
    """Return ``[rows, columns]`` logits of gathered FP8 keys, each row from column zero.

    ``columns`` is the longest row, at least; 0 means that the engine does not say it. Returns None
    for arguments of another form.
    """
    if not is_gathered(q, keys, weights, starts, ends):
        return None
    count = keys[0].shape[0]
    out = ops.new_logits(q.shape[0], columns or count, DTYPES[selection.dtype], q.device)
    # A row that has all keys leaves none for other requests.
    ops.ragged_logits(
        q, keys[0], keys[1].reshape(-1), weights, starts, ends, one_request=columns >= count > 0,
        out=out, backend=selection.backend,
    )  # fmt: skip
    return _counted(selection, out)


def is_gathered(q: Any, keys: Any, weights: Any, starts: Any, ends: Any) -> bool:
    """Whether a call for logits has the form of the plugin's ops on gathered keys."""
    return (
        _is(q, 3, torch.float8_e4m3fn, packed=2)
        and isinstance(keys, tuple)
        and len(keys) == 2
        and _is(keys[0], 2, torch.float8_e4m3fn, packed=2)
        and keys[0].shape[1] == q.shape[2]
        and isinstance(keys[1], torch.Tensor)
        and keys[1].dtype == torch.float32
        and keys[1].is_contiguous()
        and keys[1].numel() == keys[0].shape[0]
        and _is(weights, 2, torch.float32)
        and all(
            isinstance(x, torch.Tensor)
            and x.dtype in LENGTHS
            and x.shape == q.shape[:1]
            and x.is_contiguous()
            for x in (starts, ends)
        )
    )


def failed(error: Exception) -> None:
    """Raise ``error`` if a setting demands what failed, otherwise leave the call to the engine.

    An error about the form of this call (:class:`UnmetError`) changes no later call. The engine
    writes the logits of this call, in float32 even if its DeepGEMM could write bfloat16, and the
    plugin's top-k selects on them. Any other error switches the top-k off.
    """
    now = adapter.current()
    if now.decision.strict:
        raise error
    if isinstance(error, UnmetError):
        if envs.value("logits") == "plugin":
            raise error
        log.once(logging.INFO, f"{error}; the engine's own logits serve such calls, in float32")
    else:
        now.switch_off("topk", error)


def _is(value: Any, dims: int, dtype: torch.dtype, packed: int = 1) -> bool:
    """Whether the value is such a tensor, contiguous in its last ``packed`` dimensions."""
    if not (isinstance(value, torch.Tensor) and value.dim() == dims and value.dtype == dtype):
        return False
    step = 1
    for size, stride in zip(value.shape[: -packed - 1 : -1], value.stride()[::-1], strict=False):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _counted(selection: Selection, out: torch.Tensor) -> torch.Tensor:
    rows = out.shape[0]
    state.count("logits.plugin", rows)
    state.count(f"logits.plugin.{dtype_name(out.dtype)}.{selection.backend}", rows)
    if out.dtype != torch.float32:
        state.peak("logits.saved_mib", saved_mib(out))
    return out
