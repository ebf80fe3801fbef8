"""The public ops of the indexer.

Every op validates its arguments, takes the implementation that :mod:`dsv4_plugin.backends`
chooses, and is registered as ``torch.ops.dsv4.*`` (:mod:`dsv4_plugin.library`) for
``torch.compile``; outside a compiler it calls the implementation without the dispatcher.

**The indexer cache.** uint8, one page holds ``block_size`` keys and is *page-planar*: first
``block_size × head_dim`` e4m3 bytes, then ``block_size`` float32 scales. It comes as ``[pages,
bytes]`` (a page may be longer than its content), ``[pages, block_size, head_dim + 4]`` or
``[pages, block_size, 1, head_dim + 4]``; the page stride is free, so a strided view of an arena
works. The MXFP4 form holds ``block_size × head_dim / 2`` bytes of two FP4 (e2m1) values each, low
nibble first, then ``block_size × head_dim / 32`` UE8M0 scales.

**A position that is no key.** A slot or a page below zero is padding and reads as zeros. A slot or
a page past the end is an error of the caller: slots on the CPU raise ``IndexError``; on a GPU,
where raising would cost a synchronisation, such a key reads as NaN, and memory outside the cache
is never touched.

**Memory.** An output shares memory with no other output and with no input: that is a ``ValueError``
before anything is written. Slices of one buffer that do not overlap are separate. Inputs may share
memory with each other.

**Tensors.** A subclass of a tensor is served as the plain tensor. A tensor on the meta device among
others is a ``ValueError``; with all tensors there an op gives the shape of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import checks, library
from dsv4_plugin.backends import Call, resolve

__all__ = ["gather_indexer_cache", "read_indexer_cache", "read_indexer_cache_mxfp4", "topk"]


def read_indexer_cache(
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    block_size: int = 64,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Dequantise the FP8 keys at ``slot_mapping``.

    ``value × scale`` in float32, rounded once if ``dtype`` is bfloat16: bit-identical to reading
    the tokens one by one. No host synchronisation when ``slot_mapping`` is on the cache's device.

    Args:
        cache: uint8 indexer cache; see the module's documentation for its layout.
        slot_mapping: ``[tokens]``, any integer dtype, any device; slot ``s`` is key
            ``s % block_size`` of page ``s // block_size``. Below zero: padding, reads as zeros.
            Dtypes other than int32 and int64 are converted first.
        block_size: keys a page.
        head_dim: values a key; a multiple of 4.
        dtype: float32 or bfloat16; ignored when ``out`` is given.
        out: ``[tokens, head_dim]`` float32 or bfloat16 to fill, unit inner stride.
        backend: ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``[tokens, head_dim]``: ``out``, or a new tensor on the cache's device. An empty cache
        gives zeros.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        IndexError: a slot of a CPU ``slot_mapping`` is past the end of the cache.
        UnmetError: ``backend`` cannot serve the call.

    Source: TokenSpeed #238, and the per-token loop it replaces.
    """
    return _read("read", cache, slot_mapping, block_size, head_dim, dtype, out, backend)


