"""Tensors that torch cannot make: any shape, strides, dtype and device, over unread memory.

The compiled functions get them as DLPack capsules. The functions must refuse them before a launch.
Then the pointer is never followed, and no GPU is needed.
"""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA = 1, 2
INT, UINT, FLOAT, BFLOAT = 0, 1, 2, 4  # DLPack's type codes


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class RawTensor:
    """A DLPack producer; keep it alive for as long as what was made from it."""

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        code: int = INT,
        bits: int = 32,
        device: int = CUDA,
        device_id: int = 0,
    ) -> None:
        if strides is None:
            strides = tuple(_product(shape[i + 1 :]) for i in range(len(shape)))
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*strides)
        self._device = device, device_id
        self._managed = _Managed(
            _Tensor(1 << 20, _Device(device, device_id), len(shape), _DataType(code, bits, 1),
                    self._shape, self._strides, 0), None, None,
        )  # fmt: skip

    def __dlpack__(self, **_: Any) -> object:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
