"""FlashInfer: its fused top-k functions, which vLLM and SGLang call on request.

FlashInfer itself chooses its kernel (radix, clusters, CUB). Read in FlashInfer 0.6 and 0.7.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from dsv4_plugin.cli.bench.upstream.prepared import (
    Prepared,
    imported,
    lengths_of,
    need,
    release,
    zeros_for,
)
from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE

__all__ = ["CHOICE", "FORMS", "name"]

CHOICE = None  # FlashInfer is no engine, so no chain ends with its top-k

_windows = Prepared("the windows' lengths")


def name() -> str | None:
    """Return FlashInfer's name with its release; None if it is not installed."""
    return release("flashinfer", "flashinfer-python")


def _function(name: str) -> Any:
    found = getattr(imported("flashinfer"), name, None)
    if found is None:
        raise LookupError(f"flashinfer has no {name}")
    return found


def _safe(function: Any) -> dict[str, Any]:
    """Return the argument that makes a call safe in a CUDA graph, if the release has it."""
    return {"dsa_graph_safe": True} if _takes(function, "dsa_graph_safe") else {}


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _decode() -> Any:
    ragged = _function("top_k_ragged_transform")
    more = _safe(ragged)

    def decode(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
        """``flashinfer.top_k_ragged_transform``, as vLLM's ``flashinfer`` backend calls it.

        Arguments: scores, offsets (zeros), lengths, k. It returns a new tensor. The peer copies it,
        as vLLM does, so the time includes the copy. ``dsa_graph_safe`` is passed as SGLang passes
        it.
        """
        need(logits.is_contiguous(), "takes contiguous scores only")
        out.copy_(ragged(logits, zeros_for(lengths, _windows), lengths, k, **more))

    return decode


def _prefill() -> Any:
    ragged = _function("top_k_ragged_transform")
    if not _takes(ragged, "row_starts"):
        raise LookupError("this release's top_k_ragged_transform takes no row_starts")
    more = _safe(ragged)

    def prefill(
        logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``flashinfer.top_k_ragged_transform`` with ``row_starts``, as SGLang's backend calls it.

        Arguments as in :func:`_decode`; with offsets of zero, indices count from the row's start.
        """
        need(logits.is_contiguous(), "takes contiguous scores only")
        lengths = lengths_of(row_starts, row_ends, _windows)
        zeros = zeros_for(lengths, _windows)
        out.copy_(ragged(logits, zeros, lengths, k, row_starts=row_starts, **more))

    return prefill


def _paged() -> Any:
    transform = _function("top_k_page_table_transform")
    for name in ("page_size", "out"):
        if not _takes(transform, name):
            raise LookupError(f"this release's top_k_page_table_transform takes no {name}")
    more = _safe(transform)

    def paged(
        logits: torch.Tensor, lengths: torch.Tensor, page_table: torch.Tensor, k: int,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``flashinfer.top_k_page_table_transform``, as SGLang's ``flashinfer`` backend calls it.

        Arguments: scores, page table, lengths, k, and by name ``page_size`` and ``out``.
        """
        transform(logits, page_table, lengths, k, page_size=PAGE_SIZE, out=out, **more)

    return paged


_UNUSED = (" logits", "no function of it that scores this cache is called by an engine")
FORMS = {
    "decode": (("", _decode),),
    "prefill": ((" prefill", _prefill),),
    "paged": ((" paged", _paged),),
    "gather": ((" gather", "no gather of this cache is known of it"),),
    "logits": (_UNUSED,),
    "ragged_logits": (_UNUSED,),
}
