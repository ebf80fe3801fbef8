"""Shared by both parts of the driver: the record of one part, and the time of a single call."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Part", "Row", "eager_us"]

Row = dict[str, Any]


@dataclasses.dataclass
class Part:
    """One step of a run; ``run`` returns its results."""

    name: str
    run: Callable[[], list[Row]]

    def __str__(self) -> str:
        """Return its name."""
        return self.name


def eager_us(call: Callable[[], Any], device: str) -> float:
    """Return microseconds of one call by the wall clock: on a GPU the median of five."""
    times = []
    for _ in range(5 if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)
