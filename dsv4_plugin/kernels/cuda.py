"""The compiled kernels of ``csrc/``, loaded through apache-tvm-ffi.

One shared library serves every torch, Python and CUDA 12/13 host, because it links to none of
them (``docs/packaging.md``). It is loaded when it is first needed and never compiled here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin.kernels.arguments import TopkArgs

__all__ = [
    "ALIGNMENT",
    "BLOCK_SIZES",
    "CAPABILITIES",
    "FP4_FORM",
    "HEADS",
    "HEAD_DIM",
    "LIBRARY",
    "MAX_CANDIDATES",
    "PIECE",
    "SOLO",
    "block_maxima",
    "candidate_logits",
    "candidate_logits_ragged",
    "gather_indexer_cache",
    "missing",
    "paged_logits",
    "ragged_logits",
    "read_indexer_cache",
    "select_blocks",
    "select_candidates",
    "topk",
]

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
CAPABILITIES = ((9, 0),)  # what csrc/build.py compiles for
HEAD_DIM = 128  # what the kernels of the cache and of the logits are written for
HEADS = (32, 64)  # what those of the logits are written for
BLOCK_SIZES = (32, 64)  # keys a page, for the logits
FP4_FORM = ((32,), (64,))  # the same two where the keys are FP4
PIECE = 8  # keys a block of candidates
MAX_CANDIDATES = 2048  # blocks a row
ALIGNMENT = 16  # bytes a lane loads or stores at a time
# solo_units() of the top-k, in scores, by the threads of a CTA.
SOLO = {256: 4096, 512: 8192, 1024: 8192}


@functools.lru_cache(maxsize=1)
def _module() -> tuple[Any, str | None]:
    if not LIBRARY.is_file():
        return None, (
            f"the compiled library {LIBRARY.name} is not in this installation (built without "
            "nvcc; see 'Install' in the README)"
        )
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(LIBRARY)), None
    except Exception as error:
        return None, f"the compiled library {LIBRARY.name} cannot be loaded ({error})"


def missing() -> str | None:
    """Return why the library cannot be used, or ``None`` if it can."""
    return _module()[1]


@functools.cache
def _function(name: str) -> Any:
    module, why = _module()
    if module is None:
        raise RuntimeError(f"dsv4: {why}")
    return module.get_function(name)


def topk(args: TopkArgs) -> None:
    """Select the ``k`` largest columns of every row; see :func:`dsv4_plugin.topk`."""
    _function("dsv4_topk")(*args)


def topk_with(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    threads: int,
    cluster: int,
    solo: int | None = None,
    page_table: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
) -> None:
    """Select with a choice of the caller's in place of the table's, whose answers are the same.

    For the sweeps that the table comes from (:mod:`benchmarks.tuning.sweep`), and tests.

    Args:
        logits: as in :func:`dsv4_plugin.topk`.
        lengths: as in :func:`dsv4_plugin.topk`, one a row.
        out: as there; ``k`` is its columns.
        threads: of a CTA, 256 or 512; 1024: the kernel for rows of any width.
        cluster: CTAs a row.
        solo: the longest row that one of these CTAs serves alone, in scores; a multiple of 8 from
            1,024 on. None: :data:`SOLO`.
        page_table: as there, of pages of 64.
        out_counts: as there.

    Raises:
        ValueError: the CTAs do not hold a row of so many columns, or there is no such choice.
    """
    args = TopkArgs(
        logits, lengths, out, None, None, page_table, out.shape[1], 1, 64, False, out_counts
    )
    longest = SOLO.get(threads, 0) if solo is None else solo
    _function("dsv4_topk_with")(*args, threads, cluster, longest)


def read_indexer_cache(
    pages: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    head_dim: int,
) -> None:
    """Dequantise the FP8 keys at ``slots`` into ``out``; see :mod:`dsv4_plugin.ops.cache`."""
    if slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        slots = slots.to(torch.int64).contiguous()
    _function("dsv4_read")(pages, slots, out, block_size)


def gather_indexer_cache(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    values_out: torch.Tensor,
    scales_out: torch.Tensor | None,
    block_size: int,
    head_dim: int,
) -> None:
    """Gather the keys of every sequence; see :mod:`dsv4_plugin.ops.cache`."""
    _function("dsv4_gather")(
        pages, block_table, cu_seq_lens.contiguous(), values_out, scales_out, block_size
    )


def paged_logits(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    next_n: int,
    block_size: int,
) -> None:
    """Score the keys of every request's pages; see :func:`dsv4_plugin.paged_logits`."""
    _function("dsv4_paged_logits")(q, pages, weights, lengths, block_table, out, block_size)


def ragged_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Score a window of gathered keys for every row; see :func:`dsv4_plugin.ragged_logits`."""
    _function("dsv4_ragged_logits")(q, k, k_scale, weights, row_starts, row_ends, out)


def block_maxima(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    logits: torch.Tensor | None,
    next_n: int,
    block_size: int,
    piece: int,
) -> None:
    """Score every block of keys; see :func:`dsv4_plugin.block_maxima`."""
    _function("dsv4_block_maxima")(q, pages, weights, lengths, block_table, out, logits, block_size)


def select_blocks(
    maxima: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    out_counts: torch.Tensor | None,
    k: int,
    next_n: int,
    piece: int,
) -> None:
    """Select the ``k`` best blocks of every row; see :func:`dsv4_plugin.select_blocks`."""
    _function("dsv4_select_blocks")(maxima, lengths, out, out_counts, k, next_n)


def candidate_logits(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    out: torch.Tensor,
    out_lengths: torch.Tensor | None,
    next_n: int,
    block_size: int,
    piece: int,
) -> None:
    """Score the keys of every row's candidates; see :func:`dsv4_plugin.candidate_logits`."""
    _function("dsv4_candidate_logits")(
        q, pages, weights, candidates, lengths, block_table, out, out_lengths, block_size
    )


def candidate_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    out: torch.Tensor,
    out_lengths: torch.Tensor | None,
    piece: int,
) -> None:
    """Score candidates among gathered keys; see :func:`dsv4_plugin.candidate_logits_ragged`."""
    _function("dsv4_candidate_logits_ragged")(
        q, k, k_scale, weights, candidates, row_starts, row_ends, out, out_lengths
    )


def select_candidates(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k: int,
    next_n: int,
    piece: int,
    page_size: int,
) -> None:
    """Select the ``k`` best keys of the candidates; see :func:`dsv4_plugin.select_candidates`."""
    _function("dsv4_select_candidates")(
        logits, candidates, lengths, out, out_slots, out_counts, block_table, k, next_n, page_size
    )
