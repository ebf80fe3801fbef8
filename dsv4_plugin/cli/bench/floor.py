"""The time that no top-k can beat: one pass over the scores; and the rate of the memory.

The floor of a cell is a kernel that reads every score of every row once and writes one maximum per
block. It includes the launch, but no programmatic dependent launch and no final reduction. The best
of a few grids counts. It is timed like everything else: in a CUDA graph, warm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.cli.checks.topk_cases import Problem

__all__ = ["copy_rate", "floor_us", "method", "read_rate"]

_ROOF_ROWS, _ROOF_COLUMNS = 1024, 1 << 18  # 1 GiB of float32


@functools.cache
def _kernel() -> Any:
    try:
        from dsv4_plugin.cli.bench.read_kernel import read_rows
    except ImportError:
        return None
    return read_rows


def method(device: str | torch.device) -> str:
    """Describe what :func:`floor_us` measures on this device."""
    if torch.device(device).type == "cuda" and _kernel() is not None:
        return "a Triton kernel that reads every score once, best of three grids, launch included"
    return "torch.amax over the rows, launch included"


def _readers(problem: Problem) -> list[Callable[[], Any]]:
    """Return several ways to read every score once."""
    logits, columns = problem.logits, int(problem.lengths.max())
    ragged = problem.row_starts is not None
    kernel = _kernel()
    if logits.device.type != "cuda" or kernel is None:
        return [functools.partial(torch.amax, logits[:, :columns], 1)]
    rows = logits.shape[0]
    sms = torch.cuda.get_device_properties(logits.device).multi_processor_count
    grids = {max(1, min(-(-sms * n // rows), columns // 1024)) for n in (1, 2, 4)}
    readers: list[Callable[[], Any]] = []
    for parts in sorted(grids):
        chunk = -(-columns // parts)
        block = 2048 if chunk < 8192 else 8192
        chunk = -(-chunk // block) * block
        parts = -(-columns // chunk)
        out = torch.empty(rows, parts, device=logits.device)
        readers.append(functools.partial(
            kernel[(parts, rows)], logits, problem.starts, problem.lengths, out, logits.stride(0),
            columns, chunk, RAGGED=ragged, BLOCK=block, num_warps=8,
        ))  # fmt: skip
    return readers


def floor_us(problem: Problem, *, launches: int = 40, replays: int = 5) -> float:
    """Return the microseconds of one pass over the problem's scores."""
    device = problem.logits.device
    return min(
        time_calls([reader], device, launches=launches, replays=replays)
        for reader in _readers(problem)
    )


def read_rate(device: str | torch.device) -> float:
    """Measure the rate of a read-only pass over 1 GiB, in bytes per microsecond."""
    gpu = torch.device(device).type == "cuda"
    rows, columns = (_ROOF_ROWS, _ROOF_COLUMNS) if gpu else (64, 1 << 14)
    x = torch.zeros(rows, columns, device=device)
    lengths = torch.full((rows,), columns, dtype=torch.int32, device=device)
    return x.numel() * x.element_size() / floor_us(Problem(x, lengths), launches=5, replays=7)


def copy_rate(device: str | torch.device) -> float:
    """Measure the rate of a copy of 1 GiB, read and written, in bytes per microsecond."""
    source = torch.zeros(1 << (28 if torch.device(device).type == "cuda" else 20), device=device)
    target = torch.empty_like(source)
    # Use a kernel: a copy node of the graph would use the copy engine, which is slower.
    us = time_calls([lambda: torch.mul(source, 2.0, out=target)], device, launches=5, replays=7)
    return 2 * source.numel() * source.element_size() / us
