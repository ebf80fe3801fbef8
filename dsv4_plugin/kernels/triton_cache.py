"""The reads of the indexer cache in Triton.

Latency and bytes bound all three kernels, so they share one form. A program takes ``TOKENS`` keys
as a 2-D tile whose columns are *words* of a key. Every lane computes the address of its own word.
It loads slot, page and scale itself, although other lanes load the same: that is one broadcast
transaction per warp, and no exchange through shared memory. Each word is widened in registers into
the 16 bytes that the lane stores.

A word's columns are made opaque to the compiler (``^ zero``). If the compiler knew that they are
contiguous, it would give each lane 16 bytes to *load*, which makes 64 bytes to store in float32. It
would then insert an exchange through shared memory to restore the order of the stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4_plugin.kernels.device import alignment, capability

__all__ = [
    "INTERPRETED", "gather_indexer_cache", "read_indexer_cache", "read_indexer_cache_mxfp4",
]  # fmt: skip


@triton.jit
def _decode_e4m3x4(word, HARDWARE: tl.constexpr):
    """Widen the four e4m3 bytes of a uint32 to float32."""
    if HARDWARE:  # compute capability 8.9 and above converts two at a time
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 lo, hi, a, b, c, d;
            .reg .b32 x, y;
            mov.b32 {lo, hi}, $4;
            cvt.rn.f16x2.e4m3x2 x, lo;
            cvt.rn.f16x2.e4m3x2 y, hi;
            mov.b32 {a, b}, x;
            mov.b32 {c, d}, y;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }
            """,
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        f0 = _decode_e4m3(word)
        f1 = _decode_e4m3(word >> 8)
        f2 = _decode_e4m3(word >> 16)
        f3 = _decode_e4m3(word >> 24)
    return f0, f1, f2, f3


