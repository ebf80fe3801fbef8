"""vLLM's two functions of DeepSeek-V4.1's candidate blocks, in torch; vLLM's are Triton for CUDA.

Both follow the functions of ``vllm.model_executor.kernels.attention.dsa.candidate_blocks`` in
releases 0.31 and later. Candidates come in the order of ``torch.topk``, the best block first, as in
vLLM. Only the mask takes logits that are not float32.
"""

from __future__ import annotations

from typing import Any

import torch
from kits.engine_parts import Call

__all__ = ["Candidates"]


class Candidates:
    """The two functions; they record their calls."""

    def __init__(self, calls: list[Call]) -> None:
        def select_candidate_blocks(
            logits: torch.Tensor,
            row_ks: torch.Tensor | None,
            row_ke: torch.Tensor,
            topk_blocks: int,
            block_size: int,
            out: torch.Tensor,
            row_repeat: int = 1,
        ) -> None:
            calls.append(Call("select_candidate_blocks", logits.dtype, len(logits)))
            _float32(logits)
            out.fill_(-1)
            for row, (begin, end) in enumerate(_windows(logits, row_ks, row_ke, row_repeat)):
                if end <= begin:
                    continue
                scores = logits[row, begin:end]
                missing = -len(scores) % block_size
                scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
                blocks = scores.view(-1, block_size).amax(dim=1)
                blocks[-1] = torch.inf
                best = blocks.topk(min(topk_blocks, len(blocks)))
                kept = best.indices[best.values != -torch.inf]
                out[row, : len(kept)] = kept.int()

        def apply_candidate_mask(
            logits: torch.Tensor,
            row_ks: torch.Tensor | None,
            row_ke: torch.Tensor,
            candidate_blocks: torch.Tensor,
            block_size: int,
            row_repeat: int = 1,
        ) -> None:
            calls.append(Call("apply_candidate_mask", logits.dtype, len(logits)))
            for row, (begin, end) in enumerate(_windows(logits, row_ks, row_ke, row_repeat)):
                blocks = candidate_blocks[row]
                first = begin + blocks[blocks >= 0].long()[:, None] * block_size
                columns = (first + torch.arange(block_size)).flatten()
                kept = torch.zeros(logits.shape[1], dtype=torch.bool)
                kept[columns[columns < end]] = True
                logits[row, ~kept] = -torch.inf

        self.by_name: dict[str, Any] = {
            "_select_candidate_blocks": select_candidate_blocks,
            "_apply_candidate_mask": apply_candidate_mask,
        }


def _float32(logits: torch.Tensor) -> None:
    if logits.dtype != torch.float32:
        raise TypeError(f"the stand-ins read float32 logits, got {logits.dtype}")


def _windows(
    logits: torch.Tensor, starts: torch.Tensor | None, ends: torch.Tensor, repeat: int
) -> list[tuple[int, int]]:
    """Return the columns that each row sees."""
    lasts = ends.repeat_interleave(repeat).tolist()
    firsts = [0] * len(lasts) if starts is None else starts.repeat_interleave(repeat).tolist()
    assert len(lasts) == logits.shape[0]
    return [(a, min(b, logits.shape[1])) for a, b in zip(firsts, lasts, strict=True)]
