"""Bad input of the logits' kernels: an error that names the argument, before a launch.

As in test_topk_errors.py, the tests call the compiled functions without the Python checks, with
tensors on memory that does not exist. They need the library but no GPU.
"""

from __future__ import annotations

import pytest
from kits.raw_tensor import BFLOAT, CPU, FLOAT, INT, UINT, RawTensor
from kits.skip_policy import NO_NVCC

from dsv4_plugin.kernels import cuda

BATCH, NEXT_N, HEADS, ROWS, PAGES, WIDTH, KEYS = 2, 2, 64, 4, 5, 3, 100
PAGE = 64 * 132


def int32(*shape, strides=None, **more):
    return RawTensor(shape, strides, INT, 32, **more)


def uint8(*shape, strides=None, **more):
    return RawTensor(shape, strides, UINT, 8, **more)


def float32(*shape, strides=None, **more):
    return RawTensor(shape, strides, FLOAT, 32, **more)


def bf16(*shape, strides=None, **more):
    return RawTensor(shape, strides, BFLOAT, 16, **more)


OUT = [
    ({"out": int32(ROWS, 192)}, TypeError, r"\bout\b.*int32.*bfloat16"),
    ({"out": bf16(ROWS, 192, device=CPU)}, ValueError, r"\bout\b.*cpu"),
    ({"out": bf16(ROWS - 1, 192)}, ValueError, r"\bout\b.*\[3, 192\].*\[4"),
    ({"out": bf16(ROWS, 192, strides=(192, 2))}, ValueError, r"\bout\b.*unit inner stride"),
    ({"out": bf16(ROWS, 192, strides=(100, 1))}, ValueError, r"\bout\b.*overlap"),
    ({"out": bf16(ROWS, (1 << 31) - 1, strides=(1 << 31, 1))}, ValueError, r"\bout\b.*columns"),
    ({"weights": bf16(ROWS, HEADS)}, TypeError, "weights.*bfloat16.*float32"),
    ({"weights": float32(ROWS, 32)}, ValueError, r"weights.*\[4, 32\].*\[4, 64\]"),
    ({"weights": float32(ROWS - 1, HEADS)}, ValueError, r"weights.*\[3, 64\]"),
    ({"weights": float32(ROWS, HEADS, strides=(1, ROWS))}, ValueError, "weights.*unit inner"),
    ({"weights": float32(ROWS, HEADS, device_id=1)}, ValueError, "weights.*cuda:1.*cuda:0"),
]

PAGED = {
    "q": uint8(BATCH, NEXT_N, HEADS, 128),
    "pages": uint8(PAGES, PAGE),
    "weights": float32(ROWS, HEADS),
    "lengths": int32(ROWS),
    "block_table": int32(BATCH, WIDTH),
    "out": bf16(ROWS, 192),
    "block_size": 64,
}
Q_STRIDES = (NEXT_N * HEADS * 128 + 8, HEADS * 128, 128, 1)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": int32(BATCH, NEXT_N, HEADS, 128)}, TypeError, r"\bq\b.*int32.*uint8"),
        ({"q": uint8(BATCH, NEXT_N, HEADS, 128, device=CPU)}, ValueError, r"\bq\b.*cpu.*GPU"),
        ({"q": uint8(ROWS, HEADS, 128)}, ValueError, r"\bq\b.*\[4, 64, 128\].*4"),
        ({"q": uint8(BATCH, NEXT_N, 16, 128)}, ValueError, r"\bq\b.*64 or 32 heads"),
        ({"q": uint8(BATCH, NEXT_N, HEADS, 64)}, ValueError, r"\bq\b.*128"),
        ({"q": uint8(BATCH, NEXT_N, HEADS, 128, strides=Q_STRIDES)}, ValueError, r"\bq\b.*16"),
        ({"pages": int32(PAGES, PAGE)}, TypeError, "pages.*int32.*uint8"),
        ({"pages": uint8(PAGES, PAGE - 1)}, ValueError, r"pages.*8447.*8448"),
        ({"pages": uint8(PAGES, PAGE, device_id=1)}, ValueError, "pages.*cuda:1.*cuda:0"),
        ({"pages": uint8(PAGES, PAGE, strides=(PAGE + 8, 1))}, ValueError, "pages.*16"),
        ({"pages": uint8(PAGES, 64, 132)}, ValueError, r"pages.*\[5, 64, 132\].*2"),
        ({"block_size": 48}, ValueError, "block_size is 48.*32 or 64"),
        ({"lengths": float32(ROWS)}, TypeError, "lengths.*float32.*int"),
        ({"lengths": int32(ROWS - 1)}, ValueError, r"lengths.*\[3\]"),
        ({"lengths": int32(ROWS, device=CPU)}, ValueError, "lengths.*cpu"),
        ({"block_table": RawTensor((BATCH, 3), None, INT, 64)}, TypeError, "block_table.*int64"),
        ({"block_table": int32(ROWS, WIDTH)}, ValueError, r"block_table.*\[4, 3\].*\[2"),
        ({"block_table": int32(BATCH, WIDTH, strides=(WIDTH, 2))}, ValueError, "block_table.*2"),
        ({"block_table": int32(BATCH, WIDTH, device=CPU)}, ValueError, "block_table.*cpu"),
        *OUT,
    ],
)  # fmt: skip
def test_the_paged_function_refuses(change, error, words):
    _refuses("dsv4_paged_logits", PAGED | change, error, words)


