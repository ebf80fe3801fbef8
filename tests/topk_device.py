"""What the GPU tests of the top-k share: where they run, guarded buffers, draws of rows.

They are made for a GPU. Where a test is run without one it uses the torch reference, which is how
the tests themselves are tried out.
"""

from __future__ import annotations

import torch

from dsv4_plugin import topk
from dsv4_plugin.testing.inputs import scores
from dsv4_plugin.testing.topk.cases import DTYPES

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = "cuda" if ON_GPU else "torch"

CANARY = 0x5A
GUARD = 4096  # bytes before and after


def run(logits, lengths, k, *, dtype="", **more):
    """Call the implementation under test; `dtype` "narrow" sets `narrow`."""
    return topk(logits, lengths, k, narrow=dtype == "narrow", backend=BACKEND, **more)


def seen(logits, dtype):
    """The scores as the selection compares them."""
    return logits.bfloat16() if dtype == "narrow" else logits


def draw(kind, rows, columns, dtype, seed=0):
    return scores(kind, rows, columns, DTYPES[dtype], seed=seed, device=DEVICE)


def ints(values, dtype=torch.int32):
    return torch.tensor(list(values), dtype=dtype, device=DEVICE)


class Guarded:
    """A matrix in the middle of a larger buffer; all bytes around it, and between rows, are known.

    `offset` elements past a 256-byte boundary, rows `stride` elements apart.
    """

    def __init__(self, rows, columns, dtype, *, stride=None, offset=0):
        stride = columns if stride is None else stride
        size = dtype.itemsize
        need = ((rows - 1) * stride + columns + offset) * size if rows else 0
        self.bytes = torch.full((2 * GUARD + need,), CANARY, dtype=torch.uint8, device=DEVICE)
        flat = self.bytes.view(torch.uint8)[: (len(self.bytes) // size) * size].view(dtype)
        begin = GUARD // size + offset
        self.inside = flat.as_strided((rows, columns), (stride, 1), begin)

    def assert_untouched(self, context=""):
        """Assert that nothing was written but the matrix; overwrites the matrix."""
        self.inside.view(_INTEGERS[self.inside.dtype.itemsize]).fill_(
            _WORDS[self.inside.dtype.itemsize]
        )
        wrong = (self.bytes != CANARY).nonzero().reshape(-1)
        assert len(wrong) == 0, (
            f"{len(wrong)} bytes outside of the matrix were written, the first "
            f"{int(wrong[0]) - GUARD} bytes from its begin ({context})"
        )


_INTEGERS = {2: torch.int16, 4: torch.int32}
_WORDS = {2: 0x5A5A, 4: 0x5A5A5A5A}


def bits(x):
    """The bits of a tensor, for comparisons that NaN does not spoil."""
    return x.contiguous().view(_INTEGERS[x.dtype.itemsize])
