"""The cells of ``--part kernels``, and the check of their answers.

A cell is one call of an engine with the tensors of one shape. Its runs are the functions that the
adapters install, and the engine's own kernel for the same call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import dsv4_plugin as ops
from dsv4_plugin.cli.bench.cells import Row
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.checks.topk_cases import Problem
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import Decision, Selection
from dsv4_plugin.state import state

__all__ = [
    "Run",
    "Scores",
    "Task",
    "backend_for",
    "by_rounds",
    "engaged",
    "named",
    "recall",
    "shapes_of",
    "verdict",
]

Judge = Callable[[], Row]


@dataclasses.dataclass
class Run:
    """One implementation; ``judge`` checks the outputs that ``call`` wrote."""

    name: str
    call: Callable[[], Any]
    soil: Callable[[], Any]
    judge: Judge
    graph: bool = True  # False: the call synchronises, so it is timed call by call
    plugin: bool = False


@dataclasses.dataclass
class Task:
    """A cell to measure: its name in the results, and the function that draws its tensors."""

    about: Row
    make: Callable[[], list[Run]]

    def __str__(self) -> str:
        """Return the cell as progress lines and the results file show it."""
        a = self.about
        k = f" k {a['k']}" if a.get("k") else ""
        return f"{a['suite']} {a['call']}{k} {a['rows']} x {a['columns']}"


def by_rounds(tasks: Sequence[Task]) -> list[Task]:
    """Return the first cell of every call, then the second of every call, and so on.

    So a run that is cut short has a result of each call.
    """
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    rounds = []
    for task in tasks:
        call = task.about["suite"], task.about["call"]
        rounds.append(seen[call])
        seen[call] += 1
    order = sorted(range(len(tasks)), key=rounds.__getitem__)  # stable: calls stay in their order
    return [tasks[i] for i in order]


def shapes_of(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], columns: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the shapes that the arguments choose; both together replace the list."""
    if rows and columns:
        return [(r, c) for r in rows for c in columns]
    return [(r, c) for r, c in shapes if (not rows or r in rows) and (not columns or c in columns)]


def backend_for(device: str) -> str:
    """The plugin's backend: the kernels, or the torch reference in a dry run."""
    return "cuda" if device == "cuda" else "torch"


def named(topk: Selection) -> str:
    """Name a run of the plugin: the scores' dtype and, if there is a choice, their source."""
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[topk.dtype]
    return f"dsv4 {dtype}{' plugin logits' if topk.logits == 'plugin' else ''}"


@contextlib.contextmanager
def engaged() -> Iterator[None]:
    """Make the adapters behave as with the plugin switched on and ``DSV4_STRICT=1``."""
    before = adapter.current().decision
    adapter.current().decide(Decision(True, strict=True))
    try:
        yield
    finally:
        adapter.current().decide(before)
        state.reset()


class Scores:
    """Records the scores that the plugin's top-k gets in a call, to check its answer."""

    def __init__(self) -> None:
        self.problem: Problem | None = None

    def watching(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap ``call``; it records the scores of eager calls, and nothing under capture."""
        real = ops.topk

        @functools.wraps(real)
        def topk(logits: torch.Tensor, lengths: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.problem = Problem(logits, lengths, kwargs.get("row_starts"))
            return real(logits, lengths, *args, **kwargs)

        def watched() -> None:
            with mock.patch.object(ops, "topk", topk):
                call()

        return watched

    def judge(self, local: torch.Tensor) -> Row:
        """Check row-local indices against the recorded scores."""
        if self.problem is None:
            return {"exact": False, "why": "no scores were seen"}
        return verdict(self.problem, local, ties=True)


def verdict(problem: Problem, local: torch.Tensor, *, ties: bool) -> Row:
    """Return the fields of a results row about an answer."""
    found = judge(problem, local, ties=ties)
    row: Row = {"exact": found.exact}
    if ties:
        row["lowest_index"] = found.ties
    if found.why:
        row["why"] = found.why
    return row


def recall(truth: list[torch.Tensor], rows: list[int], local: torch.Tensor) -> Row:
    """Return the share of the best keys by float64 scores in an answer: mean and worst row.

    ``truth`` has for each of ``rows`` the scores of its columns.
    """
    shares = []
    k = local.shape[1]
    for row, scores in zip(rows, truth, strict=True):
        best = scores.topk(min(k, len(scores))).indices
        chosen = torch.zeros(len(scores) + 1, dtype=torch.bool, device=local.device)
        index = local[row].long()
        bad = (index < 0) | (index >= len(scores))
        chosen[torch.where(bad, len(scores), index)] = True
        shares.append(float(chosen[best].float().mean()) if len(best) else 1.0)
    return {"recall": round(sum(shares) / len(shares), 6), "recall_worst": round(min(shares), 6)}
