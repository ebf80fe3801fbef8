"""The cost of a call under the conditions of a server.

In a server, a layer's other kernels and their weights have filled the caches since the last call.
The kernel's own code comes from memory, and so do the lengths. Only the scores have just been
written. The benchmark repeats this in a CUDA graph: it overwrites the L2, runs other kernels that
fill the instruction caches, writes the scores and makes the call. The cost of the call, with its
launch, is the time of this graph minus the time of a graph without the call.
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
ROUNDS = 3  # rounds with and without the call in turn; the median difference counts


class Elsewhere:
    """The work between two calls: other memory, other code.

    The other code is this package's kernels for all dtypes but that of the call. Together these
    kernels are several times larger than an instruction cache.
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
        """Run the work that lies between two calls of a ``dtype``."""
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
        """Return the microseconds of ``call`` just after ``scores`` was copied from ``source``."""

        def without() -> None:
            self.between(dtype)
            scores.copy_(source)

        def together() -> None:
            without()
            call()

        def us(work: Callable[[], None]) -> float:
            return time_calls([work], self.device, launches=LAUNCHES, replays=replays)

        return statistics.median(us(together) - us(without) for _ in range(ROUNDS))
