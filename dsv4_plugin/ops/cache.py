"""The public ops that read keys from the indexer cache.

**The indexer cache.** The cache is uint8. A page holds ``block_size`` keys and is *page-planar*:
first ``block_size × head_dim`` e4m3 bytes, then ``block_size`` float32 scales. Its shape is
``[pages, bytes]`` (a page may be longer than its content), ``[pages, block_size, head_dim + 4]`` or
``[pages, block_size, 1, head_dim + 4]``. The page stride is free, so the cache may be a strided
view of a larger buffer. In the MXFP4 form a page holds ``block_size × head_dim / 2`` bytes, each
with two FP4 (e2m1) values, low nibble first. After them come ``block_size × head_dim / 32`` UE8M0
scales.

**Positions without a key.** A slot or a page below zero is padding and reads as zeros. A slot or a
page past the end is an error of the caller. A ``slot_mapping`` on the CPU raises ``IndexError``. On
a GPU raising would cost a synchronisation, so such a key reads as NaN. The ops never touch memory
outside the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.ops import checks
from dsv4_plugin.ops.dispatch import Call, resolve
from dsv4_plugin.ops.torch_library import op

__all__ = ["gather_indexer_cache", "read_indexer_cache", "read_indexer_cache_mxfp4"]


def _new_keys(
    cache: torch.Tensor, slot_mapping: torch.Tensor, head_dim: int, dtype: torch.dtype, **_: Any
) -> torch.Tensor:
    return torch.empty(slot_mapping.shape[0], head_dim, dtype=dtype, device=cache.device)


@op(_new_keys)
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

    The result is ``value × scale`` in float32, rounded once if ``dtype`` is bfloat16. It is
    bit-identical to reading the tokens one by one. The op does not synchronise with the host when
    ``slot_mapping`` is on the cache's device.

    Args:
        cache: uint8 indexer cache; see the module's documentation for its layout.
        slot_mapping: ``[tokens]``, any integer dtype, any device; slot ``s`` is key
            ``s % block_size`` of page ``s // block_size``. Below zero: padding, reads as zeros.
            Dtypes other than int32 and int64 are converted first.
        block_size: keys per page.
        head_dim: values per key; a multiple of 4.
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


@op(_new_keys)
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

    This is :func:`read_indexer_cache` for keys of FP4 (e2m1) values in blocks of 32 that share a
    UE8M0 scale. A key has ``head_dim / 2`` bytes of values (low nibble first) and ``head_dim / 32``
    bytes of scales; pages are page-planar. ``head_dim`` must be a multiple of 32. A scale byte of
    255 reads as NaN.
    """
    return _read("read_mxfp4", cache, slot_mapping, block_size, head_dim, dtype, out, backend)


_GATHERED = (torch.float8_e4m3fn, torch.uint8, *checks.OUT_DTYPES)

# kind → (bytes per key, what head_dim must be a multiple of)
_READS = {
    "read": (lambda head_dim: head_dim + 4, 4),
    "read_mxfp4": (lambda head_dim: head_dim // 2 + head_dim // 32, 32),
}


def _read(
    kind: str,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    backend: str | None,
) -> torch.Tensor:
    row_bytes, multiple = _READS[kind]
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
        aligned = alignment(pages, out)
        call = Call(kind, cache.device, out.dtype, head_dim=head_dim, alignment=aligned)
        run = resolve(call, backend)
        if pages.shape[0] == 0:  # padding has no page to read from
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
        cu_seq_lens: ``[batch + 1]`` int32 or int64, starting at 0, not decreasing. The op checks
            the values only where that needs no extra synchronisation: on a CPU, and without
            ``out``.
        block_size: keys per page.
        head_dim: values per key; a multiple of 4.
        dtype: None keeps the keys quantised: ``(values, scales)``. float32 or bfloat16 dequantises
            them: ``value × scale`` in float32, rounded once.
        out: tensors to fill. Quantised: ``(values, scales)`` with values float8_e4m3fn or uint8
            ``[T, head_dim]`` and scales float32 ``[T]`` or ``[T, 1]``, or uint8 ``[T, 4]``.
            Dequantised: ``[T, head_dim]`` of ``dtype``. Rows at and past ``cu_seq_lens[-1]`` are
            not written. Without ``out`` the op reads the size from ``cu_seq_lens``, which
            synchronises if that is on a GPU; give ``out`` under CUDA graphs.
        backend: ``"cuda"``, ``"triton"``, ``"torch"`` or ``"auto"``; None: ``DSV4_BACKEND``.

    Returns:
        ``out``, or new tensors on the cache's device: values float8_e4m3fn ``[T, head_dim]`` and
        scales float32 ``[T]``, or keys ``[T, head_dim]`` of ``dtype``.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, layout or device, or the op
            checked the values of ``cu_seq_lens`` and they are wrong.
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
    _fill_gathered(cache, block_table, cu_seq_lens, values, scales, block_size, head_dim, backend)
    return out


def _new_gathered(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return new outputs of a gather, with as many rows as ``cu_seq_lens`` says."""
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


@op(None, outputs=("values", "scales"), name="gather_indexer_cache")
def _fill_gathered(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None = None,
    block_size: int = 64,
    head_dim: int = 128,
    backend: str | None = None,
) -> None:
    """Check a gather and run it: the form that ``torch.ops`` registers."""
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
        aligned = alignment(pages, values)
        call = Call("gather", device, values.dtype, head_dim=head_dim, alignment=aligned)
        run = resolve(call, backend)
        ends = cu_seq_lens.contiguous()
        run(pages, block_table, ends, values, scales, block_size, head_dim)