FP4 = PAGED | {
    "q": bf16(BATCH, NEXT_N, 32, 128),
    "pages": uint8(PAGES, 64 * 68),
    "weights": bf16(ROWS, 32),
}


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": bf16(BATCH, NEXT_N, HEADS, 128)}, ValueError, r"\bq\b.*64, 128.*32 heads"),
        ({"q": bf16(BATCH, NEXT_N, 32, 128, device=CPU)}, ValueError, r"\bq\b.*cpu.*GPU"),
        ({"q": bf16(ROWS, 32, 128)}, ValueError, r"\bq\b.*\[4, 32, 128\].*4"),
        ({"q": bf16(BATCH, NEXT_N, 32, 128, strides=(8196, 4096, 128, 1))}, ValueError, "16"),
        ({"weights": float32(ROWS, 32)}, TypeError, "weights.*float32.*bfloat16"),
        ({"pages": uint8(PAGES, 64 * 68 - 1)}, ValueError, r"pages.*4351.*4352"),
        ({"pages": uint8(PAGES, 64 * 68, strides=(1 << 32, 1))}, ValueError, "4294967296 bytes"),
        ({"block_size": 32}, ValueError, "block_size is 32.*64 for FP4"),
        ({"out": float32(ROWS, 192)}, TypeError, "FP4 keys are bfloat16"),
    ],
)
def test_the_paged_function_refuses_with_fp4_keys(change, error, words):
    _refuses("dsv4_paged_logits", FP4 | change, error, words)


RAGGED = {
    "q": uint8(ROWS, HEADS, 128),
    "k": uint8(KEYS, 128),
    "k_scale": float32(KEYS),
    "weights": float32(ROWS, HEADS),
    "row_starts": int32(ROWS),
    "row_ends": int32(ROWS),
    "out": bf16(ROWS, 192),
    "one_request": False,
}


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"q": uint8(ROWS, 16, 128)}, ValueError, r"\bq\b.*64 or 32 heads"),
        ({"q": uint8(ROWS, 1, HEADS, 128)}, ValueError, r"\bq\b.*3"),
        ({"k": float32(KEYS, 128)}, TypeError, r"\bk\b.*float32.*uint8"),
        ({"k": uint8(KEYS, 64)}, ValueError, r"\bk\b.*\[100, 64\].*128"),
        ({"k": uint8(KEYS, 128, strides=(256, 1))}, ValueError, r"\bk\b.*contiguous"),
        ({"k": uint8(KEYS, 128, device_id=1)}, ValueError, r"\bk\b.*cuda:1"),
        ({"k_scale": bf16(KEYS)}, TypeError, "k_scale.*bfloat16.*float32"),
        ({"k_scale": float32(KEYS + 1)}, ValueError, r"k_scale.*\[101\].*100"),
        ({"k_scale": float32(KEYS, strides=(2,))}, ValueError, "k_scale.*contiguous"),
        ({"row_starts": float32(ROWS)}, TypeError, "row_starts.*float32.*int"),
        ({"row_starts": int32(ROWS + 1)}, ValueError, r"row_starts.*\[5\]"),
        ({"row_ends": int32(ROWS, 1)}, ValueError, r"row_ends.*\[4, 1\]"),
        ({"row_ends": int32(ROWS, device=CPU)}, ValueError, "row_ends.*cpu"),
        *OUT,
    ],
)
def test_the_ragged_function_refuses(change, error, words):
    _refuses("dsv4_ragged_logits", RAGGED | change, error, words)


def _refuses(name, arguments, error, words):
    if cuda.missing():
        pytest.skip(f"{NO_NVCC} ({cuda.missing()})")
    import tvm_ffi

    values = [
        tvm_ffi.from_dlpack(value) if isinstance(value, RawTensor) else value
        for value in arguments.values()
    ]
    # Order of the compiled function: as in dsv4_plugin/kernels/cuda.py.
    with pytest.raises(error, match=words):
        cuda._function(name)(*values)
