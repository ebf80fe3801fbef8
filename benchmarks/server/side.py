"""The code that runs inside every server that is measured, for every engine.

:mod:`.server` puts :mod:`.vllm_side`, :mod:`.sglang_side` or :mod:`.tokenspeed_side`, an entry
point of the engine's plugins, on the path of the servers that it starts and nowhere else. The two
sides exchange files in the folder ``E2E_DIR``:

``options.json``
    ``weights``: fill the weights with random values of a useful size (the engines' own are ±1e-3,
    which FP8 rounds to zero). ``fast_start``: omit a warm-up that this model does not need.
``copy``
    While this file exists, the server makes contexts by copying (:mod:`.vllm_side`).
``memory-<pid>.json``
    torch's GPU memory in a process with the model, written whenever it changes.
``rows-<pid>.json``
    How many rows the plugin got under each name of its counters, and how the engine shares rows
    among the ranks, written whenever it changes.

The plugin writes its own status file (``DSV4_STATUS_DIR``) whenever a counter changes.

``E2E_FAULT`` breaks one part of the plugin, for drills (:mod:`.drills`). The name of an op
(``topk``, ``logits``, ``gather``, ``block_maxima``, ``select_blocks``,
``candidate_select``) makes that op raise at every call. ``capability`` makes the plugin see a GPU
of compute capability 7.5. The side of an engine has further faults.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_plugin import state, status_file

__all__ = ["COPY", "FAULTS", "OPTIONS", "break_op", "fill", "folder", "options", "tally", "watch"]

OPTIONS = "options.json"
COPY = "copy"
EVERY_S = 1.0
FAULTS = {
    "topk": ("dsv4_plugin", "topk"),
    "logits": ("dsv4_plugin.ops.logits", "paged_logits"),
    "gather": ("dsv4_plugin", "gather_indexer_cache"),
    "block_maxima": ("dsv4_plugin.ops.candidates", "block_maxima"),
    "select_blocks": ("dsv4_plugin.ops.candidates", "select_blocks"),
    "candidate_select": ("dsv4_plugin.ops.candidates", "candidate_select"),
    "capability": ("dsv4_plugin.ops.dispatch", "capability"),
}

tally: Counter[str] = Counter()  # rows in this process, by the name of the counter


def folder() -> Path | None:
    """Return the folder of a server that is measured, or None in any other."""
    named = os.environ.get("E2E_DIR")
    return Path(named) if named else None


def options() -> dict[str, Any]:
    """Return the options that :mod:`.server` wrote for this server."""
    found = folder()
    return json.loads((found / OPTIONS).read_text()) if found else {}


def break_op(fault: str) -> None:
    """Make an op of the plugin raise, or make the GPU look like another one."""
    module, name = FAULTS[fault]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"drill: {fault}")

    value = (lambda device: (7, 5)) if fault == "capability" else fail
    setattr(importlib.import_module(module), name, value)


def fill(name: str, tensor: Any, experts: int, seed: int) -> None:
    """Fill one tensor so that activations stay near 1; the same values for the same ``seed``.

    A matrix gets a standard deviation of 1/√inputs. FP8 and FP4 matrices get it by their scales
    (2⁻⁶, 2⁻⁷: powers of two, as in the checkpoint). Norms and the scales of a cache get 1, biases
    and sinks 0. Integer tables (which experts a token goes to) get different experts in each row.
    """
    import torch

    if tensor.device.type == "meta" or tensor.numel() == 0:
        return
    g = torch.Generator(device=tensor.device).manual_seed(seed)
    with torch.no_grad():
        if tensor.dtype == torch.uint8:  # packed FP4, and its scales
            if "scale" in name:
                tensor.fill_(127 - 7)
            else:
                tensor.random_(0, 256, generator=g)
        elif tensor.dtype == torch.float8_e8m0fnu:
            tensor.view(torch.uint8).fill_(127 - 6)
        elif "weight_scale" in name:  # SGLang has these in float32
            tensor.fill_(2**-6)
        elif tensor.dtype == torch.float8_e4m3fn:
            for part in tensor if tensor.dim() == 3 else (tensor,):
                values = torch.randn(part.shape, device=tensor.device, generator=g)
                part.copy_(values.to(tensor.dtype))
        elif not tensor.is_floating_point():
            if tensor.dim() == 2:
                rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
                columns = torch.arange(tensor.shape[1], device=tensor.device)[None, :]
                tensor.copy_((rows + columns) % experts)
            else:
                tensor.zero_()
        elif any(part in name for part in ("base", "bias", "sink")):
            tensor.zero_()
        elif "ape" in name:
            tensor.normal_(0, 0.1, generator=g)
        elif tensor.dim() >= 2:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=g)
        else:
            tensor.fill_(1)


def _fault() -> str:
    return os.environ.get("E2E_FAULT", "")


def asked_fault(*more: str) -> str:
    """Return the fault of this server, or ``""``; ``more`` are the faults of the engine's side.

    Raises:
        ValueError: there is no such fault.
    """
    known, fault = ("", *FAULTS, *more), _fault()
    if fault not in known:
        said = ", ".join(map(repr, known[1:]))
        raise ValueError(f"E2E_FAULT is {fault!r}; it can be {said}")
    return fault


@functools.cache
def watch(each: Callable[[], None] = lambda: None) -> None:
    """Set up a process with the model, once: apply the fault of the drill, and start reporting.

    ``each`` is called before every report.
    """
    if (fault := _fault()) in FAULTS:
        break_op(fault)
    count = state.State.count

    @functools.wraps(count)
    def counted(self: Any, name: str, rows: int = 1) -> None:
        tally[name] += rows
        count(self, name, rows)

    state.State.count = counted  # type: ignore[method-assign]
    threading.Thread(target=_report, args=(folder(), each), daemon=True, name="e2e-status").start()


def _report(where: Path, each: Callable[[], None]) -> None:
    said: dict[str, Any] = {}
    while True:
        each()
        told = {"memory": _memory(), "rows": dict(tally) or None}
        for name, now in told.items():
            if now is not None and now != said.get(name):
                file = where / f"{name}-{os.getpid()}.json"
                part = file.with_suffix(".part")
                part.write_text(json.dumps(now, indent=1) + "\n")
                part.replace(file)
                said[name] = now
        now = state.state.report()
        if now["engine"] is not None and now != said.get("status"):
            status_file.publish(state.state.report)
            said["status"] = now
        time.sleep(EVERY_S)


def _memory() -> dict[str, float] | None:
    """Return torch's GPU memory in GiB; None in a process that does not use the GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    kinds = ("allocated_bytes", "reserved_bytes")
    stats = torch.cuda.memory_stats()
    return {
        f"{kind.partition('_')[0]}{suffix}_gib": round(stats[f"{kind}.all.{which}"] / 2**30, 3)
        for kind in kinds
        for which, suffix in (("current", ""), ("peak", "_peak"))
    }
