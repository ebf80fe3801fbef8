"""Whether an answer is the k largest scores; checked before and after every timing.

Peers promise only the set by value. :attr:`Verdict.ties` says whether equal scores went to the
lowest index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_plugin.cli.checks.oracles import RULES, TIES, faults
from dsv4_plugin.cli.checks.topk_cases import Problem

__all__ = ["Verdict", "judge"]


class Verdict(NamedTuple):
    """The properties of an answer; ``why`` names the first one that does not hold."""

    exact: bool
    ties: bool
    why: str = ""


def judge(problem: Problem, out: torch.Tensor, *, ties: bool = False) -> Verdict:
    """Judge ``[rows, k]`` indices that count from each row's start; -1 means no index.

    ``ties``: also require the tie rule.
    """
    broken = faults(problem.logits, problem.lengths, out.shape[1], out, starts=problem.row_starts)
    rules = TIES + ties  # the rule for the set, and then the rule for ties
    of_rule = broken.any(0).tolist()[:rules]
    why = next((rule for rule, bad in zip(RULES, of_rule, strict=False) if bad), "")
    return Verdict(not any(of_rule[:TIES]), ties and not any(of_rule), why)
