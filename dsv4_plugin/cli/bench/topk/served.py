"""What a call costs where a server makes it.

There a layer's other kernels, and the weights they read, have taken the caches since the last
call: the kernel's own code comes from memory, and so do the lengths. Only the scores have just
been written. So, in a CUDA graph, again and again: the L2 is overwritten, other kernels take the
instruction caches, the scores are written, the call follows. What the graph takes longer than
without the call is what the call costs, its launch included.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import topk
from dsv4_plugin.cli.checks.timing import FLUSH_BYTES, time_calls
from dsv4_plugin.cli.checks.topk_cases import DTYPES

__all__ = ["Elsewhere"]

LAUNCHES = 8
ROUNDS = 3  # with and without in turn; the median difference counts


class Elsewhere:
    """The work between two calls: other memory, other code.

    The code is this package's own for all dtypes but that of the call: together these kernels are
    several times larger than an instruction cache.
    """

    def __init__(self, device: str) -> None:
        """Make the tensors of that work."""
        cuda = device == "cuda"
        self.device = device
        self.memory = torch.empty(FLUSH_BYTES if cuda else 64, dtype=torch.uint8, device=device)
        self._calls: list[tuple[str, Callable[[], Any]]] = []
        for name, dtype in DTYPES.items():
            for rows, columns in ((1, 8192), (1, 65_536), (8, 131_072)) if cuda else ((1, 64),):
                scores = torch.randn(rows, columns, device=device).to(dtype)
                lengths = torch.full((rows,), columns, dtype=torch.int32, device=device)
                out = torch.empty(rows, 512, dtype=torch.int32, device=device)
                call = functools.partial(topk, scores, lengths, 512, out=out)
                self._calls.append((name, call))

    def between(self, dtype: str) -> None:
        """Do what lies between two calls of a ``dtype``."""
        self.memory.zero_()
        for name, other in self._calls:
            if name != dtype:
                other()

    def served_us(
        self,
        dtype: str,
        call: Callable[[], Any],
        scores: torch.Tensor,
        source: torch.Tensor,
        *,
        replays: int,
    ) -> float:
        """Return microseconds of ``call`` where ``scores`` was just copied from ``source``."""

        def without() -> None:
            self.between(dtype)
            scores.copy_(source)

        def together() -> None:
            without()
            call()

        def us(work: Callable[[], None]) -> float:
            return time_calls([work], self.device, launches=LAUNCHES, replays=replays)

        return statistics.median(us(together) - us(without) for _ in range(ROUNDS))
