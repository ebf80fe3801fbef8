"""Questions about the device and the memory of a call."""

from __future__ import annotations

import functools

import torch

__all__ = ["alignment", "capability"]


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def alignment(*matrices: torch.Tensor) -> int:
    """Return the largest power of two, up to 16, that divides the address of every row."""
    bits = 16
    for m in matrices:
        bits |= m.data_ptr()
        for stride in m.stride()[:-1]:
            bits |= stride * m.element_size()
    return bits & -bits
