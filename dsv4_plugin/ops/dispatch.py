"""The one dispatch: which implementations exist, what each supports, and which one a call gets.

``auto`` takes the first of :data:`ORDER` that supports the call. It looks at the shape, dtype and
device of a call, never at data. An explicit choice is either met or refused with every unmet
condition.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv4_plugin import log
from dsv4_plugin.envs import value
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.kernels.arguments import MAX_K
from dsv4_plugin.kernels.device import capability

__all__ = ["ORDER", "Call", "choose", "resolve", "unmet"]

ORDER = ("cuda", "triton", "torch")


class Call(NamedTuple):
    """What a choice depends on: the op, and the shape, dtype and device of the call."""

    op: str
    device: torch.device
    dtype: torch.dtype | None = None
    k: int = 0
    head_dim: int = 128
    heads: int = 64
    block_size: int = 64  # only the logits look at it; the reads take any size
    piece: int = 8  # keys per block of candidates
    candidates: int = 0  # blocks of candidates per row
    fp4: bool = False  # the logits' keys are FP4
    alignment: int = 16  # in bytes, of every row that is read or written in vectors


_CUDA, _TRITON = "dsv4_plugin.kernels.cuda", "dsv4_plugin.kernels.triton_cache"
_REFERENCE = "dsv4_plugin.kernels.reference"
_LOGITS_REFERENCE = "dsv4_plugin.kernels.reference_logits"
_CANDIDATES_REFERENCE = "dsv4_plugin.kernels.reference_candidates"


def _forms(function: str, reference: str, *backends: str) -> dict[str, str]:
    """Return where a function is, ``module:function``, by backend; ``reference`` has torch's."""
    modules = {"cuda": _CUDA, "triton": _TRITON, "torch": reference}
    return {name: f"{modules[name]}:{function}" for name in backends}


# op → backend → "module:function". A missing entry means that the backend does not have the op.
_FORMS: dict[str, dict[str, str]] = {
    "topk": _forms("topk", _REFERENCE, "cuda", "torch"),
    "read": _forms("read_indexer_cache", _REFERENCE, *ORDER),
    "read_mxfp4": _forms("read_indexer_cache_mxfp4", _REFERENCE, "triton", "torch"),
    "gather": _forms("gather_indexer_cache", _REFERENCE, *ORDER),
    "paged_logits": _forms("paged_logits", _LOGITS_REFERENCE, "cuda", "torch"),
    "ragged_logits": _forms("ragged_logits", _LOGITS_REFERENCE, "cuda", "torch"),
    **{
        op: _forms(op, _CANDIDATES_REFERENCE, "cuda", "torch")
        for op in ("block_maxima", "select_blocks", "candidate_logits", "candidate_logits_ragged",
                   "candidate_select", "select_candidates")
    },
}  # fmt: skip


_READS = ("read", "read_mxfp4", "gather")
# computed by the matrix unit, from pages
_PAGED = ("paged_logits", "block_maxima", "candidate_logits", "candidate_select")


def _unmet_cuda(call: Call) -> list[str]:
    from dsv4_plugin.kernels import cuda

    reasons = []
    if call.device.type != "cuda":
        reasons.append(f"the tensors are on {call.device}, not on a CUDA device")
    elif torch.version.hip is not None:
        reasons.append("this torch is built for ROCm")
    elif capability(call.device) not in cuda.CAPABILITIES:
        have = ".".join(map(str, capability(call.device)))
        want = ", ".join(f"{a}.{b}" for a, b in cuda.CAPABILITIES)
        reasons.append(f"the GPU has compute capability {have}, the kernels need {want}")
    missing = cuda.missing()
    if missing:
        reasons.append(missing)
    if call.k > MAX_K:
        reasons.append(f"k is {call.k}, more than {MAX_K}")
    if call.head_dim != cuda.HEAD_DIM:
        reasons.append(f"head_dim is {call.head_dim}, the kernels need {cuda.HEAD_DIM}")
    heads, sizes = cuda.FP4_FORM if call.fp4 else (cuda.HEADS, cuda.BLOCK_SIZES)
    of = " for FP4 keys" if call.fp4 else ""
    if call.heads not in heads:
        want = " or ".join(map(str, heads))
        reasons.append(f"q has {call.heads} heads, the kernels need {want}{of}")
    if call.op in _PAGED and call.block_size not in sizes:
        want = " or ".join(map(str, sizes))
        reasons.append(f"block_size is {call.block_size}, the kernel needs {want}{of}")
    if call.piece != cuda.PIECE:
        reasons.append(f"piece is {call.piece}, the kernels need {cuda.PIECE}")
    if call.candidates > cuda.MAX_CANDIDATES:
        reasons.append(f"a row has {call.candidates} candidates, more than {cuda.MAX_CANDIDATES}")
    if call.alignment < cuda.ALIGNMENT:
        what = "pages or output rows" if call.op in _READS else "pages, keys or queries"
        reasons.append(
            f"{what} start at multiples of {call.alignment} bytes, the kernels need "
            f"{cuda.ALIGNMENT}"
        )
    return reasons


