"""Validation of arguments: every message names the argument, what came and what is allowed.

No check reads the data of a tensor on a GPU, so no check synchronises. The one exception is
:func:`sequence_ends`, which says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from dsv4_plugin.kernels.arguments import MAX_INT32, MAX_K, TopkArgs, reads_fp4

__all__ = [
    "E4M3_DTYPES", "INDEX_DTYPES", "INTEGER_DTYPES", "LOGITS_DTYPES", "OUT_DTYPES", "as_pages",
    "as_slots", "bounds", "candidates", "dtype_in", "geometry", "head_weights", "keys",
    "lengths_for", "on_device", "out_matrix", "positive", "queries", "scores", "scores_dtype",
    "separate", "sequence_ends", "sequences", "size", "slots_within", "table", "tensor", "topk",
]  # fmt: skip

INDEX_DTYPES = (torch.int32, torch.int64)
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
OUT_DTYPES = (torch.float32, torch.bfloat16)
E4M3_DTYPES = (torch.float8_e4m3fn, torch.uint8)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _show(t: torch.Tensor) -> str:
    name = str(t.dtype).removeprefix("torch.")
    return f"{name} {tuple(t.shape)} with strides {t.stride()} on {t.device}"


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...]) -> None:
    """Check that ``value`` is a tensor of one of ``dtypes``, its ndim in ``dims``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {_names(dtypes)}, got {_show(value)}")
    if value.dim() not in dims:
        allowed = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name} must have {allowed} dimensions, got {_show(value)}")


