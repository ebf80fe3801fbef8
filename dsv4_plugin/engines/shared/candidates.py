"""Candidate blocks in all adapters (:mod:`dsv4_plugin.ops.candidates`)."""

from __future__ import annotations

import torch

__all__ = ["PIECE", "WHOLE_COLUMNS", "maxima_of"]

PIECE = 8  # keys of a candidate block, as the kernels have it
# A consumer's prefill over at most this many keys scores all of them, because many rows share the
# read of a key. The keys of a candidate are read for one row. Measured only in vLLM's form.
WHOLE_COLUMNS = 40_960


def maxima_of(scores: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Write the blocks' scores of existing logits, as ``block_maxima`` defines them.

    Columns past a row's keys may hold anything. They belong to its newest block, which scores
    infinity, and to later blocks, which the selection does not read.

    Args:
        scores: ``[rows, columns]`` with room for whole blocks: ``columns`` may end within one, the
            row stride may not.
        lengths: ``[rows]`` keys that each row sees.
        out: ``[rows, ceil(columns / PIECE)]`` of the dtype of ``scores``.
    """
    rows, blocks = out.shape
    torch.amax(scores.as_strided((rows, blocks, PIECE), (scores.stride(0), PIECE, 1)), 2, out=out)
    out.masked_fill_(out.isnan(), torch.inf)
    newest = torch.div(lengths - 1, PIECE, rounding_mode="floor").clamp(0, blocks - 1)
    out.scatter_(1, newest.to(torch.int64)[:, None], torch.inf)
