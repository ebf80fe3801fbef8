"""The time of a selection behind its logits, as a server runs the two.

In a server the CTAs of the selection start on multiprocessors that the logits leave one after the
other. A selection that is replayed alone does not have this effect. So a CUDA graph repeats three
steps: the other work of a layer (:mod:`dsv4_plugin.cli.bench.topk.served`), the logits, the
selection on them. The figure is the profiler's time from the end of the logits to the end of the
selection.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.server.trace import Kernel
from dsv4_plugin import paged_logits
from dsv4_plugin.cli.bench.logits import cases
from dsv4_plugin.cli.bench.topk.served import Elsewhere
from dsv4_plugin.cli.checks.timing import capture
from dsv4_plugin.cli.checks.topk_cases import DTYPES, Case, Problem
from dsv4_plugin.ops.logits import new_logits

__all__ = ["Behind", "after_logits", "kernels"]

LAUNCHES = 6  # layers in a graph


class Behind:
    """A server's layer around a selection, and its clock."""

    def __init__(self) -> None:
        """Make the work between two layers."""
        self.elsewhere = Elsewhere("cuda")

    def problem(self, case: Case) -> tuple[Problem, Callable[[], Any]]:
        """Return the scores of a case in a buffer of its width, and what computes them.

        They are already computed once. The answer is in slots.
        """
        width = case.width or case.columns
        dtype = DTYPES[case.dtype]
        name = next(n for n, d in cases.DTYPES.items() if d == dtype)
        call = cases.Case("chain", name, case.rows, case.columns, k=case.k).make("cuda")
        assert isinstance(call, cases.Paged)
        pages = -(-width // cases.PAGE_SIZE)
        table = torch.zeros(case.rows, pages, dtype=torch.int32, device="cuda")
        table[:, : call.block_table.shape[1]] = call.block_table
        scores = new_logits(case.rows, pages * cases.PAGE_SIZE, dtype, torch.device("cuda"))
        score = functools.partial(
            paged_logits, call.q, call.cache, call.weights, call.lengths, table, out=scores
        )
        score()
        # As an engine calls it, for slots. Here each slot is the index itself.
        slots = torch.arange(pages, dtype=torch.int32, device="cuda").repeat(case.rows, 1)
        return Problem(scores[:, :width], call.n, page_table=slots), score

    def us(
        self,
        dtype: str,
        score: Callable[[], Any],
        calls: Sequence[Callable[[], Any]],
        *,
        replays: int,
    ) -> list[float]:
        """Return microseconds from the end of ``score()`` to that of each call, the median."""

        def layer(call: Callable[[], Any]) -> None:
            self.elsewhere.between(dtype)
            score()
            call()

        graphs = [capture([functools.partial(layer, call)], LAUNCHES) for call in calls]
        order = [i for _ in range(replays) for i in random.sample(range(len(graphs)), len(graphs))]
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for i in order:
                graphs[i].replay()
            torch.cuda.synchronize()
        took = after_logits(kernels(profiler, torch.autograd.DeviceType.CUDA))
        if len(took) != len(order) * LAUNCHES:
            raise RuntimeError(
                f"the profiler saw {len(took)} selections behind their logits, "
                f"{len(order) * LAUNCHES} ran"
            )
        seen: list[list[float]] = [[] for _ in calls]
        for turn, i in enumerate(order):
            seen[i] += took[turn * LAUNCHES : (turn + 1) * LAUNCHES]
        return [statistics.median(times) for times in seen]


def kernels(profiler: torch.profiler.profile, device: torch.autograd.DeviceType) -> list[Kernel]:
    """Return a profiler's events on a kind of device, ordered by start."""
    seen = [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us(), 0)
        for event in profiler.events() or ()
        if event.device_type == device
    ]
    return sorted(seen, key=lambda kernel: kernel.start)


def after_logits(ran: Sequence[Kernel]) -> list[float]:
    """Return, for each logits kernel, the microseconds from its end to the selection's end.

    Args:
        ran: the events on the GPU, ordered by start. Among this package's kernels a selection
            follows each logits kernel.

    Raises:
        RuntimeError: another kernel of this package follows a logits kernel.
    """
    kernels = [kernel for kernel in ran if "dsv4::" in kernel.name]
    took = []
    for i, kernel in enumerate(kernels):
        if "paged_logits" not in kernel.name:
            continue
        after = kernels[i + 1] if i + 1 < len(kernels) else None
        if after is None or "topk" not in after.name:
            raise RuntimeError(f"behind logits ran {after.name if after else 'nothing'}")
        took.append(after.end - kernel.end)
    return took
