"""Timing of GPU work by replays of a CUDA graph: the median of several, warm or cold."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4_plugin.cli.checks.provenance import commit, output

__all__ = ["capture", "machine", "time_calls", "time_graph"]

FLUSH_BYTES = 256 << 20  # the L2 of an H200 holds 60 MB


def capture(calls: Sequence[Callable[[], Any]], launches: int) -> torch.cuda.CUDAGraph:
    """Return a graph of ``launches`` calls, taken from ``calls`` in turn; each runs once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compilation and lazy loading must happen before the capture
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    return graph


def time_graph(
    calls: Sequence[Callable[[], Any]],
    *,
    launches: int = 100,
    replays: int = 21,
    flush: bool = False,
) -> float:
    """Return microseconds per call of a graph of ``launches`` calls: the median of ``replays``.

    ``calls`` are taken in turn. One call measures warm caches. Several calls over different memory,
    together more than the L2 holds, measure cold caches. ``flush`` overwrites the L2 before each
    replay, outside the timed part. Then calls over different memory are cold even if that memory is
    small.
    """
    graph = capture(calls, launches)
    times = []
    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda") if flush else None
    for i in range(replays + 3):
        if other is not None:
            other.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1000 / launches)
    return statistics.median(times)


def time_calls(
    calls: Sequence[Callable[[], Any]],
    device: str | torch.device,
    *,
    launches: int = 40,
    replays: int = 7,
    flush: bool = False,
) -> float:
    """Return microseconds per call: :func:`time_graph` on a GPU, the wall clock elsewhere.

    Without a GPU this is a dry run of the benchmark: each call runs once, and the figure means
    nothing.
    """
    if torch.device(device).type == "cuda":
        return time_graph(calls, launches=launches, replays=replays, flush=flush)
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) * 1e6 / len(calls)


def machine() -> dict[str, Any]:
    """Return the facts about this machine that a result file must contain."""
    import dsv4_plugin

    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "plugin": dsv4_plugin.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": p.name,
            "sms": p.multi_processor_count,
            "driver": output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"
            ),
        }
    return about