def _unmet_triton(call: Call) -> list[str]:
    try:
        from dsv4_plugin.kernels import triton_cache
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]
    if call.device.type == "cuda":
        if capability(call.device) < (8, 0):
            have = ".".join(map(str, capability(call.device)))
            return [f"the GPU has compute capability {have}, the Triton kernels need 8.0"]
    elif not triton_cache.INTERPRETED:
        return [f"the tensors are on {call.device}, not on a CUDA device"]
    return []


_UNMET: dict[str, Callable[[Call], list[str]]] = {
    "cuda": _unmet_cuda,
    "triton": _unmet_triton,
    "torch": lambda call: [],
}


def unmet(call: Call, backend: str) -> list[str]:
    """Return every reason why ``backend`` cannot serve ``call``; an empty list if it can."""
    if backend not in ORDER:
        return [f"{backend!r} is no backend; there are {', '.join(ORDER)}"]
    if backend not in _FORMS[call.op]:
        return [f"{call.op} has no {backend} implementation; it has {', '.join(_FORMS[call.op])}"]
    return _UNMET[backend](call)


def choose(call: Call, backend: str = "auto") -> str:
    """Return the name of the backend that serves ``call``.

    Raises:
        UnmetError: ``backend`` is explicit and cannot serve the call.
    """
    if backend != "auto":
        reasons = unmet(call, backend)
        if reasons:
            raise UnmetError(f"backend {backend!r} for {call.op}", reasons)
        return backend
    passed: list[str] = []
    for name in ORDER:
        if name in _FORMS[call.op]:
            reasons = unmet(call, name)
            if not reasons:
                return name
            passed.append(f"not {name}: {', '.join(reasons)}")
    raise UnmetError(call.op, passed)


def _tell(call: Call, asked: str, chosen: str) -> None:
    """Log which implementation a form of call gets, and why an earlier one was passed over."""
    # a wrong setting is an error where the setting counts, not here
    with contextlib.suppress(SettingError):
        if value("log") == "debug":
            log.configure("debug")  # outside an engine the level is not configured yet
    if log.tells_everything():
        better = [b for b in ORDER[: ORDER.index(chosen)] if b in _FORMS[call.op]]
        passed = [
            f"not {b}: {', '.join(unmet(call, b)) or f'{asked} was asked for'}" for b in better
        ]
        form = f"{call.dtype}".removeprefix("torch.") + (f", k {call.k}" if call.k else "")
        by = "" if asked == "auto" else f", as {asked} was asked for"
        log.debug(
            f"first use of {call.op} on {call.device} ({form}): {chosen}{by}"
            + (f" ({'; '.join(passed)})" if passed else "")
        )


@functools.lru_cache(maxsize=1024)
def _load(call: Call, backend: str) -> Callable[..., Any]:
    chosen = choose(call, backend)
    _tell(call, backend, chosen)
    module, _, function = _FORMS[call.op][chosen].partition(":")
    return getattr(importlib.import_module(module), function)


def resolve(call: Call, backend: str | None = None, *, has_keys: bool = True) -> Callable[..., Any]:
    """Return the function that serves ``call``.

    ``backend`` ``None`` means the setting ``DSV4_BACKEND``. The setting binds every op that has an
    implementation of that kind; an explicit ``backend`` binds in any case. Without ``has_keys``
    there is no memory that a kernel could be pointed at. The reference then serves the call,
    provided that the choice could be met.

    Raises:
        UnmetError: an explicit choice cannot be met; the message has every reason.
    """
    if backend is None:
        backend = value("backend")
        if backend not in _FORMS[call.op]:
            backend = "auto"
    run = _load(call, backend)
    return run if has_keys else _load(call, "torch")
