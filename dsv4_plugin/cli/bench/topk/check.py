"""Whether an answer is the k largest scores: vectorised, where the tensors are, in bounded memory.

The benchmark checks every implementation with this before and after it is timed. Peers promise the
set by value only; :attr:`Verdict.ties` says whether equal scores went to the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_plugin.cli.checks.topk_cases import Problem

__all__ = ["Reference", "Verdict"]

_CHUNK = 1 << 26  # elements looked at in one step: 256 MiB of float32


@dataclass(frozen=True)
class Verdict:
    """What is true of an answer; ``why`` names the first thing that is not."""

    exact: bool
    ties: bool
    why: str = ""


class Reference:
    """The largest scores of every row, found once for all implementations and all k.

    Scores must not be NaN inside the rows' windows.
    """

    def __init__(self, problem: Problem, most: int) -> None:
        self.problem = problem
        rows, columns = problem.logits.shape
        self.starts = problem.starts.long()
        room = (columns - self.starts).clamp(min=0)
        self.n = torch.minimum(problem.lengths.long().clamp(min=0), room)
        most = min(most, columns)
        parts = []
        for part in self._parts():
            x = self._scores(part).masked_fill(~self._inside(part), -torch.inf)
            parts.append(x.topk(most, dim=1).values.float())
        self.best = torch.cat(parts) if parts else torch.empty(0, most)

    def _parts(self) -> list[slice]:
        rows, columns = self.problem.logits.shape
        step = max(1, _CHUNK // max(columns, 1))
        return [slice(lo, min(lo + step, rows)) for lo in range(0, rows, step)]

    def _scores(self, part: slice) -> torch.Tensor:
        return self.problem.logits[part]

    def _inside(self, part: slice) -> torch.Tensor:
        column = torch.arange(self.problem.logits.shape[1], device=self.problem.logits.device)
        start, n = self.starts[part, None], self.n[part, None]
        return (column >= start) & (column < start + n)

    def judge(self, out: torch.Tensor, k: int, *, ties: bool = False) -> Verdict:
        """Judge ``[rows, k]`` indices that count from each row's start; -1 is no index.

        ``ties``: look at the tie rule too, which costs another pass over the scores.
        """
        index, n = out.long(), self.n[:, None]
        used = index >= 0
        if bool((index < -1).any()) or bool((index >= n).any()):
            return Verdict(False, False, "an index outside of the row")
        if not torch.equal(used.sum(1), self.n.clamp(max=k)):
            return Verdict(False, False, "too few indices")
        ordered = index.sort(dim=1).values
        if bool(((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()):
            return Verdict(False, False, "an index twice")
        at = (index.clamp(min=0) + self.starts[:, None]).clamp(max=self._last_column())
        picked = self.problem.logits.gather(1, at).float().masked_fill(~used, -torch.inf)
        got = picked.sort(dim=1, descending=True).values
        kept = min(k, self.best.shape[1])
        if not torch.equal(got[:, :kept], self.best[:, :kept]):
            wrong = int((got[:, :kept] != self.best[:, :kept]).any(1).sum())
            return Verdict(False, False, f"not the largest scores in {wrong} of {len(out)} rows")
        if ties and not self._lowest(index, picked, k):
            return Verdict(True, False, "equal scores did not go to the lowest index")
        return Verdict(True, ties)

    def _last_column(self) -> int:
        return max(self.problem.logits.shape[1] - 1, 0)

    def _lowest(self, index: torch.Tensor, picked: torch.Tensor, k: int) -> bool:
        """Whether the chosen among the row's k-th score are the first of those that have it."""
        if k > self.best.shape[1]:
            return True
        bound = self.best[:, k - 1 : k]
        full = self.n >= k
        equal = (picked == bound) & (index >= 0)
        last = torch.where(equal, index, -1).amax(1, keepdim=True)
        count = equal.sum(1)
        for part in self._parts():
            start = self.starts[part, None]
            column = torch.arange(self.problem.logits.shape[1], device=index.device) - start
            same = self._scores(part) == bound[part].to(self.problem.logits.dtype)
            before = (same & (column >= 0) & (column <= last[part])).sum(1)
            if bool(((before != count[part]) & full[part]).any()):
                return False
        return True
