"""The ratio of paired figures, with an interval that reflects how few pairs there are.

The pair is the unit. Runs on one start of a server share its memory layout and its start-up tuning,
so they are averaged before anything is compared. Times are compared by ratios, so means and
Student's t are computed on logarithms. A bootstrap of three pairs would be too narrow, because it
cannot leave the range of the three.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LEVEL", "Ratio", "ratio", "t_quantile"]

LEVEL = 0.95
# Quantiles of Student's t at 0.975 for 1 … 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """B over A: the geometric mean over the pairs and the bounds of its interval."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low > 1 or self.high < 1


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t, to 4 digits."""
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)  # Cornish-Fisher expansion
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Compare pairs ``(a[i], b[i])``; the values are positive, and there are at least two pairs."""
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    if len(logs) < 2:
        raise ValueError(f"an interval needs at least 2 pairs, got {len(logs)}")
    mean = statistics.fmean(logs)
    half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
