"""Where the top-k changes its path: the tests run lengths of -5 ... +5 around each.

A new path of the kernel is one more entry in :data:`EDGES`, :data:`ROW_EDGES` or
:data:`CAPACITIES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "CAPACITIES", "EDGES", "GROUP_EDGES", "ODD_KS", "ROW_EDGES", "plateau", "short_lengths",
]  # fmt: skip

# Row lengths. A thread takes one more unit every 4,096 scores (512 threads). Two or four units stay
# in registers. Longer slices are streamed four or eight units at a time and listed 32 at a time. A
# thread's share of the masks doubles at 32,768, 65,536 and 131,072. The table of choices changes at
# 8K, 16K, 32K, 64K and 128K. A CTA holds at most 262,144 scores: without the wide kernel 16 CTAs
# hold the longest row, and three CTAs hold 786,432.
EDGES = (
    4096,  # one step
    8192,
    12_288,
    16_384,
    24_576,
    32_768,  # sglang#33835: 115 of 512 slots unique just above it
    49_152,
    65_536,
    98_304,
    131_072,
    196_608,
    262_144,
    524_288,
    786_432,
    1_048_576,
    4_194_304,  # longer rows go to the wide kernel
)

# Row lengths in quarters of k. A bound is taken from groups of two, four, eight or up to 32 scores,
# whichever are enough. A slice in registers needs 9/4 k groups (a cluster: 9/8 k; float16: 7/4 k);
# with fewer, the bound is taken from single scores. A streamed slice needs 7/4 k groups.
GROUP_EDGES = (4, 5, 8, 9, 16, 18, 28, 32, 36, 56, 64, 72)

# The rows of a call, which decide how many CTAs a row gets: 4; a sixteenth, an eighth, two ninths,
# a quarter and a half of 132 multiprocessors; all of them, and twice that. Each comes with the next
# number.
ROW_EDGES = (1, 2, 4, 5, 8, 9, 16, 17, 29, 30, 33, 34, 64, 66, 67, 99, 131, 132, 133, 264, 265)

# How many elements tie for the last slots of a row: the limits at which kernels dropped candidates
# (vllm#51782, sglang#36807), k, and the limits of this kernel. It ranks 256 scores against each
# other, and a warp's list has 128 units.
CAPACITIES = (128, 256, 512, 1024, 2048, 3708, 4096, 8192, 16_384, 32_768)

# Values of k that are neither tuned nor a multiple of anything. The table of choices changes above
# 512 and above 1024; above 1024 the answers are also staged in shared memory.
ODD_KS = (1, 2, 7, 31, 100, 511, 513, 1000, 1023, 1025, 2047)


def short_lengths(k: int) -> list[int]:
    """Return the lengths at which a row is padding, short, or barely longer than ``k``."""
    return [-1, 0, 1, k - 1, k, k + 1]


def plateau(
    counts: Sequence[int], columns: int, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Make rows in which ``counts[r]`` scattered elements tie for the largest score.

    The other elements are smaller and differ from each other as far as the dtype allows. A kernel
    that keeps the candidates of a row in a buffer has exactly ``counts[r]`` of them at the
    threshold.
    """
    g = torch.Generator(device=device).manual_seed(len(counts))
    rows = torch.rand(len(counts), columns, generator=g, device=device)
    for row, count in zip(rows, counts, strict=True):
        row[torch.randperm(columns, generator=g, device=device)[:count]] = 2.0
    return rows.to(dtype)
