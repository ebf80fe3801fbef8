"""Whether logits are right: a sample is compared with float64, within the tests' tolerance.

:func:`dsv4_plugin.cli.checks.exact.outside` defines what is right.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_plugin.cli.bench.logits.cases import Paged, Ragged
from dsv4_plugin.cli.checks import exact

__all__ = ["TOLERANCE", "Sample"]

# By device: the tolerance of the tensor cores, and of the torch reference.
TOLERANCE = {"cuda": exact.TOLERANCE["cuda", "normal"], "cpu": exact.TOLERANCE["torch", "normal"]}
MOST_ROWS, MOST_COLUMNS = 16, 4096
EDGE = 64  # the first and last columns of a row are always checked


class Sample:
    """Rows and columns of a call, and their scores in float64, computed once."""

    def __init__(self, problem: Paged | Ragged) -> None:
        self._problem, self._g = problem, torch.Generator().manual_seed(0)
        self.tolerance = TOLERANCE[problem.q.device.type]
        self._parts = list(self._exact())

    def _exact(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield row, columns, scores and magnitudes of the checked sample."""
        problem, n = self._problem, self._problem.n.tolist()
        rows = {0, len(n) - 1, *torch.randperm(len(n), generator=self._g)[: MOST_ROWS - 2].tolist()}
        for row in sorted(rows):
            columns = self._columns(n[row]).to(problem.q.device)
            if not len(columns):
                continue
            keys, scale = problem.keys(row, columns)
            q, k = problem.queries(row).double(), keys.double()
            weights, scale = problem.weights[row].double(), scale.double()
            score = scale * ((k @ q.T).clamp(min=0) @ weights)
            size = scale.abs() * ((k.abs() @ q.abs().T) @ weights.abs())
            yield row, columns, score, size

    def _columns(self, n: int) -> torch.Tensor:
        if n <= MOST_COLUMNS:
            return torch.arange(n)
        drawn = torch.randint(0, n, (MOST_COLUMNS - 2 * EDGE,), generator=self._g)
        return torch.cat([torch.arange(EDGE), drawn, torch.arange(n - EDGE, n)])

    def why_wrong(self, logits: torch.Tensor) -> str:
        """Return the first error in ``logits``, or an empty string."""
        for row, columns, score, size in self._parts:
            got = logits[row, columns]
            wrong = exact.outside(got, score, size, self.tolerance)[0]
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                return (
                    f"{int(wrong.sum())} of {len(columns)} sampled scores of row {row}; first: "
                    f"column {int(columns[at])}: {float(got[at])}, not {float(score[at]):.6g}"
                )
        return ""
