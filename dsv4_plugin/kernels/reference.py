"""The ops in plain torch: the oracle of the tests and the last resort at run time.

Every function here fills tensors that it is given. It neither synchronises with the host nor has
control flow that depends on data, so a CUDA graph can capture it. It follows the same rules as the
kernels, bit for bit. :mod:`dsv4_plugin.ops` has already checked the arguments.
"""

from __future__ import annotations

import functools

import torch

from dsv4_plugin.kernels.arguments import MAX_INT32, TopkArgs

__all__ = [
    "gather_indexer_cache", "mxfp4_values", "ordered_key", "planes", "read_indexer_cache",
    "read_indexer_cache_mxfp4", "row_lengths", "to_slots", "topk", "ue8m0", "widen_e4m3",
]  # fmt: skip

SCALE_BYTES = 4  # one float32 per key
MX_BLOCK = 32  # values that share a UE8M0 scale

# ----------------------------------------------------------------------------------------------
# The indexer cache
# ----------------------------------------------------------------------------------------------


def planes(
    pages: torch.Tensor, block_size: int, value_bytes: int, scale_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split page-planar pages into views ``[pages, block_size, bytes]`` of values and scales."""
    split = block_size * value_bytes
    values = pages[:, :split].unflatten(1, (block_size, value_bytes))
    scales = pages[:, split : split + block_size * scale_bytes]
    return values, scales.unflatten(1, (block_size, scale_bytes))


def _locate(slots: torch.Tensor, total: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    safe = slots.clamp(0, total - 1)
    return torch.div(safe, block_size, rounding_mode="floor"), safe % block_size


@functools.cache
def _e4m3_values() -> torch.Tensor:
    """Return the float32 value of every e4m3 byte, on the CPU."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return codes.view(torch.float8_e4m3fn).to(torch.float32)


def widen_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Turn e4m3 bytes into float32; on a CPU by a table: 0.13 ms, torch's cast takes 0.59 ms."""
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    return _e4m3_values().index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _take(plane: torch.Tensor, page: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Copy the keys' bytes at ``(page, position)``, in the widest words that alignment allows."""
    wide = not (plane.stride(0) % 8 or plane.storage_offset() % 8 or plane.shape[2] % 8)
    return plane.view(torch.int64 if wide else torch.int32)[page, position]


def _multiply(rows: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``rows * scale`` in float32, rounded once to the dtype of ``out``."""
    if out.dtype == torch.float32:
        torch.mul(rows, scale, out=out)
    else:
        out.copy_(rows.mul_(scale))


def _blank(
    words: torch.Tensor, scale: torch.Tensor, slots: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make padding (slot < 0) zero times zero, and a slot past the end zero times NaN."""
    padding, beyond = (slots < 0)[:, None], (slots >= total)[:, None]
    codes = words.masked_fill_(padding | beyond, 0).view(torch.uint8)
    return codes, scale.masked_fill_(padding, 0.0).masked_fill_(beyond, float("nan"))


def read_indexer_cache(
    pages: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    head_dim: int,
) -> None:
    """Dequantise the FP8 keys at ``slots`` into ``out``; see :mod:`dsv4_plugin.ops.cache`."""
    total = pages.shape[0] * block_size
    slots = slots.to(torch.int64)
    values, scales = planes(pages, block_size, head_dim, SCALE_BYTES)
    page, position = _locate(slots, total, block_size)
    scale = scales[page, position].view(torch.float32)
    codes, scale = _blank(_take(values, page, position), scale, slots, total)
    if out.device.type == "cpu" and out.dtype == torch.float32 and out.is_contiguous():
        # indices for one look-up, without a gathered copy
        index = codes.reshape(-1).to(torch.int32)
        torch.index_select(_e4m3_values(), 0, index, out=out.view(-1))
        out.mul_(scale)
    else:
        _multiply(widen_e4m3(codes), scale, out)


def ue8m0(scale: torch.Tensor) -> torch.Tensor:
    """Turn UE8M0 bytes into float32: ``2**(byte - 127)``, 255 is NaN, 0 the denormal 2**-127."""
    bits = scale.to(torch.int32) << 23
    bits = bits.masked_fill(scale == 0, 0x00400000).masked_fill(scale == 255, 0x7FC00000)
    return bits.view(torch.float32)


def _e2m1(nibble: torch.Tensor) -> torch.Tensor:
    """Turn FP4 codes (sign, two exponent bits, one mantissa bit) into float32."""
    code = nibble.to(torch.int32)
    exponent, mantissa = (code >> 1) & 3, code & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    magnitude = torch.where(exponent == 0, mantissa * 0x3F000000, normal)
    return (magnitude | ((code & 8) << 28)).view(torch.float32)


def mxfp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Turn bytes of two FP4 codes, the low nibble first, into float32."""
    return _e2m1(torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2))


def read_indexer_cache_mxfp4(
    pages: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    head_dim: int,
) -> None:
    """Dequantise the MXFP4 keys at ``slots`` into ``out``; see :mod:`dsv4_plugin.ops.cache`."""
    total = pages.shape[0] * block_size
    slots = slots.to(torch.int64)
    values, scales = planes(pages, block_size, head_dim // 2, head_dim // MX_BLOCK)
    page, position = _locate(slots, total, block_size)
    packed, scale = _blank(
        _take(values, page, position), ue8m0(scales[page, position]), slots, total
    )
    _multiply(mxfp4_values(packed), scale.repeat_interleave(MX_BLOCK, dim=1), out)


def gather_indexer_cache(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    values_out: torch.Tensor,
    scales_out: torch.Tensor | None,
    block_size: int,
    head_dim: int,
) -> None:
    """Gather the keys of every sequence, one after the other; see :mod:`dsv4_plugin.ops.cache`.

    With ``scales_out`` (float32 ``[T]``) the values stay quantised (uint8 ``[T, head_dim]``).
    """
    tokens, batch = values_out.shape[0], block_table.shape[0]
    if tokens == 0 or batch == 0:
        return
    ends = cu_seq_lens[1:].to(torch.int64)
    token = torch.arange(tokens, device=pages.device)
    sequence = torch.searchsorted(ends, token, right=True)
    inside = sequence < batch
    sequence = sequence.clamp(max=batch - 1)
    position = token - cu_seq_lens.to(torch.int64)[sequence]
    column = torch.div(position, block_size, rounding_mode="floor")
    in_table = (column >= 0) & (column < block_table.shape[1])
    if block_table.shape[1]:
        page = block_table[sequence, column.clamp(0, block_table.shape[1] - 1)].to(torch.int64)
    else:
        page = torch.zeros_like(column)
    padding = in_table & (page < 0)
    beyond = ~in_table | (page >= pages.shape[0])
    if pages.shape[0]:
        values, scales = planes(pages, block_size, head_dim, SCALE_BYTES)
        page, offset = page.clamp(0, pages.shape[0] - 1), position.clamp(min=0) % block_size
        codes = _take(values, page, offset).view(torch.uint8)
        scale = scales[page, offset].view(torch.float32).squeeze(1)
    else:  # nothing to read: every page is past the end
        codes = pages.new_zeros(tokens, head_dim)
        scale = torch.zeros(tokens, dtype=torch.float32, device=pages.device)
    scale = scale.masked_fill(padding, 0.0).masked_fill(beyond, float("nan"))
    codes = codes.masked_fill(padding[:, None], 0).masked_fill(beyond[:, None], 0x7F)
    if scales_out is not None:
        values_out.copy_(torch.where(inside[:, None], codes, values_out))
        scales_out.copy_(torch.where(inside, scale, scales_out))
        return
    rows = widen_e4m3(codes) * scale[:, None]
    values_out.copy_(torch.where(inside[:, None], rows.to(values_out.dtype), values_out))


# ----------------------------------------------------------------------------------------------
# Top-k
# ----------------------------------------------------------------------------------------------

# Elements of the int64 composite keys that are made at a time: 2**25 are 256 MiB.
_CHUNK = 1 << 25
_POSITION_BITS = 31
_POSITION_MASK = (1 << _POSITION_BITS) - 1


def ordered_key(x: torch.Tensor) -> torch.Tensor:
    """Map float32, bfloat16 or float16 to int64 keys in the order of selection.

    A larger number has a larger key. -0.0 and 0.0 have the same key. Every NaN has the same key,
    below the key of -inf.
    """
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).to(torch.int64)
    sign_bit = 1 << (8 * x.dtype.itemsize - 1)
    magnitude = bits & (sign_bit - 1)
    key = torch.where(bits < 0, -magnitude, magnitude)
    return key.masked_fill(x.isnan(), -sign_bit)


def row_lengths(lengths: torch.Tensor, rows: int, next_n: int) -> torch.Tensor:
    """Return one int64 length per row; apply the engine's ``next_n`` rule to lengths per request.

    Row ``b * next_n + j`` of a request with length ``n`` sees ``n - next_n + 1 + j`` columns.
    """
    flat = lengths.reshape(-1).to(torch.int64).clamp(min=0)
    if flat.numel() == rows:
        return flat
    step = torch.arange(1 - next_n, 1, device=lengths.device)
    return (flat[:, None] + step).clamp(min=0).reshape(-1)


def topk(args: TopkArgs) -> None:
    """Select the ``k`` largest columns of every row; see :func:`dsv4_plugin.topk`.

    This function loads the scores past a row's length, because they are part of the tensor, but it
    masks them before use. NaN or garbage there changes nothing.
    """
    logits, lengths, out, out_raw, row_starts, page_table, k, next_n, page_size, sort, counts = args
    rows, columns = logits.shape
    n = row_lengths(lengths, rows, next_n)
    start = torch.zeros_like(n) if row_starts is None else row_starts.to(torch.int64)
    n = torch.minimum(n, columns - start).clamp(min=0).masked_fill(start < 0, 0)
    if counts is not None:
        counts.copy_(n.clamp(max=k))
    step = max(1, _CHUNK // max(columns, 1))
    for lo in range(0, rows, step):
        part = slice(lo, min(lo + step, rows))
        x = logits[part]
        if row_starts is not None:
            shift = start[part, None] + torch.arange(columns, device=logits.device)
            x = x.gather(1, shift.clamp(0, max(columns - 1, 0)))
        index = _select(x, n[part], k, sort)
        if page_table is None:
            out[part].copy_(index)
            continue
        row = torch.arange(part.start, part.stop, device=logits.device)
        if page_table.shape[0] != rows:
            row = torch.div(row, next_n, rounding_mode="floor")
        out[part].copy_(to_slots(index, page_table[row], page_size))
        if out_raw is not None:
            out_raw[part].copy_(index)


def _select(x: torch.Tensor, n: torch.Tensor, k: int, sort: bool) -> torch.Tensor:
    columns = x.shape[1]
    rank = torch.arange(k, device=x.device)
    index = torch.full((x.shape[0], k), -1, dtype=torch.int64, device=x.device)
    kept = min(k, columns)
    if kept:
        position = torch.arange(columns, device=x.device)
        # One unique int64 per element: the key in the high bits, the position (lower is larger) in
        # the low bits.
        composite = (ordered_key(x) << _POSITION_BITS) + (_POSITION_MASK - position)
        lowest = torch.iinfo(torch.int64).min
        composite = composite.masked_fill(position >= n[:, None], lowest)
        best = composite.topk(kept, dim=1, sorted=True).values
        chosen = _POSITION_MASK - (best & _POSITION_MASK)
        if not sort:
            chosen = chosen.masked_fill(best == lowest, _POSITION_MASK).sort(dim=1).values
        index[:, :kept] = chosen
    short = torch.where(rank < n[:, None], rank, -1)
    return torch.where((n <= k)[:, None], short, index)


def to_slots(index: torch.Tensor, page_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the pool slots of int64 indices; -1 for no index and for a missing page."""
    if page_table.shape[1] == 0:
        return torch.full_like(index, -1)
    page = torch.div(index.clamp(min=0), page_size, rounding_mode="floor")
    number = page_table.gather(1, page.clamp(max=page_table.shape[1] - 1)).to(torch.int64)
    slot = number * page_size + index % page_size
    gone = (index < 0) | (number < 0) | (page >= page_table.shape[1]) | (slot > MAX_INT32)
    return slot.masked_fill(gone, -1)
