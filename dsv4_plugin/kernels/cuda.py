"""The compiled kernels of ``csrc/``, loaded through apache-tvm-ffi.

One shared library serves every torch, Python and CUDA 12/13 host, because it links to none of them
(``docs/packaging.md``). It is loaded on first use and never compiled at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin.kernels.arguments import TopkArgs

__all__ = [
    "ALIGNMENT", "BLOCK_SIZES", "CAPABILITIES", "FP4_FORM", "GUESS", "HEADS", "HEAD_DIM", "LIBRARY",
    "MAX_CANDIDATES", "PIECE", "REPAIR", "SOLO", "block_maxima", "candidate_logits",
    "candidate_logits_ragged", "candidate_select", "gather_indexer_cache", "missing",
    "paged_logits", "ragged_logits", "read_indexer_cache", "select_blocks", "select_candidates",
    "topk",
]  # fmt: skip

LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
REPAIR = "DSV4_BUILD_CUDA=1 pip install --force-reinstall --no-deps ."
CAPABILITIES = ((9, 0),)  # what csrc/build.py compiles for
HEAD_DIM = 128  # the only size that the kernels of the cache and the logits have
HEADS = (32, 64)  # the numbers of heads that the kernels of the logits have
BLOCK_SIZES = (32, 64)  # keys per page, for the logits
FP4_FORM = ((32,), (64,))  # HEADS and BLOCK_SIZES for FP4 keys
PIECE = 8  # keys per block of candidates
MAX_CANDIDATES = 2048  # blocks per row
ALIGNMENT = 16  # bytes that a lane loads or stores at a time
GUESS = 0  # threads of a CTA: 512, and the kernel guesses the threshold
# Threads of a CTA → solo_units() of the top-k, in scores.
SOLO = {GUESS: 8192, 256: 4096, 512: 8192, 1024: 8192}


@functools.lru_cache(maxsize=1)
def _module() -> tuple[Any, str | None]:
    if not LIBRARY.is_file():
        return None, (
            f"the compiled library {LIBRARY.name} is not in this installation (it was built "
            f"without nvcc; in a checkout with nvcc: {REPAIR})"
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


def _compiled(name: str, fixed: bool = False) -> Callable[..., None]:
    """Return a function of the library with the parameters of the reference.

    Args: name: of the function. fixed: the function is compiled for one value of the last argument
    and does not take it.
    """

    def with_all(*args: Any) -> None:
        _function(name)(*args)

    def but_for_last(*args: Any) -> None:
        _function(name)(*args[:-1])

    return but_for_last if fixed else with_all


paged_logits = _compiled("dsv4_paged_logits")
ragged_logits = _compiled("dsv4_ragged_logits")
# compiled for HEAD_DIM:
read_indexer_cache = _compiled("dsv4_read", fixed=True)
gather_indexer_cache = _compiled("dsv4_gather", fixed=True)
# compiled for PIECE:
block_maxima = _compiled("dsv4_block_maxima", fixed=True)
select_blocks = _compiled("dsv4_select_blocks", fixed=True)
candidate_logits = _compiled("dsv4_candidate_logits", fixed=True)
candidate_logits_ragged = _compiled("dsv4_candidate_logits_ragged", fixed=True)
select_candidates = _compiled("dsv4_select_candidates", fixed=True)


def candidate_select(
    q: torch.Tensor,
    pages: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    out: torch.Tensor,
    out_slots: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    k: int,
    block_size: int,
    page_size: int,
    piece: int,
) -> None:
    """Score the keys of the candidates into ``logits`` and select the ``k`` best.

    See :func:`dsv4_plugin.candidate_select`. The second kernel begins before the first one ends,
    and relies on being the next kernel in the stream.
    """
    candidate_logits(
        q, pages, weights, candidates, lengths, block_table, logits, None, block_size, piece
    )
    _function("dsv4_select_behind_logits")(
        logits,
        candidates,
        lengths,
        out,
        out_slots,
        out_counts,
        page_table,
        k,
        q.shape[1],
        page_size,
    )


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
    """Select with the launch choice of the caller instead of the table's; the answers are the same.

    For the sweeps that the table is made from (:mod:`benchmarks.tuning.sweep`), and for tests.

    Args:
        logits: as :func:`dsv4_plugin.topk` takes them.
        lengths: one per row, as :func:`dsv4_plugin.topk` takes them.
        out: as :func:`dsv4_plugin.topk` takes it; ``k`` is the number of its columns.
        threads: per CTA, 256 or 512; 1024 means the kernel for rows of any width; :data:`GUESS`
            means 512 threads and a guess of the threshold (float32 only, one CTA per row).
        cluster: CTAs per row.
        solo: the longest row that one of these CTAs serves alone, in scores; a multiple of 8 from
            1,024 on. None: :data:`SOLO`.
        page_table: as :func:`dsv4_plugin.topk` takes it, with pages of 64.
        out_counts: as :func:`dsv4_plugin.topk` takes it.

    Raises:
        ValueError: the CTAs cannot hold a row of so many columns, or there is no such choice.
        TypeError: there is no guess for logits of this dtype.
    """
    args = TopkArgs(
        logits, lengths, out, None, None, page_table, out.shape[1], 1, 64, False, out_counts
    )
    longest = SOLO.get(threads, 0) if solo is None else solo
    _function("dsv4_topk_with")(*args, threads, cluster, longest)
