"""A call in a CUDA graph, for checks of the results of its replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["capture", "captured"]

T = TypeVar("T")


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a graph of ``call``, which runs once before, outside of the graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def captured(call: Callable[[], T], device: str) -> tuple[Callable[[], Any], T]:
    """Return a function that replays ``call``, and the answer whose tensors a replay writes.

    ``call`` runs once before the capture. Without a GPU a replay is a call, and its answer may be
    in other tensors.
    """
    if device != "cuda":
        return call, call()
    answers: list[T] = []
    graph = capture(lambda: answers.append(call()))
    return graph.replay, answers[-1]
