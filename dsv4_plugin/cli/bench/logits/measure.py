"""Timing of the logits' cases, one after the other, beside the peers.

Every implementation is checked before and after it is timed. The floor of a cell is the time in
which the memory reads the keys once, 132 bytes each, at the rate of a large read in the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import paged_logits, ragged_logits
from dsv4_plugin.cli.bench.cells import Cell, CellBench, Row, copies_for, launches_for, time_cold
from dsv4_plugin.cli.bench.logits.cases import DTYPES, KEY_BYTES, Case, Paged, Ragged
from dsv4_plugin.cli.bench.logits.check import Sample
from dsv4_plugin.cli.checks.compare import PLUGIN
from dsv4_plugin.cli.checks.timing import time_calls
from dsv4_plugin.ops.logits import new_logits

__all__ = ["Bench", "KeyBench", "peer_logits"]

NOMINAL_OPS_US = 1e9  # operations per microsecond, to guess how long a cell takes

Problem = Paged | Ragged


def peer_logits(call: Any, dtype: torch.dtype, problem: Problem) -> torch.Tensor:
    """Return the logits that a peer of either form makes."""
    p = problem
    if isinstance(p, Paged):
        return call(p.q, p.cache, p.weights, p.lengths, p.block_table, dtype)
    return call(p.q, p.k, p.k_scale, p.weights, p.row_starts, p.row_ends, dtype)


class KeyBench(CellBench):
    """What the benchmarks that begin at the keys share; ``read_rate``: bytes per microsecond."""

    read_rate = 1.0

    def _held(self, case: Case) -> list[Problem]:
        """Return the tensors of a case and, where they are paged, copies for a rotation."""
        problem = case.make(self.device)
        on_gpu = self.device == "cuda" and case.suite != "prefill"
        count = copies_for(case.keys_read * KEY_BYTES, case.cache_bytes) if on_gpu else 1
        return [problem, *(problem.copy() for _ in range(count - 1))]

    def _floor_us(self, case: Case) -> float:
        return case.keys_read * KEY_BYTES / self.read_rate

    def _time(self, case: Case, call: Callable[[], Any]) -> float:
        guess = max(self._floor_us(case), case.operations / NOMINAL_OPS_US)
        launches = launches_for(guess, self.launches)
        return time_calls([call], self.device, launches=launches, replays=self.replays)

    def _about(self, case: Case) -> Row:
        about: Row = {
            "suite": case.suite, "dtype": case.dtype, "batch": case.batch, "next_n": case.next_n,
            "rows": case.rows, "columns": case.columns, "lengths": case.lengths,
        }  # fmt: skip
        return about | ({"k": case.k} if case.k else {})

    def _figures(self, case: Case, us: float) -> Row:
        floor_us = self._floor_us(case)
        return {
            "warm_us": round(us, 3),
            "cold_us": None,
            "floor_us": round(floor_us, 3),
            "ratio": round(us / floor_us, 3),
            "gb_s": round(case.keys_read * KEY_BYTES / us / 1e3, 3),
            "tflops": round(case.operations / us / 1e6, 3),
        }

    def _cold(
        self, case: Case, run: Callable[[Problem], Any], held: list[Problem], warm_us: float
    ) -> float | None:
        """Time a rotation over the copies; the keys of a prefill are few and stay in the L2."""
        if case.suite == "prefill":
            return None
        calls = [functools.partial(run, problem) for problem in held]
        return time_cold(calls, self.device, warm_us, replays=self.replays)


class _Run:
    """One implementation; it keeps the logits of its last call."""

    def __init__(self, call: Callable[[Problem], torch.Tensor], out: torch.Tensor | None) -> None:
        self._call, self._out = call, out
        self.logits: torch.Tensor | None = None

    def __call__(self, problem: Problem) -> None:
        self.logits = None  # so that the next call gets the same memory
        self.logits = self._call(problem)

    def why_wrong(self, sample: Sample) -> str:
        """Return what is wrong with the last call's logits, or an empty string."""
        assert self.logits is not None
        return sample.why_wrong(self.logits)

    def soil(self) -> None:
        """Overwrite the output with a value that is no answer, if the output is the plugin's."""
        if self._out is not None:
            self._out.fill_(torch.nan)


class Bench(KeyBench):
    """Measures cases of ``bench logits``."""

    def _begin(self, group: list[Case]) -> Cell:
        held = self._held(group[0])
        sample = Sample(held[0])
        return lambda case: (self._floor_us(case), self._cell(case, held, sample))

    def _cell(self, case: Case, held: list[Problem], sample: Sample) -> str:
        runs = self._implementations(case, held[0])

        def warm(name: str) -> Row:
            run = runs[name]
            run.soil()
            run(held[0])
            before = run.why_wrong(sample)
            run.soil()
            us = self._time(case, functools.partial(run, held[0]))
            why = before or run.why_wrong(sample)
            return self._figures(case, us) | {"right": not why} | ({"why": why} if why else {})

        def cold(name: str, warm_us: float) -> float | None:
            return self._cold(case, runs[name], held, warm_us)

        return self.measure(case, self._about(case), runs, warm, cold)

    def _implementations(self, case: Case, problem: Problem) -> dict[str, _Run]:
        """Return the plugin first, then the peers."""
        dtype = DTYPES[case.dtype]
        out = new_logits(case.rows, case.columns, dtype, problem.q.device)

        def plugin(p: Problem) -> torch.Tensor:
            if isinstance(p, Paged):
                return paged_logits(p.q, p.cache, p.weights, p.lengths, p.block_table, out=out,
                                    backend=self.backend)  # fmt: skip
            return ragged_logits(p.q, p.k, p.k_scale, p.weights, p.row_starts, p.row_ends,
                                 one_request=True, out=out, backend=self.backend)  # fmt: skip

        peers = self.peers["ragged_logits" if case.suite == "prefill" else "logits"]
        runs = {
            name: _Run(functools.partial(peer_logits, call, dtype), None)
            for name, call in peers.items()
        }
        return {PLUGIN: _Run(plugin, out), **runs}
