"""How a selection in a narrower dtype compares with the exact float32 selection.

``S`` is the exact selection of a row on its float32 scores. ``D`` is the exact selection on the
same scores rounded to the dtype (to nearest, ties to even). Both have ``k`` columns, with ties to
the lowest column. ``t`` is the k-th largest float32 score, the smallest in ``S``.

* **overlap**: ``|S ∩ D| / k``. Rows of at most ``k`` columns select all of them and are left out.
* **swapped**: ``k - |S ∩ D|``, the positions that ``D`` has instead of others.
* **beyond ties**: swapped positions whose rounded score is not the rounded ``t``. Rounding never
  changes the order of two scores; it only makes them equal. So this number must be zero: the
  differences are choices among scores that *tie with the k-th after rounding*. It is counted as a
  check.
* **gap**: ``(t - s) / |t|`` for the lowest score ``s`` in ``D``: how far below the threshold the
  dtype reaches. It is at most one unit in the dtype's last place (bfloat16: 2⁻⁷ relative). If
  ``t`` is zero, the divisor is the largest magnitude in ``S``.
* **depth**: how many places below the k-th the lowest position in ``D`` ranks in float32.
* **mass lost**: ``(Σ s in S - Σ s in D) / Σ |s| in S``, the lost share of the selected scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4_plugin import topk
from dsv4_plugin.cli.shared.choices import RECALL_DTYPES

__all__ = ["DTYPES", "Statistics", "percentile"]

DTYPES = {name: getattr(torch, name) for name in RECALL_DTYPES}


def percentile(values: torch.Tensor, percent: float) -> float:
    """Return the nearest-rank percentile; with fewer than 100 rows the 1st is the worst row."""
    rank = max(1, math.ceil(values.numel() * percent / 100))
    return float(values.sort().values[rank - 1])


@dataclass
class Statistics:
    """The figures of the rows of one kind, k and dtype, added batch by batch."""

    k: int
    dtype: str
    short_rows: int = 0
    beyond: int = 0
    _rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, scores: torch.Tensor, lengths: torch.Tensor, exact: torch.Tensor) -> None:
        """Measure ``[rows, columns]`` float32 scores, whose exact selection is ``exact``."""
        long = lengths > self.k
        self.short_rows += int((~long).sum())
        scores, lengths, exact = scores[long], lengths[long], exact[long]
        if not len(scores):
            return
        picked = topk(scores.to(DTYPES[self.dtype]), lengths, self.k)
        kept = scores.gather(1, exact.long())
        chosen = scores.gather(1, picked.long())
        member = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        member.scatter_(1, exact.long(), True)
        new = ~member.gather(1, picked.long())
        threshold = kept.amin(1)
        rounded = threshold.to(DTYPES[self.dtype])[:, None]
        self.beyond += int((new & (chosen.to(DTYPES[self.dtype]) != rounded)).sum())
        lowest, at = chosen.min(1)
        last = picked.gather(1, at[:, None]).long()
        column = torch.arange(scores.shape[1], device=scores.device)
        above = (scores > lowest[:, None]) | ((scores == lowest[:, None]) & (column < last))
        depth = (above & (column < lengths[:, None])).sum(1) + 1 - self.k
        size = torch.where(threshold != 0, threshold.abs(), kept.abs().amax(1))
        mass, total = kept.double().sum(1), kept.double().abs().sum(1)
        self._keep("overlap", 1 - new.sum(1).double() / self.k)
        self._keep("swapped", new.sum(1).double())
        self._keep("gap", _ratio((threshold - lowest).double(), size.double()))
        self._keep("depth", depth.clamp(min=0).double())
        self._keep("mass", _ratio(mass - chosen.double().sum(1), total))

    def _keep(self, name: str, values: torch.Tensor) -> None:
        self._rows.setdefault(name, []).append(values.cpu())

    def row(self) -> dict[str, Any]:
        """Return the figures; None if no row is longer than k."""
        if not self._rows:
            return {"k": self.k, "dtype": self.dtype, "rows": 0, "short_rows": self.short_rows}
        all_rows = {name: torch.cat(values) for name, values in self._rows.items()}
        overlap = all_rows["overlap"]
        return {
            "k": self.k,
            "dtype": self.dtype,
            "rows": overlap.numel(),
            "short_rows": self.short_rows,
            "mean": round(float(overlap.mean()), 6),
            "p1": round(percentile(overlap, 1), 6),
            "worst": round(float(overlap.min()), 6),
            "equal_rows": int((overlap == 1).sum()),
            "swapped_mean": round(float(all_rows["swapped"].mean()), 3),
            "beyond_ties": self.beyond,
            "gap_worst": _short(all_rows["gap"].max()),
            "depth_mean": round(float(all_rows["depth"].mean()), 2),
            "depth_worst": int(all_rows["depth"].max()),
            "mass_lost_mean": _short(all_rows["mass"].mean()),
            "mass_lost_worst": _short(all_rows["mass"].max()),
        }


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return torch.where(part == 0, 0.0, part / whole)


def _short(value: torch.Tensor) -> float:
    return float(f"{float(value):.3g}")
