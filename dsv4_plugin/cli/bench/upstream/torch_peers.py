"""torch: the peer that is always installed.

Its top-k is ``torch.topk``; its logits are a product in float32. On a CPU it lets a dry run compare
answers.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.cli.bench.upstream.prepared import Prepared, capturing, lengths_of, zeros_for
from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE

__all__ = ["CHOICE", "FORMS", "name"]

NAME, CHOICE = "torch", ""

# Buffers are kept for one shape at a time, because they are as large as the scores.
_buffers = Prepared(NAME, most=1)
_facts = Prepared(NAME)


def name() -> str:
    """Return the name of torch's kernels."""
    return NAME


def decode(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
    """``torch.topk(..., sorted=False)``, as vLLM's and SGLang's ``torch`` backends call it.

    Columns beyond a row's length are masked first, as in those backends. The eager call looks up
    whether there are such columns and whether a row is shorter than ``k``; it also allocates all
    memory. A score of -inf looks like a masked one.
    """
    _Select(logits, zeros_for(lengths, _facts), lengths, k).columns(out)


def prefill(
    logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, k: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Like :func:`decode`, for windows; the indices count from the row's start."""
    lengths = lengths_of(row_starts, row_ends, _facts)
    _Select(logits, row_starts, lengths, k).columns(out)


def paged(
    logits: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor, k: int,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """Like :func:`decode`, then ``torch.gather`` on the page table: answers in pool slots."""
    _Select(logits, zeros_for(lengths, _facts), lengths, k).slots(page_table, out)


class _Select:
    """One selection; the eager call allocates its buffers."""

    def __init__(
        self, logits: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, k: int
    ) -> None:
        rows, columns = logits.shape
        self.lengths = lengths
        self.kept = kept = min(k, columns)
        device, dtype = logits.device, logits.dtype
        key = rows, columns, k, dtype, str(device)

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        b = _buffers.get(key, lambda: {
            "values": new(rows, kept, dtype=dtype), "indices": new(rows, kept, dtype=torch.int64),
            "page": new(rows, kept, dtype=torch.int64), "slot": new(rows, kept, dtype=torch.int32),
            "beyond": new(rows, kept, dtype=torch.bool),
        })  # fmt: skip
        fact = "facts", *_place(lengths), *_place(starts), columns, k
        facts: dict[str, bool] = _facts.get(fact, dict)
        if not capturing():
            n = lengths.clamp(min=0)
            whole = bool(((starts == 0) & (n >= columns)).all())
            facts |= {"whole": whole, "short": bool((n < kept).any())}
            if not whole and "masked" not in b:
                b["masked"] = new(rows, columns, dtype=dtype)
                b["inside"] = new(rows, columns, dtype=torch.bool)
                b["outside"] = new(rows, columns, dtype=torch.bool)
                b["column"] = torch.arange(columns, device=device)[None]
                b["least"] = torch.full((), -torch.inf, dtype=dtype, device=device)
        self._facts = facts
        if not self._facts["whole"]:
            ends = (starts + lengths)[:, None]
            torch.ge(b["column"], starts[:, None], out=b["inside"])
            torch.ge(b["column"], ends, out=b["outside"])
            torch.gt(b["inside"], b["outside"], out=b["inside"])
            logits = torch.where(b["inside"], logits, b["least"], out=b["masked"])
        torch.topk(logits, kept, dim=1, sorted=False, out=(b["values"], b["indices"]))
        if not self._facts["whole"]:
            b["indices"].sub_(starts[:, None])
        self._b = b

    def columns(self, out: torch.Tensor) -> None:
        """Write the columns, counted from the row's start."""
        out[:, : self.kept].copy_(self._b["indices"])
        self._pad(out)

    def slots(self, page_table: torch.Tensor, out: torch.Tensor) -> None:
        """Write the pool slots of the columns."""
        b = self._b
        torch.div(b["indices"], PAGE_SIZE, rounding_mode="floor", out=b["page"])
        torch.gather(page_table, 1, b["page"], out=b["slot"])
        b["slot"].mul_(PAGE_SIZE)
        torch.remainder(b["indices"], PAGE_SIZE, out=b["page"])
        out[:, : self.kept].copy_(b["slot"].add_(b["page"]))
        self._pad(out)

    def _pad(self, out: torch.Tensor) -> None:
        if self.kept < out.shape[1]:
            out[:, self.kept :].fill_(-1)
        if self._facts["short"]:
            b = self._b
            torch.ge(b["indices"], self.lengths[:, None], out=b["beyond"])
            out[:, : self.kept].masked_fill_(b["beyond"], -1)
            torch.lt(b["indices"], 0, out=b["beyond"])
            out[:, : self.kept].masked_fill_(b["beyond"], -1)


def logits(
    q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor,
    block_table: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Gather the pages, multiply in float32 and sum the heads: the definition of the scores.

    SGLang has such a fallback for GPUs without DeepGEMM, in bfloat16. It needs a multiple of the
    cache's memory; a cell that does not fit is refused.
    """
    batch, next_n, heads, dim = q.shape
    pages = cache.flatten(1)[block_table.long().flatten()]
    split = PAGE_SIZE * dim
    keys = pages[:, :split].reshape(batch, -1, dim).view(torch.float8_e4m3fn).float()
    scales = pages[:, split:].contiguous().view(torch.float32).reshape(batch, 1, -1)
    dots = torch.bmm(q.float().flatten(1, 2), keys.transpose(1, 2)).relu_()
    dots = dots.unflatten(1, (next_n, heads)).mul_(weights.view(batch, next_n, heads, 1))
    return dots.sum(2).mul_(scales).flatten(0, 1).to(dtype)


def ragged_logits(
    q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor,
    row_starts: torch.Tensor, row_ends: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Like :func:`logits`, for contiguous keys, one head at a time; it ignores the windows."""
    keys, query = k.float().T, q.float()
    total = torch.zeros(q.shape[0], k.shape[0], device=q.device)
    for head in range(q.shape[1]):
        total.addcmul_(torch.mm(query[:, head], keys).relu_(), weights[:, head : head + 1])
    return total.mul_(k_scale).to(dtype)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


FORMS: dict[str, tuple[tuple[str, Any], ...]] = {
    "decode": (("", lambda: decode),),
    "prefill": (("", lambda: prefill),),
    "paged": (("", lambda: paged),),
    "gather": (("", "it has no gather of the quantised cache; its reads are the rows 'torch'"),),
    "logits": (("", lambda: logits),),
    "ragged_logits": (("", lambda: ragged_logits),),
}
