"""Buffers with known bytes around them: they show a write outside a tensor.

:class:`Guarded` is one matrix. :class:`Canaries` puts guards around all tensors of a call. A check
does not change the matrix itself.
"""

from __future__ import annotations

import torch

__all__ = ["CANARY", "GUARD", "Canaries", "Guarded"]

CANARY = 0x5A
GUARD = 4096  # bytes before and after a matrix
_ALIGNED = 256  # a copied tensor keeps its address modulo this


class Guarded:
    """A matrix inside a larger buffer; all bytes around it and between its rows are known.

    The matrix begins ``offset`` elements past an aligned address. Its rows are ``stride`` elements
    apart, at least ``columns``.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        *,
        stride: int | None = None,
        offset: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        stride = columns if stride is None else stride
        size = dtype.itemsize
        self._begin = GUARD + offset * size
        used = ((rows - 1) * stride + columns) * size if rows else 0
        self._end = self._begin + used
        total = self._end + GUARD
        self.bytes = torch.full((total + -total % 8,), CANARY, dtype=torch.uint8, device=device)
        flat = self.bytes.view(dtype)
        self.inside = flat.as_strided((rows, columns), (stride, 1), self._begin // size)
        self._between = None
        if rows > 1 and stride > columns:
            shape = (rows - 1, (stride - columns) * size)
            first = self._begin + columns * size
            self._between = self.bytes.as_strided(shape, (stride * size, 1), first)

    def fault(self) -> str | None:
        """Return what was written outside the matrix; None if nothing was."""
        parts = {"before it": self.bytes[: self._begin], "behind it": self.bytes[self._end :]}
        if self._between is not None:
            parts["between its rows"] = self._between
        for where, part in parts.items():
            wrong = part != CANARY
            if bool(wrong.any()):
                at = wrong.nonzero()[0].tolist()
                return f"{int(wrong.sum())} bytes {where} were written, the first at {at}"
        return None

    def assert_untouched(self, context: str = "") -> None:
        """Raise AssertionError if anything but the matrix was written."""
        fault = self.fault()
        if fault:
            raise AssertionError(f"{fault} ({context})")


class Canaries:
    """Guards around the tensors of one call: copies of its inputs, and new outputs.

    A copy keeps shape, strides and the address modulo 256. :meth:`check` asserts that it still
    equals its original. Tensors that span more than ``most`` bytes are not copied.
    """

    def __init__(self, most: int = 64 << 20) -> None:
        self.most = most
        self._held: list[tuple[str, Guarded]] = []
        self._inputs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def around(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a guarded copy of an input."""
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * step for n, step in steps)
        size = tensor.element_size()
        if not tensor.numel() or span * size > self.most:
            return tensor
        whole = tensor.as_strided((span,), (1,))
        room = _ALIGNED // size
        held = Guarded(1, span + room, tensor.dtype, device=tensor.device)
        shift = (tensor.data_ptr() - held.inside.data_ptr()) % _ALIGNED // size
        begin = held.inside.storage_offset() + shift
        copy = held.inside.as_strided((span,), (1,), begin)
        held.inside.view(torch.uint8).fill_(CANARY)
        copy.copy_(whole)
        self._held.append((name, held))
        self._inputs.append((name, whole.contiguous().clone(), copy))
        return copy.as_strided(tensor.shape, tensor.stride(), begin)

    def output(
        self, name: str, rows: int, columns: int, dtype: torch.dtype, device: str | torch.device
    ) -> torch.Tensor:
        """Return a new guarded matrix that is filled with the guard's bytes."""
        held = Guarded(rows, columns, dtype, device=device)
        self._held.append((name, held))
        return held.inside

    def check(self, context: str = "") -> None:
        """Raise AssertionError if a guard or an input was written to."""
        for name, held in self._held:
            held.assert_untouched(f"{name} {context}".strip())
        for name, before, now in self._inputs:
            if not torch.equal(before.view(torch.uint8), now.view(torch.uint8)):
                raise AssertionError(f"{name} was written to ({context})")
