"""A call in a CUDA graph, for checks of what its replays give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["captured"]

T = TypeVar("T")


def captured(call: Callable[[], T], device: str) -> tuple[Callable[[], Any], T]:
    """Return what replays ``call``, and the answer whose tensors the replays write.

    It is called once before. Without a GPU a replay is a call, and may give other tensors.
    """
    answer = call()
    if device != "cuda":
        return call, answer
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = call()
    return graph.replay, answer