@triton.jit
def _decode_e4m3(word):
    """Widen the lowest byte: its bits, moved to float32's fields, give the value / 2**120."""
    sign = (word & 0x80) << 24
    magnitude = word & 0x7F
    value = (sign | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def _decode_e2m1(word):
    """Widen the lowest nibble in the same way: the factor is 2**126."""
    bits = ((word & 8) << 28) | ((word & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED_: tl.constexpr):
    """Convert to the dtype of the output, rounding to nearest, ties to even.

    A GPU rounds like this. Triton's interpreter truncates bfloat16 and converts numbers below the
    normal range wrongly, so under the interpreter this function makes the bits itself.
    """
    if INTERPRETED_ and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _join4(f0, f1, f2, f3):
    """Stack along two new last dimensions, so that a reshape puts f0 … f3 side by side."""
    return tl.join(tl.join(f0, f2), tl.join(f1, f3))


@triton.jit
def _join8(f0, f1, f2, f3, f4, f5, f6, f7):
    return tl.join(_join4(f0, f2, f4, f6), _join4(f1, f3, f5, f7))


@triton.jit
def _read_fp8_kernel(
    cache, slots, out,
    tokens, total, page_stride, out_stride, zero,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    WORD: tl.constexpr, WORDS: tl.constexpr, HARDWARE: tl.constexpr,
    INTERPRETED_: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    word = (tl.arange(0, WORDS) ^ zero)[None, :]
    live = (token < tokens) & (word * WORD < HEAD_DIM)
    slot = tl.load(slots + token + word * 0, mask=live, other=-1).to(tl.int64)
    ok = live & (slot >= 0) & (slot < total)
    page = cache + (slot // BLOCK_SIZE) * page_stride
    offset = slot % BLOCK_SIZE
    if WORD == 8:
        values = (page + offset * HEAD_DIM + word * 8).to(tl.pointer_type(tl.uint64))
    else:
        values = (page + offset * HEAD_DIM + word * 4).to(tl.pointer_type(tl.uint32))
    scales = (page + BLOCK_SIZE * HEAD_DIM + offset * 4).to(tl.pointer_type(tl.float32))
    packed = tl.load(values, mask=ok, other=0)
    scale = tl.load(scales, mask=ok, other=0.0)
    scale = tl.where(slot >= total, float("nan"), scale)
    if WORD == 8:
        f0, f1, f2, f3 = _decode_e4m3x4(packed.to(tl.uint32), HARDWARE)
        f4, f5, f6, f7 = _decode_e4m3x4((packed >> 32).to(tl.uint32), HARDWARE)
        keys = _join8(
            f0 * scale, f1 * scale, f2 * scale, f3 * scale,
            f4 * scale, f5 * scale, f6 * scale, f7 * scale,
        )  # fmt: skip
    else:
        f0, f1, f2, f3 = _decode_e4m3x4(packed, HARDWARE)
        keys = _join4(f0 * scale, f1 * scale, f2 * scale, f3 * scale)
    _store_rows(out, keys, tokens, out_stride, HEAD_DIM, TOKENS, WORDS * WORD, INTERPRETED_)


@triton.jit
def _store_rows(
    out, keys, tokens, out_stride,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRETED_: tl.constexpr,
):  # fmt: skip
    keys = tl.reshape(keys, [TOKENS, WIDTH])
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    live = (token < tokens) & (column < HEAD_DIM)
    row = out + token * out_stride + column
    tl.store(row, _narrow(keys, out.dtype.element_ty, INTERPRETED_), mask=live)


@triton.jit
def _read_mxfp4_kernel(
    cache, slots, out,
    tokens, total, page_stride, out_stride, zero,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, INTERPRETED_: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = HEAD_DIM // 2
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    word = (tl.arange(0, WORDS) ^ zero)[None, :]
    live = (token < tokens) & (word * 4 < ROW)
    slot = tl.load(slots + token + word * 0, mask=live, other=-1).to(tl.int64)
    ok = live & (slot >= 0) & (slot < total)
    page = cache + (slot // BLOCK_SIZE) * page_stride
    offset = slot % BLOCK_SIZE
    values = (page + offset * ROW + word * 4).to(tl.pointer_type(tl.uint32))
    packed = tl.load(values, mask=ok, other=0)
    code = tl.load(
        page + BLOCK_SIZE * ROW + offset * (HEAD_DIM // 32) + word // 4, mask=ok, other=127
    ).to(tl.uint32)
    scale = tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)
    scale = tl.where((code == 255) | (slot >= total), float("nan"), scale)
    keys = _join8(
        _decode_e2m1(packed) * scale, _decode_e2m1(packed >> 4) * scale,
        _decode_e2m1(packed >> 8) * scale, _decode_e2m1(packed >> 12) * scale,
        _decode_e2m1(packed >> 16) * scale, _decode_e2m1(packed >> 20) * scale,
        _decode_e2m1(packed >> 24) * scale, _decode_e2m1(packed >> 28) * scale,
    )  # fmt: skip
    _store_rows(out, keys, tokens, out_stride, HEAD_DIM, TOKENS, WORDS * 8, INTERPRETED_)


@triton.jit
def _gather_kernel(
    cache, block_table, cu_seq_lens, values_out, scales_out,
    tokens, batch, table_width, pages, page_stride, table_stride, out_stride, zero,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, STEPS: tl.constexpr, QUANTISED: tl.constexpr, HARDWARE: tl.constexpr,
    INTERPRETED_: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    if QUANTISED:  # noqa: SIM108  # a plain copy: loads and stores of 16 bytes per lane agree
        word = tl.arange(0, WORDS)[None, :]
    else:
        word = (tl.arange(0, WORDS) ^ zero)[None, :]
    nowhere = word * 0
    # The sequence of a token: the number of sequences that end at or before it.
    low = (token + nowhere).to(tl.int32) * 0
    high = low + batch
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        end = tl.load(cu_seq_lens + middle + 1, mask=open_, other=0).to(tl.int64)
        past = open_ & (end <= token)
        low = tl.where(past, middle + 1, low)
        high = tl.where(open_ & (end > token), middle, high)
    live = (token < tokens) & (low < batch) & (word * 4 < HEAD_DIM)
    position = token - tl.load(cu_seq_lens + low, mask=live, other=0).to(tl.int64)
    column = position // BLOCK_SIZE
    in_table = live & (column >= 0) & (column < table_width)
    entry = block_table + low.to(tl.int64) * table_stride + column
    number = tl.load(entry, mask=in_table, other=0).to(tl.int64)
    ok = in_table & (number >= 0) & (number < pages)
    beyond = live & ((number >= pages) | (in_table == 0))
    page = cache + number * page_stride
    offset = position % BLOCK_SIZE
    values = (page + offset * HEAD_DIM + word * 4).to(tl.pointer_type(tl.uint32))
    scales = (page + BLOCK_SIZE * HEAD_DIM + offset * 4).to(tl.pointer_type(tl.float32))
    packed = tl.load(values, mask=ok, other=0)
    scale = tl.load(scales, mask=ok, other=0.0)
    scale = tl.where(beyond, float("nan"), scale)
    if QUANTISED:
        packed = tl.where(beyond, 0x7F7F7F7F, packed)
        row = (values_out + token * out_stride + word * 4).to(tl.pointer_type(tl.uint32))
        tl.store(row, packed, mask=live)
        tl.store(scales_out + token + nowhere, scale, mask=live & (word == 0))
    else:
        f0, f1, f2, f3 = _decode_e4m3x4(packed, HARDWARE)
        keys = _join4(f0 * scale, f1 * scale, f2 * scale, f3 * scale)
        keys = tl.reshape(keys, [TOKENS, WORDS * 4])
        # `live` for the four columns of each word.
        kept = tl.reshape(_join4(live, live, live, live), [TOKENS, WORDS * 4])
        at = tl.arange(0, WORDS * 4)[None, :]
        row = values_out + token * out_stride + at
        tl.store(row, _narrow(keys, values_out.dtype.element_ty, INTERPRETED_), mask=kept)


# Under TRITON_INTERPRET=1 the decorator makes another class, and the kernels run on CPU tensors.
INTERPRETED = not isinstance(_read_fp8_kernel, triton.runtime.JITFunction)

WARPS = 4


def _hardware_e4m3(device: torch.device) -> bool:
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return capability(device) >= (8, 9)


def _launch(kernel, tokens: int, block: int, device: torch.device, args, **meta) -> None:
    grid = (triton.cdiv(tokens, block),)
    meta["INTERPRETED_"] = INTERPRETED
    if device.type == "cuda":
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, TOKENS=block, num_warps=WARPS, **meta)
    else:
        kernel[grid](*args, TOKENS=block, **meta)


def _tokens(words: int, per_lane: int) -> int:
    """Keys per program, so that each lane has ``per_lane`` words of different keys in flight."""
    return max(1, WARPS * 32 * per_lane // words)


def read_indexer_cache(
    pages: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    head_dim: int,
) -> None:
    """Dequantise the FP8 keys at ``slots`` into ``out``; see :mod:`dsv4_plugin.ops.cache`."""
    total = pages.shape[0] * block_size
    # For bfloat16 a lane loads 8 bytes and stores 16, and the 8 bytes must be aligned to 8.
    wide = out.dtype == torch.bfloat16 and head_dim % 8 == 0 and alignment(pages) >= 8
    word = 8 if wide else 4
    words = triton.next_power_of_2(triton.cdiv(head_dim, word))
    args = (pages, slots, out, slots.shape[0], total, pages.stride(0), out.stride(0), 0)
    _launch(
        _read_fp8_kernel, slots.shape[0], _tokens(words, 4), pages.device, args,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WORD=word, WORDS=words,
        HARDWARE=_hardware_e4m3(pages.device),
    )  # fmt: skip


def read_indexer_cache_mxfp4(
    pages: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor,
    block_size: int,
    head_dim: int,
) -> None:
    """Dequantise the MXFP4 keys at ``slots`` into ``out``; see :mod:`dsv4_plugin.ops.cache`."""
    total = pages.shape[0] * block_size
    words = triton.next_power_of_2(head_dim // 8)
    args = (pages, slots, out, slots.shape[0], total, pages.stride(0), out.stride(0), 0)
    _launch(
        _read_mxfp4_kernel, slots.shape[0], _tokens(words, 2), pages.device, args,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WORDS=words,
    )  # fmt: skip


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
    tokens, batch = values_out.shape[0], block_table.shape[0]
    if tokens == 0 or batch == 0:
        return
    words = triton.next_power_of_2(head_dim // 4)
    args = (
        pages, block_table, cu_seq_lens, values_out, scales_out, tokens, batch,
        block_table.shape[1], pages.shape[0], pages.stride(0), block_table.stride(0),
        values_out.stride(0), 0,
    )  # fmt: skip
    _launch(
        _gather_kernel, tokens, _tokens(words, 4), pages.device, args,
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, WORDS=words, STEPS=batch.bit_length(),
        QUANTISED=scales_out is not None, HARDWARE=_hardware_e4m3(pages.device),
    )  # fmt: skip