def read_indexer_cache_mxfp4(
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    block_size: int = 64,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Dequantise the MXFP4 keys at ``slot_mapping``.

    As :func:`read_indexer_cache`, for rows of FP4 (e2m1) values in blocks of 32 that share a UE8M0
    scale: ``head_dim / 2`` bytes of values (low nibble first) and ``head_dim / 32`` bytes of
    scales a key, page-planar. ``head_dim`` must be a multiple of 32. A scale byte of 255 is NaN.
    """
    return _read("read_mxfp4", cache, slot_mapping, block_size, head_dim, dtype, out, backend)


_GATHERED = (torch.float8_e4m3fn, torch.uint8, *checks.OUT_DTYPES)

# op → (bytes a key, what head_dim must be a multiple of)
_ROW_BYTES = {
    "read": (lambda head_dim: head_dim + 4, 4),
    "read_mxfp4": (lambda head_dim: head_dim // 2 + head_dim // 32, 32),
}


def _read(
    op: str,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    if not library.through_dispatcher(cache, slot_mapping, out):
        return run_read(op, cache, slot_mapping, block_size, head_dim, dtype, out, backend)
    if out is None:
        return library.functional(op)(cache, slot_mapping, block_size, head_dim, dtype, backend)
    library.mutating(op)(cache, slot_mapping, out, block_size, head_dim, backend)
    return out


def run_read(
    op: str,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    """Serve a read: what is behind its public face and behind ``torch.ops``."""
    row_bytes, multiple = _ROW_BYTES[op]
    checks.geometry(block_size, head_dim, multiple)
    pages = checks.as_pages(cache, block_size, row_bytes(head_dim))
    checks.tensor("slot_mapping", slot_mapping, checks.INTEGER_DTYPES, (1,))
    slots = checks.as_slots(slot_mapping)
    checks.slots_within(slots, pages.shape[0] * block_size, block_size)
    tokens = slots.shape[0]
    if out is None:
        checks.dtype_in("dtype", dtype, checks.OUT_DTYPES)
        out = torch.empty(tokens, head_dim, dtype=dtype, device=cache.device)
    else:
        shape = (tokens, head_dim)
        checks.out_matrix("out", out, shape, checks.OUT_DTYPES, cache.device, "cache")
        checks.separate((("out", out),), (("cache", cache), ("slot_mapping", slot_mapping)))
    if tokens:
        aligned = checks.alignment(pages, out)
        call = Call(op, cache.device, out.dtype, head_dim=head_dim, alignment=aligned)
        run = resolve(call, backend)
        if pages.shape[0] == 0:  # no page that padding could be read from
            out.zero_()
        else:
            run(pages, slots.to(cache.device), out, block_size, head_dim)
    return out


def gather_indexer_cache(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    *,
    block_size: int = 64,
    head_dim: int = 128,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Gather the FP8 keys of every sequence, one sequence after the other.

    Key ``t`` of the result, with ``cu_seq_lens[b] <= t < cu_seq_lens[b + 1]``, is position
    ``t - cu_seq_lens[b]`` of sequence ``b``.

    Args:
        cache: uint8 indexer cache; see the module's documentation for its layout.
        block_table: ``[batch, pages]`` int32 page numbers, unit inner stride; below zero: padding.
        cu_seq_lens: ``[batch + 1]`` int32 or int64, starting at 0, not decreasing. Its values are
            looked at where that costs nothing more: on a CPU, and where there is no ``out``.
        block_size: keys a page.
        head_dim: values a key; a multiple of 4.
        dtype: None keeps the keys quantised: ``(values, scales)``. float32 or bfloat16
            dequantises: ``value × scale`` in float32, rounded once.
        out: what to fill. Quantised: ``(values, scales)`` with values float8_e4m3fn or uint8
            ``[T, head_dim]`` and scales float32 ``[T]`` or ``[T, 1]``, or uint8 ``[T, 4]``.
            Dequantised: ``[T, head_dim]`` of ``dtype``. Rows at and past ``cu_seq_lens[-1]`` stay
            as they are. Without ``out`` the size is read from ``cu_seq_lens``, which
            synchronises if that is on a GPU; give ``out`` under CUDA graphs.
        backend: ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or new tensors on the cache's device: values float8_e4m3fn ``[T, head_dim]`` and
        scales float32 ``[T]``, or keys ``[T, head_dim]`` of ``dtype``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device, or values
            of ``cu_seq_lens`` that were looked at are wrong.
        UnmetError: ``backend`` cannot serve the call.

    Source: the contract of vLLM's ``cp_gather_indexer_k_quant_cache``.
    """
    if out is None:
        out = _new_gathered(cache, block_table, cu_seq_lens, block_size, head_dim, dtype)
    if isinstance(out, torch.Tensor):
        if dtype is None or out.dtype != dtype:
            raise ValueError(
                f"out must be (values, scales) with dtype None, or a tensor of dtype; "
                f"got dtype {dtype} and a tensor of {out.dtype}"
            )
        values, scales = out, None
    else:
        if dtype is not None:
            raise ValueError(f"out must be a tensor of dtype {dtype}, got {type(out).__name__}")
        if len(out) != 2:
            raise ValueError(f"out must be (values, scales), got {len(out)} elements")
        values, scales = out
        checks.tensor("out[1]", scales, (torch.float32, torch.uint8), (1, 2))
    if library.through_dispatcher(cache, block_table, cu_seq_lens, values, scales):
        library.mutating("gather")(
            cache, block_table, cu_seq_lens, values, scales, block_size, head_dim, backend
        )
    else:
        run_gather(cache, block_table, cu_seq_lens, values, scales, block_size, head_dim, backend)
    return out


def _new_gathered(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return new outputs of a gather, as many rows as ``cu_seq_lens`` says."""
    checks.geometry(block_size, head_dim, 4)
    if dtype is not None:
        checks.dtype_in("dtype", dtype, checks.OUT_DTYPES)
    checks.tensor("cache", cache, (torch.uint8,), (2, 3, 4))
    device = cache.device
    checks.sequences(block_table, cu_seq_lens, device)
    if device.type == "meta":
        raise ValueError("out must be given on the meta device: cu_seq_lens has no values there")
    total = checks.sequence_ends(cu_seq_lens)
    if dtype is not None:
        return torch.empty(total, head_dim, dtype=dtype, device=device)
    values = torch.empty(total, head_dim, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(total, dtype=torch.float32, device=device)


def run_gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    block_size: int,
    head_dim: int,
    backend: str | None = None,
) -> None:
    """Serve a gather: what is behind its public face and behind ``torch.ops``."""
    checks.geometry(block_size, head_dim, 4)
    pages = checks.as_pages(cache, block_size, head_dim + 4)
    device = cache.device
    checks.sequences(block_table, cu_seq_lens, device)
    if device.type == "cpu":
        checks.sequence_ends(cu_seq_lens)
    checks.tensor("out" if scales is None else "out[0]", values, _GATHERED, (2,))
    shape = (values.shape[0], head_dim)
    if scales is None:
        checks.out_matrix("out", values, shape, checks.OUT_DTYPES, device, "cache")
    else:
        bytes_ = (torch.float8_e4m3fn, torch.uint8)
        checks.out_matrix("out[0]", values, shape, bytes_, device, "cache")
        checks.tensor("out[1]", scales, (torch.float32, torch.uint8), (1, 2))
        checks.on_device("out[1]", scales, device, "cache")
        tokens = values.shape[0]
        allowed = {(tokens,), (tokens, 1)} if scales.dtype == torch.float32 else {(tokens, 4)}
        if tuple(scales.shape) not in allowed or not scales.is_contiguous():
            raise ValueError(
                f"out[1] must be contiguous float32 [{tokens}] or [{tokens}, 1] or uint8 "
                f"[{tokens}, 4], got {scales.dtype} {tuple(scales.shape)} with strides "
                f"{scales.stride()}"
            )
        if scales.data_ptr() % 4:
            raise ValueError("out[1] must start at a multiple of 4 bytes, the size of a scale")
    names = ("out",) if scales is None else ("out[0]", "out[1]")
    checks.separate(
        zip(names, (values, scales), strict=False),
        (("cache", cache), ("block_table", block_table), ("cu_seq_lens", cu_seq_lens)),
    )
    if scales is not None:
        values = values.view(torch.uint8)
        scales = scales.view(torch.float32).reshape(values.shape[0])
    if values.shape[0]:
        aligned = checks.alignment(pages, values)
        call = Call("gather", device, values.dtype, head_dim=head_dim, alignment=aligned)
        run = resolve(call, backend)
        ends = cu_seq_lens.contiguous()
        run(pages, block_table, ends, values, scales, block_size, head_dim)


def topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    next_n: int = 1,
    row_starts: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    page_size: int = 64,
    out: torch.Tensor | None = None,
    out_raw: torch.Tensor | None = None,
    out_counts: torch.Tensor | None = None,
    sort: bool = False,
    narrow: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Select the ``k`` largest of the first columns of every row, exactly.

    Set, ties and order are separate promises:

    * **set**: exactly the ``k`` largest of the row's ``length`` columns, compared in the dtype of
      ``logits``. ``-inf`` and ``inf`` are numbers like any other, ``-0.0`` equals ``0.0``, and a
      NaN is chosen only when no number is left.
    * **ties**: the lowest column wins, among NaN too.
    * **order**: ascending columns, then -1. With ``sort`` the largest comes first and the lower
      column first among equals.
    * **short rows**: ``length <= k`` gives ``0 … length - 1`` and then -1, in this order even with
      ``sort``, without the scores mattering: they may be uninitialised. ``length <= 0`` gives -1.
    * **independence**: nothing at or past a row's length matters, and a row's answer depends on
      that row alone, not on the batch, the grid or the width of the buffer.

    Args:
        logits: ``[rows, columns]`` float32, bfloat16 or float16; unit inner stride, any row stride.
        lengths: int32 or int64 columns in each row: ``[rows]``, or ``[batch, next_n]`` with
            ``rows = batch · next_n``; or one a request, ``[batch]`` or ``[batch, 1]``, by the
            engines' rule that row ``b · next_n + j`` has ``lengths[b] - next_n + 1 + j`` columns.
            Clipped to what the row has.
        k: 1 … 2048.
        next_n: rows a request has (speculative decoding).
        row_starts: ``[rows]`` int32 or int64: the row's columns begin there, and the indices
            count from there. A start below zero gives an empty row.
        page_table: ``[rows, pages]`` or ``[batch, pages]`` int32 page numbers, unit inner stride.
            ``out`` then holds pool slots: ``page_table[r, i // page_size] · page_size +
            i % page_size``, in the order of the indices; -1 where there is no index, the page is
            below zero or not in the table, or the slot is more than int32 holds.
        page_size: columns a page of ``page_table``.
        out: ``[rows, k]`` int32 to fill, a slice of a wider buffer or not.
        out_raw: ``[rows, k]`` int32 that gets the indices themselves beside ``page_table``.
        out_counts: ``[rows]`` int32, contiguous, that gets how many indices each row has: its
            clipped length, at most ``k``. They come first in the row, -1 after them.
        sort: sort by value. A row no longer than ``k`` keeps the order of its columns.
        narrow: round float32 ``logits`` to bfloat16 while reading and select on that: the same
            result as ``topk(logits.bfloat16(), …)`` without the extra pass.
        backend: ``"cuda"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or a new ``[rows, k]`` int32 tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device.
        UnmetError: ``backend`` cannot serve the call.

    Source: vLLM #40811 for the bfloat16 input; the engines' top-k kernels for the forms.
    """
    tensors = (logits, lengths, row_starts, page_table, out, out_raw, out_counts)
    if not library.through_dispatcher(*tensors):
        return run_topk(
            logits, lengths, k, next_n, row_starts, page_table, page_size, out, out_raw,
            out_counts, sort, narrow, backend,
        )  # fmt: skip
    if out is None and out_raw is None and out_counts is None:
        return library.functional("topk")(
            logits, lengths, k, next_n, row_starts, page_table, page_size, sort, narrow, backend
        )
    if out is None:
        checks.size("k", k)
        out = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
    library.mutating("topk")(
        logits, lengths, out, out_raw, row_starts, page_table, k, next_n, page_size, sort,
        narrow, backend, out_counts,
    )  # fmt: skip
    return out


def run_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    next_n: int,
    row_starts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_size: int,
    out: torch.Tensor | None,
    out_raw: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    sort: bool,
    narrow: bool,
    backend: str | None,
) -> torch.Tensor:
    """Serve a top-k: what is behind its public face and behind ``torch.ops``."""
    out, run, arguments = prepare_topk(
        logits, lengths, k, next_n, row_starts, page_table, page_size, out, out_raw, out_counts,
        sort, narrow, backend,
    )  # fmt: skip
    run(*arguments)
    return out


def prepare_topk(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    next_n: int,
    row_starts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_size: int,
    out: torch.Tensor | None,
    out_raw: torch.Tensor | None,
    out_counts: torch.Tensor | None,
    sort: bool,
    narrow: bool,
    backend: str | None,
) -> tuple[torch.Tensor, Callable[..., None], tuple[Any, ...]]:
    """Check a top-k and return its result, what computes it, and the arguments of that."""
    rows = checks.scores("logits", logits).shape[0]
    checks.size("k", k)
    checks.size("next_n", next_n)
    checks.size("page_size", page_size)
    checks.lengths_for(lengths, rows, next_n, logits.device)
    if row_starts is not None:
        checks.tensor("row_starts", row_starts, checks.INDEX_DTYPES, (1,))
        checks.on_device("row_starts", row_starts, logits.device, "logits")
        if row_starts.shape[0] != rows:
            raise ValueError(f"row_starts must have {rows} entries, got {row_starts.shape[0]}")
    if page_table is not None:
        checks.table("page_table", page_table, rows, next_n, logits.device)
    elif out_raw is not None:
        raise ValueError("out_raw needs page_table: without it out holds the indices themselves")
    if narrow and logits.dtype != torch.float32:
        raise ValueError(f"narrow needs float32 logits, got {logits.dtype}")
    shape = (rows, k)
    given = out
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=logits.device)
    else:
        checks.out_matrix("out", out, shape, (torch.int32,), logits.device, "logits")
    if out_raw is not None:
        checks.out_matrix("out_raw", out_raw, shape, (torch.int32,), logits.device, "logits")
    if out_counts is not None:
        checks.out_vector("out_counts", out_counts, rows, logits.device, "logits")
    checks.separate(
        (("out", given), ("out_raw", out_raw), ("out_counts", out_counts)),
        (("logits", logits), ("lengths", lengths), ("row_starts", row_starts),
         ("page_table", page_table)),
    )  # fmt: skip
    if not rows:
        return out, nothing, ()
    run = resolve(Call("topk", logits.device, logits.dtype, k), backend)
    return out, run, (
        logits, lengths, out, out_raw, row_starts, page_table, k, next_n, page_size, sort, narrow,
        out_counts,
    )  # fmt: skip


def nothing(*_: object) -> None:
    """Run in place of an implementation where no row or no column is asked for."""
