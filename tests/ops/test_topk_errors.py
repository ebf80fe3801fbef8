"""Bad input of the top-k: an error that names the argument, before a launch.

The tests call the compiled function without the Python checks, with tensors that torch cannot make,
on memory that does not exist. A launch would give another error. They need the library but no GPU.
They call the public function on a GPU, where it must not change `out`.
"""

import pytest
import torch
from kits.raw_tensor import BFLOAT, CPU, FLOAT, INT, UINT, RawTensor
from kits.skip_policy import NO_NVCC

from dsv4_plugin import topk
from dsv4_plugin.kernels import cuda

ROWS, COLUMNS, K = 4, 100, 8


def logits(strides=(COLUMNS, 1), code=BFLOAT, bits=16, shape=(ROWS, COLUMNS), **more):
    return RawTensor(shape, strides, code, bits, **more)


def int32(*shape, strides=None, **more):
    return RawTensor(shape, strides, INT, 32, **more)


GOOD = {
    "logits": logits(),
    "lengths": int32(ROWS),
    "out": int32(ROWS, K),
    "out_raw": None,
    "row_starts": None,
    "page_table": None,
    "k": K,
    "next_n": 1,
    "page_size": 64,
    "sort": False,
    "out_counts": None,
}
TABLE = int32(ROWS, 2)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"k": 0}, ValueError, r"\bk is 0.*2048"),
        ({"k": -1}, ValueError, r"\bk is -1.*2048"),
        ({"k": 2049, "out": int32(ROWS, 2049)}, ValueError, r"\bk is 2049.*2048"),
        ({"logits": logits(code=FLOAT, bits=64)}, TypeError, "logits.*float64.*bfloat16.*float32"),
        ({"logits": logits(code=INT, bits=16)}, TypeError, "logits.*int16.*bfloat16"),
        ({"logits": logits(strides=(-COLUMNS, 1))}, ValueError, "logits.*-100.*negative"),
        ({"logits": logits(strides=(COLUMNS, -1))}, ValueError, "logits.*-1.*must be 1"),
        ({"logits": logits(strides=(1, ROWS))}, ValueError, "logits.*4.*must be 1"),
        ({"logits": logits(device=CPU)}, ValueError, "logits.*cpu.*GPU"),
        ({"logits": logits(shape=(400,), strides=(1,))}, ValueError, r"logits.*\[400\]"),
        ({"logits": logits(shape=(ROWS, 1 << 31), strides=(1 << 31, 1))}, ValueError,
         "logits.*2147483648.*columns"),
        ({"lengths": int32(ROWS, device=CPU)}, ValueError, "lengths.*cpu.*cuda"),
        ({"lengths": int32(ROWS, device_id=1)}, ValueError, "lengths.*cuda:1.*cuda:0"),
        ({"lengths": RawTensor((ROWS,), None, FLOAT, 32)}, TypeError, "lengths.*float32.*int"),
        ({"lengths": RawTensor((ROWS,), None, UINT, 32)}, TypeError, "lengths.*uint32.*int"),
        ({"lengths": int32(ROWS - 1)}, ValueError, r"lengths.*\[3\]"),
        ({"lengths": int32(ROWS, 1, 1)}, ValueError, r"lengths.*\[4, 1, 1\]"),
        ({"next_n": 0}, ValueError, "next_n.*0.*1"),
        ({"next_n": 2, "lengths": int32(3)}, ValueError, "lengths.*next_n 2"),
        ({"row_starts": int32(ROWS, device=CPU)}, ValueError, "row_starts.*cpu"),
        ({"row_starts": int32(ROWS + 1)}, ValueError, r"row_starts.*\[5\]"),
        ({"row_starts": RawTensor((ROWS,), None, INT, 16)}, TypeError, "row_starts.*int16"),
        ({"out": int32(ROWS, K, strides=(-K, 1))}, ValueError, r"\bout\b.*-8.*negative"),
        ({"out": int32(ROWS, K, strides=(K - 1, 1))}, ValueError, r"\bout\b.*7.*overlap.*8"),
        ({"out": int32(ROWS, K, strides=(K, 2))}, ValueError, r"\bout\b.*2.*must be 1"),
        ({"out": int32(ROWS, K - 1)}, ValueError, r"\bout\b.*\[4, 7\].*\[4, 8\]"),
        ({"out": int32(ROWS, K + 1)}, ValueError, r"\bout\b.*\[4, 9\].*\[4, 8\]"),
        ({"out": int32(ROWS - 1, K)}, ValueError, r"\bout\b.*\[3, 8\].*\[4, 8\]"),
        ({"out": int32(ROWS, K, device=CPU)}, ValueError, r"\bout\b.*cpu"),
        ({"out": RawTensor((ROWS, K), None, INT, 64)}, TypeError, r"\bout\b.*int64.*int32"),
        ({"page_table": TABLE, "out_raw": int32(ROWS, K, strides=(1, 1))}, ValueError,
         "out_raw.*1.*overlap"),
        ({"page_table": TABLE, "out_raw": int32(ROWS, 1)}, ValueError, r"out_raw.*\[4, 1\]"),
        ({"page_table": int32(3, 2)}, ValueError, "page_table.*3 rows.*4"),
        ({"page_table": int32(ROWS, 2, device=CPU)}, ValueError, "page_table.*cpu"),
        ({"page_table": int32(ROWS, 2, strides=(-2, 1))}, ValueError, "page_table.*-2.*negative"),
        ({"page_table": RawTensor((ROWS, 2), None, INT, 64)}, TypeError, "page_table.*int64"),
        ({"page_table": TABLE, "page_size": 0}, ValueError, "page_size.*0.*1"),
        ({"out_counts": int32(ROWS - 1)}, ValueError, r"out_counts.*\[3\].*\[4\]"),
        ({"out_counts": int32(ROWS, 1)}, ValueError, r"out_counts.*\[4, 1\].*\[4\]"),
        ({"out_counts": int32(ROWS, strides=(2,))}, ValueError, "out_counts.*stride 1"),
        ({"out_counts": int32(ROWS, device=CPU)}, ValueError, "out_counts.*cpu"),
        ({"out_counts": RawTensor((ROWS,), None, INT, 64)}, TypeError, "out_counts.*int64.*int32"),
    ],
)  # fmt: skip
def test_the_compiled_function_refuses(change, error, words):
    if cuda.missing():
        pytest.skip(f"{NO_NVCC} ({cuda.missing()})")
    import tvm_ffi

    arguments = [
        tvm_ffi.from_dlpack(value) if isinstance(value, RawTensor) else value
        for value in (GOOD | change).values()
    ]
    with pytest.raises(error, match=words):
        cuda._function("dsv4_topk")(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"k": 0}, ValueError, "k must be 1 to 2048, got 0"),
        ({"k": 2049}, ValueError, "k must be 1 to 2048, got 2049"),
        ({"lengths": torch.full((4,), 32)}, ValueError, "lengths.*cuda.*cpu"),
        ({"lengths": torch.full((4,), 32.0)}, TypeError, "lengths.*float32"),
        ({"out": torch.zeros(4, 7, dtype=torch.int32)}, ValueError, r"out.*\(4, 8\).*\(4, 7\)"),
        ({"out": torch.zeros(4, 8, dtype=torch.int32)}, ValueError, "out.*cuda.*cpu"),
        ({"out": torch.zeros(11, dtype=torch.int32).as_strided((4, 8), (1, 1))}, ValueError,
         "out.*overlap"),
        ({"out": torch.zeros(32, dtype=torch.int32).as_strided((4, 8), (1, 4))}, ValueError,
         "out.*unit stride"),
        ({"row_starts": torch.zeros(4, dtype=torch.int32)}, ValueError, "row_starts.*cuda.*cpu"),
        ({"page_table": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, "page_table.*cpu"),
        ({"out_counts": torch.zeros(4, dtype=torch.int32)}, ValueError, "out_counts.*cuda.*cpu"),
        ({"next_n": 3}, ValueError, "next_n.*3.*4"),
    ],
)  # fmt: skip
def test_the_public_function_refuses_and_touches_nothing(change, error, words):
    out = torch.full((4, 8), 77, dtype=torch.int32, device="cuda")
    arguments = {
        "logits": torch.zeros(4, 32, device="cuda"),
        "lengths": torch.full((4,), 32, device="cuda"),
        "k": 8,
        "out": out,
    } | change
    with pytest.raises(error, match=words):
        topk(arguments.pop("logits"), arguments.pop("lengths"), arguments.pop("k"),
             backend="cuda", **arguments)  # fmt: skip
    torch.cuda.synchronize()
    assert bool((out == 77).all())
    topk(torch.zeros(4, 32, device="cuda"), torch.full((4,), 32, device="cuda"), 8, out=out)
    assert out.tolist() == [list(range(8))] * 4, "the next call does not work"