def dtype_in(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that a dtype is one of those allowed."""
    if value not in dtypes:
        raise ValueError(f"{name} must be one of {_names(dtypes)}, got {value}")


def positive(name: str, value: Any, most: int | None = None) -> None:
    """Check that ``value`` is an int in 1 … ``most``."""
    if type(value) is not int and (
        isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))
    ):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < 1 or (most is not None and value > most):
        limit = f"1 to {most}" if most is not None else "at least 1"
        raise ValueError(f"{name} must be {limit}, got {value}")


def size(name: str, value: Any) -> None:
    """Check a size that an op takes (``k``, ``next_n``, ``page_size``) against its limit."""
    positive(name, value, MAX_K if name == "k" else MAX_INT32)


def on_device(name: str, value: torch.Tensor, device: torch.device, of: str) -> None:
    """Check that a tensor is on the device that another argument is on."""
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {of} ({device}), got {_show(value)}")


def geometry(block_size: Any, head_dim: Any, multiple: int) -> None:
    """Check the numbers that describe a page."""
    positive("block_size", block_size)
    positive("head_dim", head_dim)
    if head_dim % multiple:
        raise ValueError(f"head_dim must be a multiple of {multiple}, got {head_dim}")


def as_pages(cache: Any, block_size: int, row_bytes: int) -> torch.Tensor:
    """Return the cache as a view ``[pages, >= block_size * row_bytes]`` with unit inner stride.

    Engines pass it as ``[pages, bytes]``, ``[pages, block_size, row_bytes]`` or ``[pages,
    block_size, 1, row_bytes]``. The page stride is free; the inside of a page must be contiguous.
    """
    tensor("cache", cache, (torch.uint8,), (2, 3, 4))
    need = block_size * row_bytes
    flat = cache
    if cache.dim() == 2:
        inner_ok = cache.shape[1] >= need and (cache.stride(1) == 1 or cache.shape[1] == 1)
    else:
        shape, strides = tuple(cache.shape[1:]), cache.stride()[1:]
        expected = (row_bytes, 1) if len(shape) == 2 else (row_bytes, row_bytes, 1)
        inner_ok = shape in {(block_size, row_bytes), (block_size, 1, row_bytes)} and all(
            have == want or size == 1
            for have, want, size in zip(strides, expected, shape, strict=True)
        )
        if inner_ok:
            flat = cache.as_strided((cache.shape[0], need), (cache.stride(0), 1))
    if not inner_ok:
        raise ValueError(
            f"cache must be uint8 [pages, >= {need}] with unit inner stride, or "
            f"[pages, {block_size}, {row_bytes}] or [pages, {block_size}, 1, {row_bytes}] with "
            f"contiguous pages (block_size {block_size}, {row_bytes} bytes a key), "
            f"got {_show(cache)}"
        )
    if cache.storage_offset() % 4 or (flat.stride(0) % 4 and flat.shape[0] > 1):
        raise ValueError(
            "cache must start at, and have a page stride of, a multiple of 4 bytes, the width in "
            f"which it is read; got storage offset {cache.storage_offset()}, {_show(cache)}"
        )
    return flat


def as_slots(slots: torch.Tensor) -> torch.Tensor:
    """Return the slots as contiguous int32 or int64, which is what the implementations read.

    A slot of 2**63 or more (only uint64 has those) becomes the largest int64, past every end.
    """
    if slots.dtype == torch.uint64:
        slots = slots.view(torch.int64)
        slots = slots.masked_fill(slots < 0, torch.iinfo(torch.int64).max)
    elif slots.dtype not in INDEX_DTYPES:
        slots = slots.to(torch.int64)
    return slots.contiguous()


def slots_within(slots: torch.Tensor, total: int, block_size: int) -> None:
    """Check slots on the CPU against the end of the cache; needs no synchronisation."""
    if total and slots.device.type == "cpu" and slots.numel():
        highest = int(slots.max())
        if highest >= total:
            raise IndexError(
                f"slot_mapping holds slot {highest}, past the end of a cache of {total} slots "
                f"({total // block_size} pages of {block_size})"
            )


def out_matrix(
    name: str,
    value: Any,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    of: str,
) -> None:
    """Check an output ``[rows, width]``; it may be a slice of a wider buffer."""
    tensor(name, value, dtypes, (2,))
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {_show(value)}")
    step, inner = value.stride()
    if shape[1] > 1 and inner != 1:
        raise ValueError(f"{name} must have unit stride along its rows, got {_show(value)}")
    if shape[0] > 1 and step < shape[1]:
        raise ValueError(f"{name} must not have rows that overlap, got {_show(value)}")
    on_device(name, value, device, of)


def out_vector(name: str, value: Any, size: int, device: torch.device, of: str) -> None:
    """Check an output ``[size]`` of int32."""
    tensor(name, value, (torch.int32,), (1,))
    if value.shape[0] != size:
        raise ValueError(f"{name} must have the shape ({size},), got {_show(value)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got {_show(value)}")
    on_device(name, value, device, of)


def sequences(block_table: Any, cu_seq_lens: Any, device: torch.device) -> None:
    """Check the int32 table of a gather, and the tensor that says where its sequences end."""
    tensor("block_table", block_table, (torch.int32,), (2,))
    tensor("cu_seq_lens", cu_seq_lens, INDEX_DTYPES, (1,))
    on_device("block_table", block_table, device, "cache")
    on_device("cu_seq_lens", cu_seq_lens, device, "cache")
    if cu_seq_lens.shape[0] != block_table.shape[0] + 1:
        raise ValueError(
            f"cu_seq_lens must have one entry more than block_table has rows "
            f"({block_table.shape[0]} + 1), got {cu_seq_lens.shape[0]}"
        )
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must have unit stride along its rows, got {_show(block_table)}"
        )


def sequence_ends(cu_seq_lens: torch.Tensor) -> int:
    """Check the values of ``cu_seq_lens`` and return the last; synchronises if it is on a GPU."""
    ends = cu_seq_lens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seq_lens must start at 0, got {ends[0]}")
    for at, (before, end) in enumerate(itertools.pairwise(ends), 1):
        if end < before:
            raise ValueError(
                f"cu_seq_lens must not decrease, got {end} after {before} at entry {at}"
            )
    if ends[-1] > MAX_INT32:
        raise ValueError(f"cu_seq_lens must end at most at {MAX_INT32}, got {ends[-1]}")
    return int(ends[-1])


def lengths_for(
    lengths: Any, rows: int, next_n: int, device: torch.device, of: str = "logits"
) -> None:
    """Check ``lengths``: one per row (1-D, or ``[batch, next_n]``), or one per request."""
    tensor("lengths", lengths, INDEX_DTYPES, (1, 2))
    on_device("lengths", lengths, device, of)
    if rows % next_n:
        raise ValueError(f"next_n must divide the number of rows, got next_n {next_n}, rows {rows}")
    batch = rows // next_n
    shape = tuple(lengths.shape)
    if shape != (rows,) and shape not in {(batch,), (batch, next_n), (batch, 1), (rows, 1)}:
        raise ValueError(
            f"lengths must be [{rows}] or [{batch}, {next_n}] (one a row) or [{batch}] or "
            f"[{batch}, 1] (one a request) for {rows} rows and next_n {next_n}, "
            f"got {_show(lengths)}"
        )


def table(
    name: str, value: Any, rows: int, next_n: int, device: torch.device, of: str = "logits"
) -> None:
    """Check an int32 ``[rows or rows // next_n, pages]`` table with unit inner stride."""
    tensor(name, value, (torch.int32,), (2,))
    on_device(name, value, device, of)
    held, width = value.shape
    if held not in (rows, rows // next_n):
        a_row = f"{rows} rows (one a row) or " if next_n > 1 else ""
        raise ValueError(
            f"{name} must have {a_row}{rows // next_n} rows (one a request), got {_show(value)}"
        )
    if width > 1 and value.stride()[1] != 1:
        raise ValueError(f"{name} must have unit stride along its rows, got {_show(value)}")


def scores(name: str, value: Any) -> torch.Tensor:
    """Check the scores ``[rows, columns]`` that a selection reads, and return them."""
    tensor(name, value, LOGITS_DTYPES, (2,))
    if value.shape[1] > 1 and value.stride()[1] != 1:
        raise ValueError(f"{name} must have unit stride along its rows, got {_show(value)}")
    return value


def topk(args: TopkArgs, given: torch.Tensor | None) -> None:
    """Check a top-k; ``given``: ``out`` as the caller gave it.

    If ``given`` is None, the plugin made ``out`` and has already checked ``logits`` and ``k``.
    """
    logits, lengths, _, out_raw, row_starts, page_table, k, next_n, page_size, _, out_counts = args
    if given is not None:
        scores("logits", logits)
        size("k", k)
    rows, device = logits.shape[0], logits.device
    size("next_n", next_n)
    size("page_size", page_size)
    lengths_for(lengths, rows, next_n, device)
    if row_starts is not None:
        tensor("row_starts", row_starts, INDEX_DTYPES, (1,))
        on_device("row_starts", row_starts, device, "logits")
        if row_starts.shape[0] != rows:
            raise ValueError(f"row_starts must have {rows} entries, got {row_starts.shape[0]}")
    if page_table is not None:
        table("page_table", page_table, rows, next_n, device)
    elif out_raw is not None:
        raise ValueError("out_raw needs page_table: without it out holds the indices themselves")
    if given is not None:
        out_matrix("out", given, (rows, k), (torch.int32,), device, "logits")
    if out_raw is not None:
        out_matrix("out_raw", out_raw, (rows, k), (torch.int32,), device, "logits")
    if out_counts is not None:
        out_vector("out_counts", out_counts, rows, device, "logits")
    separate(
        (("out", given), ("out_raw", out_raw), ("out_counts", out_counts)),
        (("logits", logits), ("lengths", lengths), ("row_starts", row_starts),
         ("page_table", page_table)),
    )  # fmt: skip


def candidates(value: Any, rows: int, device: torch.device, of: str) -> None:
    """Check an int32 ``[rows, at least 1]`` with unit inner stride."""
    tensor("candidates", value, (torch.int32,), (2,))
    on_device("candidates", value, device, of)
    if value.shape[0] != rows or value.shape[1] < 1:
        raise ValueError(
            f"candidates must be [{rows}, K] (one row a row of {of}, K at least 1), "
            f"got {_show(value)}"
        )
    if value.shape[1] > 1 and value.stride()[1] != 1:
        raise ValueError(f"candidates must have unit stride along its rows, got {_show(value)}")


def queries(
    q: Any, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = E4M3_DTYPES
) -> torch.Tensor:
    """Return the queries as a view ``[batch, next_n, heads, head_dim]``, uint8 if they are e4m3."""
    tensor("q", q, dtypes, dims)
    heads, head_dim = q.shape[-2:]
    row, inner = q.stride()[-2:]
    if (head_dim > 1 and inner != 1) or (heads > 1 and row != head_dim):
        raise ValueError(
            f"q must be contiguous in its last two dimensions (heads, head_dim), got {_show(q)}"
        )
    if heads < 1 or (q.dim() == 4 and q.shape[1] < 1):
        raise ValueError(f"q must have at least one head and one row a request, got {_show(q)}")
    q = q if q.dim() == 4 else q.unsqueeze(1)
    return q if reads_fp4(q) else q.view(torch.uint8)


def keys(k: Any, k_scale: Any, head_dim: int, device: torch.device) -> torch.Tensor:
    """Check gathered keys and their scales; return the keys as a uint8 view."""
    tensor("k", k, E4M3_DTYPES, (2,))
    tensor("k_scale", k_scale, (torch.float32,), (1,))
    on_device("k", k, device, "q")
    on_device("k_scale", k_scale, device, "q")
    if k.shape[1] != head_dim or not k.is_contiguous():
        raise ValueError(f"k must be contiguous [keys, {head_dim}], as q has it, got {_show(k)}")
    if k_scale.shape[0] != k.shape[0] or not k_scale.is_contiguous():
        raise ValueError(f"k_scale must be contiguous [{k.shape[0]}], got {_show(k_scale)}")
    return k.view(torch.uint8)


def head_weights(
    weights: Any,
    rows: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check ``[rows, heads]`` of ``dtype`` with unit inner stride."""
    tensor("weights", weights, (dtype,), (2,))
    on_device("weights", weights, device, "q")
    if tuple(weights.shape) != (rows, heads):
        raise ValueError(f"weights must be [{rows}, {heads}] (rows, heads), got {_show(weights)}")
    if heads > 1 and weights.stride()[1] != 1:
        raise ValueError(f"weights must have unit stride along its rows, got {_show(weights)}")


def scores_dtype(name: str, dtype: torch.dtype, q: torch.Tensor) -> None:
    """Check the dtype of scores: FP4 keys have bfloat16 scores."""
    if reads_fp4(q) and dtype is not torch.bfloat16:
        raise ValueError(
            f"{name} must be bfloat16 if q is, because scores of FP4 keys are bfloat16; got {dtype}"
        )


def bounds(name: str, value: Any, rows: int, device: torch.device) -> None:
    """Check the starts or the ends of windows: contiguous int32 or int64 ``[rows]``."""
    tensor(name, value, INDEX_DTYPES, (1,))
    on_device(name, value, device, "q")
    if value.shape[0] != rows or not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous [{rows}], got {_show(value)}")


_Named = Iterable[tuple[str, "torch.Tensor | None"]]


def separate(outputs: _Named, inputs: _Named) -> None:
    """Check that no output shares memory with another output or with an input.

    The check reads only addresses, shapes and strides. Slices of one buffer that interleave, such
    as its left and its right columns, are separate.
    """
    written: list[tuple[str, torch.Tensor, int, int]] = []
    for name, t in outputs:
        if t is not None:
            begin = t.data_ptr()
            end = _end(t, begin)
            for other, u, first, last in written:
                if begin < last and first < end and _meet(t, u):
                    raise _shared(other, u, name, t)
            written.append((name, t, begin, end))
    if not written:
        return
    for name, t in inputs:
        if t is not None:
            begin = t.data_ptr()
            for other, u, first, last in written:
                if begin < last and first < _end(t, begin) and _meet(t, u):
                    raise _shared(other, u, name, t)


def _shared(output: str, written: torch.Tensor, name: str, t: torch.Tensor) -> ValueError:
    return ValueError(
        f"{output} must not share memory with {name}, got {_show(written)} and {_show(t)} whose "
        f"first elements are {t.data_ptr() - written.data_ptr()} bytes apart"
    )


def _end(t: torch.Tensor, begin: int) -> int:
    """Return the address past a tensor's last byte; ``begin`` is the address of its first byte."""
    if t.is_contiguous():
        return begin + t.nbytes
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return begin + (last + 1) * t.element_size()


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors whose address ranges overlap have a byte in common."""
    if not a.numel() or not b.numel():
        return False
    (starts, length), (others, width) = _runs(a), _runs(b)
    # Of the runs of `b` that begin before a run of `a` ends, the last one reaches furthest.
    before = torch.searchsorted(others, starts + length) - 1
    return bool(((before >= 0) & (others[before.clamp(min=0)] + width > starts)).any())


def _runs(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sorted addresses of a tensor's contiguous runs of bytes, and a run's length."""
    size = t.element_size()
    steps = sorted((s * size, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and s)
    length = size
    while steps and steps[0][0] <= length:
        step, n = steps.pop(0)
        length += step * (n - 1)
    starts = torch.tensor([t.data_ptr()], dtype=torch.int64, device="cpu")
    for step, n in steps:
        along = torch.arange(0, step * n, step, dtype=torch.int64, device="cpu")
        starts = (starts[:, None] + along).reshape(-1)
    return starts.sort().values, length
