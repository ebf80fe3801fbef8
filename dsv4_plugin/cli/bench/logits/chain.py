"""Timing of the chain: from the keys to the indices of the best keys, in one CUDA graph.

The plugin runs :func:`dsv4_plugin.select`. A peer is a float32 logits kernel and then a top-k. Each
logits kernel of the peers file is joined with the top-k that stands for vLLM's choice and with
SGLang's. Each logits kernel of an installed engine is joined with that engine's top-k. Every answer
must be the exact top-k of the scores that the same implementation's logits kernel makes, and those
scores must be right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import paged_logits, select
from dsv4_plugin.cli.bench.cells import DIRTY, Cell, Row
from dsv4_plugin.cli.bench.logits.cases import DTYPES, Case, Paged
from dsv4_plugin.cli.bench.logits.check import Sample
from dsv4_plugin.cli.bench.logits.measure import KeyBench, Problem, peer_logits
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.checks.compare import PLUGIN, chain_name, sound
from dsv4_plugin.cli.checks.topk_cases import Problem as Scores
from dsv4_plugin.ops.logits import new_logits

__all__ = ["ChainBench", "shared"]

Call = Callable[[Paged, torch.Tensor], None]
Answers = dict[int, dict[tuple[str, str], torch.Tensor]]  # k -> (implementation, dtype) -> indices


def shared(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return the share of each row of ``b`` that is also in ``a``: the mean and the worst row.

    A row of ``b`` without indices counts as shared.
    """
    held = a.sort(1).values
    at = torch.searchsorted(held, b.contiguous()).clamp(max=held.shape[1] - 1)
    used = b >= 0
    hits = (held.gather(1, at) == b) & used
    share = torch.where(used.any(1), hits.sum(1) / used.sum(1), 1.0)
    return float(share.mean()), float(share.min())


class _Run:
    """One implementation with its own output."""

    def __init__(self, call: Call, case: Case, device: torch.device) -> None:
        self._call = call
        self.out = torch.empty(case.rows, case.k, dtype=torch.int32, device=device)
        self.soil()

    def __call__(self, problem: Problem) -> None:
        assert isinstance(problem, Paged)
        self._call(problem, self.out)

    def soil(self) -> None:
        """Overwrite the output with a value that is no answer."""
        self.out.fill_(DIRTY)


class ChainBench(KeyBench):
    """Measures cases of ``bench chain``; ``choices`` are the top-k peers that end a chain."""

    choices: tuple[str, ...] = ()
    _begun = 0  # index of the group's first result
    _answers: Answers  # of the group

    def _begin(self, group: list[Case]) -> Cell:
        held = self._held(group[0])
        problem = held[0]
        assert isinstance(problem, Paged)
        sample = Sample(problem)
        references: dict[tuple[str, str], tuple[Scores, str]] = {}
        self._begun, self._answers = len(self.results), {}

        def cell(case: Case) -> tuple[float, str]:
            runs = self._implementations(case, problem)
            text = self._cell(case, held, runs, references, sample)
            kept = self._answers.setdefault(case.k, {})
            kept |= {(name, case.dtype): run.out for name, run in runs.items()}
            return self._floor_us(case), text

        return cell

    def _end(self) -> None:
        self._agree(self.results[self._begun :], self._answers)
        self._answers = {}

    def _cell(
        self,
        case: Case,
        held: list[Problem],
        runs: dict[str, _Run],
        references: dict[tuple[str, str], tuple[Scores, str]],
        sample: Sample,
    ) -> str:
        problem = held[0]
        assert isinstance(problem, Paged)

        def reference(name: str) -> tuple[Scores, str]:
            if (name, case.dtype) not in references:
                logits = self._logits(name, problem, DTYPES[case.dtype])[:, : case.columns]
                wrong = sample.why_wrong(logits)
                references[name, case.dtype] = Scores(logits, problem.n), wrong
            return references[name, case.dtype]

        def warm(name: str) -> Row:
            run = runs[name]
            run.soil()
            run(problem)
            scores, wrong = reference(name)
            before = judge(scores, run.out, ties=name == PLUGIN)
            run.soil()
            us = self._time(case, functools.partial(run, problem))
            after = judge(scores, run.out, ties=name == PLUGIN)
            row = self._figures(case, us)
            row |= {"exact": before.exact and after.exact, "right": not wrong}
            if name == PLUGIN:
                row["lowest_index"] = before.ties and after.ties
            if before.why or after.why or wrong:
                row["why"] = before.why or after.why or wrong
            return row

        def cold(name: str, warm_us: float) -> float | None:
            return self._cold(case, runs[name], held, warm_us)

        return self.measure(case, self._about(case), runs, warm, cold)

    def _implementations(self, case: Case, problem: Paged) -> dict[str, _Run]:
        """Return the plugin first, then the peers' chains, which exist in float32 only."""
        device = problem.q.device
        scratch = new_logits(case.rows, case.columns, DTYPES[case.dtype], device)

        def plugin(p: Paged, out: torch.Tensor) -> None:
            select(p.q, p.cache, p.weights, p.lengths, p.block_table, case.k, out=out,
                   logits=scratch, backend=self.backend)  # fmt: skip

        calls: dict[str, Call] = {PLUGIN: plugin}
        if case.dtype == "float32":
            for first, last in self.peers.chains(self.choices):
                logits, topk = self.peers["logits"][first], self.peers["decode"][last]
                calls[chain_name(first, last)] = functools.partial(_peer_chain, logits, topk, case)
        return {name: _Run(call, case, device) for name, call in calls.items()}

    def _logits(self, name: str, problem: Paged, dtype: torch.dtype) -> torch.Tensor:
        """Return the scores that an implementation selects among."""
        if name == PLUGIN:
            p = problem
            return paged_logits(p.q, p.cache, p.weights, p.lengths, p.block_table, dtype=dtype,
                                backend=self.backend)  # fmt: skip
        for first, last in self.peers.chains(self.choices):
            if name == chain_name(first, last):
                return peer_logits(self.peers["logits"][first], dtype, problem)
        raise KeyError(name)

    def _agree(self, rows: list[Row], answers: Answers) -> None:
        """Note in the plugin's results how much of its choice each right peer chain shares."""
        for row in rows:
            if row["implementation"] != PLUGIN:
                continue
            plugin = answers[row["k"]][PLUGIN, row["dtype"]]
            row["agreement"] = {}
            for other in rows:
                if other["implementation"] != PLUGIN and other["k"] == row["k"] and sound(other):
                    peers = answers[row["k"]][other["implementation"], other["dtype"]]
                    mean, worst = shared(plugin, peers)
                    row["agreement"][other["implementation"]] = {
                        "mean": round(mean, 6), "worst": round(worst, 6),
                    }  # fmt: skip


def _peer_chain(logits: Any, topk: Any, case: Case, p: Paged, out: torch.Tensor) -> None:
    scores = peer_logits(logits, torch.float32, p)
    topk(scores[:, : case.columns], p.n, case.k, out)
