"""Who computes an engine's index logits: the kernels of this package, or its own DeepGEMM.

One decision for all adapters (:func:`choose`), and the calls of our ops on what the engines hand
their logits functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import backends, envs, log
from dsv4_plugin import logits as ops
from dsv4_plugin.engines.shared import decision, plan
from dsv4_plugin.engines.shared.plan import Topk
from dsv4_plugin.engines.shared.tensors import LENGTHS, dtype_name, saved_mib
from dsv4_plugin.envs import Settings
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.state import state

__all__ = ["AUTO", "choose", "dense", "failed", "paged", "unmet"]

# What DSV4_LOGITS=auto takes, the first that can write the dtype. In bfloat16 ours are faster for
# one request and level with DeepGEMM's for many (benchmarks/results/h200_logits.json). In float32
# the engine's come first all the same: then its scores stay what they are without the plugin.
AUTO: dict[str, tuple[str, ...]] = {
    "bf16": ("own", "host"),
    "fp16": ("own", "host"),
    "fp32": ("host", "own"),
}


def choose(
    settings: Settings, dtype: str, host: Callable[[], list[str]], own: Callable[[], list[str]]
) -> tuple[str, list[str]]:
    """Return who writes logits of ``dtype``, ``"host"`` or ``"own"``, and why it cannot be had.

    ``host`` and ``own`` return the reasons why either cannot; they are asked in order, and not
    needlessly.
    """
    reasons: list[str] = []
    for who in AUTO[dtype] if settings.logits == "auto" else (settings.logits,):
        why = host() if who == "host" else own()
        if log.tells_everything():
            said = f"no: {'; '.join(why)}" if why else "yes"
            log.debug(f"DSV4_LOGITS={settings.logits}, {dtype} logits by {who}: {said}")
        if not why:
            return who, []
        reasons += why
    return "host", reasons


def unmet(dtype: str, backend: str, device: torch.device) -> list[str]:
    """Return why our ops cannot write logits of ``dtype`` on ``device``, as far as is known yet.

    Heads and block size are known at the first call only.
    """
    why = [
        reason
        for op in ("paged_logits", "ragged_logits")
        for reason in backends.unmet(backends.Call(op, device, decision.DTYPES[dtype]), backend)
    ]
    return [f"own logits by {backend}: {reason}" for reason in decision.unique(why)]


def paged(
    topk: Topk, q: Any, cache: Any, weights: Any, lengths: Any, table: Any, columns: int
) -> torch.Tensor | None:
    """Return ``[rows, columns]`` logits of FP8 queries on FP8 pages; None: another form."""
    if not (
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
    ):
        return None
    out = ops.new_logits(weights.shape[0], columns, decision.DTYPES[topk.dtype], q.device)
    ops.paged_logits(
        q, cache, weights, lengths, table,
        block_size=cache.shape[1], out=out, backend=topk.backend,
    )  # fmt: skip
    return _counted(topk, out)


def dense(
    topk: Topk, q: Any, keys: Any, weights: Any, starts: Any, ends: Any, columns: int
) -> torch.Tensor | None:
    """Return ``[rows, columns]`` logits of gathered FP8 keys, each row from column zero.

    ``columns`` 0: as many as there are keys. None: the arguments have another form.
    """
    if not (
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
    ):
        return None
    columns = columns or keys[0].shape[0]
    out = ops.new_logits(q.shape[0], columns, decision.DTYPES[topk.dtype], q.device)
    ops.ragged_logits(
        q, keys[0], keys[1].reshape(-1), weights, starts, ends, out=out, backend=topk.backend
    )
    return _counted(topk, out)


def failed(error: Exception) -> None:
    """Raise ``error`` where somebody asked for what failed, else leave the selection upstream.

    One that is about the form of this call only (:class:`UnmetError`) changes nothing later: the
    engine's logits serve this call, in float32 even where its DeepGEMM could write bfloat16, and
    our top-k selects on these.
    """
    if plan.current().strict:
        raise error
    if isinstance(error, UnmetError):
        if envs.value("logits") == "own":
            raise error
        log.once(logging.INFO, f"{error}; the engine's own logits serve such calls, in float32")
    else:
        plan.switch_off("topk", error)


def _is(value: Any, dims: int, dtype: torch.dtype, packed: int = 1) -> bool:
    """Whether it is such a tensor, contiguous in its last ``packed`` dimensions."""
    if not (isinstance(value, torch.Tensor) and value.dim() == dims and value.dtype == dtype):
        return False
    step = 1
    for size, stride in zip(value.shape[: -packed - 1 : -1], value.stride()[::-1], strict=False):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _counted(topk: Topk, out: torch.Tensor) -> torch.Tensor:
    state.count("logits.own")
    state.count(f"logits.own.{dtype_name(out.dtype)}.{topk.backend}")
    if out.dtype != torch.float32:
        state.peak("logits.saved_mib", saved_mib(out))
    return out
