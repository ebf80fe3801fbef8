"""The cases of the top-k that the benchmark times and checks.

A :class:`Case` is a shape, a dtype and a distribution; :meth:`Case.make` draws its tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.cli.shared.choices import KS, TOPK_DTYPES
from dsv4_plugin.cli.shared.choices import TOPK_SUITES as SUITES

__all__ = [
    "ADVERSARIAL", "ADVERSARIAL_SHAPES", "COLUMNS", "DTYPES", "KS", "PAGE_SIZE", "ROWS", "SUITES",
    "Case", "Problem", "suite",
]  # fmt: skip

ROWS = (1, 8, 32, 64, 128)
COLUMNS = (8192, 16_384, 32_768, 65_536, 131_072, 256_000)

DTYPES = {name: getattr(torch, name) for name in TOPK_DTYPES}

NARROW_LENGTH, NARROW_WIDTH = 8192, 256_000

# Distributions on which kernels were slow or wrong (docs/notes/topk.md), each next to "normal".
ADVERSARIAL = (
    "all_equal",
    "two_values",
    "crowded",
    "relu_sum",
    "signed_sum",
    "ascending",
    "descending",
    "one_huge_bin",
)
ADVERSARIAL_SHAPES = ((1, 8192), (1, 65_536), (8, 256_000), (32, 65_536), (128, 131_072))

# The form that answers in pool slots (SGLang's decode): the page table is part of the call.
PAGED_ROWS, PAGED_COLUMNS = (1, 8, 32), (8192, 65_536, 256_000)
PAGE_SIZE = 64

# As in a server, where the code of a call is cold.
SERVED_KS, SERVED_ROWS, SERVED_COLUMNS = (512, 2048), (1, 8, 32, 128), (8192, 65_536, 256_000)

PREFILL_ROWS = (2048, 8192)
PREFILL_COLUMNS = (8192, 32_768, 65_536)
PREFILL_KS = (512, 2048)


@dataclasses.dataclass
class Problem:
    """The tensors of one call: row ``r`` looks at ``logits[r, starts[r] : starts[r] + n[r]]``."""

    logits: torch.Tensor
    lengths: torch.Tensor
    row_starts: torch.Tensor | None = None
    page_table: torch.Tensor | None = None  # the identity, so that slots are columns
    # Where each row's columns begin and end, in the form of the engines' prefill kernels.
    starts: torch.Tensor = dataclasses.field(init=False)
    row_ends: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Derive the two from the other fields."""
        starts = self.row_starts
        self.starts = torch.zeros_like(self.lengths) if starts is None else starts
        self.row_ends = self.starts + self.lengths


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of a table."""

    suite: str
    dtype: str
    k: int
    rows: int
    columns: int  # the counted columns of each row; of the longest row where they differ
    kind: str = "normal"
    width: int = 0  # of the buffer; 0: as wide as the rows
    windows: str = "full"  # or "causal": two packed requests, each row sees its prefix

    @property
    def data(self) -> tuple[object, ...]:
        """What the tensors depend on; cases with equal ``data`` share their tensors."""
        dtype = DTYPES[self.dtype]
        return (
            dtype, self.rows, self.columns, self.kind, self.width, self.windows,
            self.suite == "prefill", self.suite == "paged",
        )  # fmt: skip

    @property
    def bytes_read(self) -> int:
        """The bytes of scores that the rows' windows cover."""
        if self.windows == "causal":
            columns = int(self._causal()[1].sum())
        else:
            columns = self.rows * self.columns
        return columns * DTYPES[self.dtype].itemsize

    def _causal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts and lengths of two packed requests; each row is at the end of its context."""
        half, context = max(1, self.rows // 2), self.columns // 2
        row = torch.arange(self.rows)
        request, at = row.div(half, rounding_mode="floor").clamp(max=1), row % half
        length = context - half + 1 + at if half <= context else at * context // half + 1
        return request * context, length

    def _page_table(self, device: str | torch.device) -> torch.Tensor | None:
        if self.suite != "paged":
            return None
        pages = torch.arange(-(-self.columns // PAGE_SIZE), dtype=torch.int32, device=device)
        return pages.repeat(self.rows, 1)

    def make(self, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
        """Draw the tensors; columns past a row's end are NaN where the buffer is wider."""
        dtype = DTYPES[self.dtype]
        step = max(1, (1 << 27) // self.columns)  # the float32 draws of big cases come in parts
        width = self.width or self.columns
        prefill = self.suite == "prefill"
        logits = torch.empty(self.rows, width, dtype=dtype, device=device)
        for begin in range(0, self.rows, step):
            count = min(step, self.rows - begin)
            part = scores(self.kind, count, self.columns, dtype, seed=seed + begin, device=device)
            logits[begin : begin + count, : self.columns] = part
        if width > self.columns:
            logits[:, self.columns :] = float("nan")
        if self.windows == "full":
            lengths = torch.full((self.rows,), self.columns, dtype=torch.int32, device=device)
            # Engines always pass starts to their prefill kernels.
            starts = torch.zeros_like(lengths) if prefill else None
            return Problem(logits, lengths, starts, self._page_table(device))
        if self.windows != "causal":
            raise ValueError(f"windows must be 'full' or 'causal', got {self.windows!r}")
        begins, length = self._causal()
        return Problem(logits, length.int().to(device), begins.int().to(device))

    def __str__(self) -> str:
        """Return the cell as progress lines and messages show it."""
        more = "" if self.kind == "normal" else f" {self.kind}"
        more += f" in {self.width}" if self.width else ""
        more += "" if self.windows == "full" else f" {self.windows}"
        return f"{self.dtype} k {self.k} {self.rows} x {self.columns}{more}"


# ---- The suites of the benchmark -----------------------------------------------------------------


# suite → k, rows, columns, and the other values that make its cells
_Suite = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[dict[str, Any]]]
_USUAL: Sequence[dict[str, Any]] = ({},)
_GRIDS: dict[str, _Suite] = {
    "decode": (KS, ROWS, COLUMNS, _USUAL),
    "served": (SERVED_KS, SERVED_ROWS, SERVED_COLUMNS, _USUAL),
    "narrow": (KS, ROWS, (NARROW_LENGTH,), ({}, {"width": NARROW_WIDTH})),
    "prefill": (
        PREFILL_KS, PREFILL_ROWS, PREFILL_COLUMNS, ({"windows": "full"}, {"windows": "causal"})
    ),
    "paged": (KS, PAGED_ROWS, PAGED_COLUMNS, _USUAL),
    "adversarial": ((512, 2048), (), (), [{"kind": kind} for kind in ("normal", *ADVERSARIAL)]),
}  # fmt: skip


def suite(
    name: str,
    *,
    dtypes: Sequence[str] | None = None,
    ks: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
) -> list[Case]:
    """Return the cases of one suite, limited by the arguments.

    The arguments replace the suite's own lists. The shapes of ``adversarial`` belong together, so
    there ``rows`` and ``columns`` choose among them.
    """
    if name not in _GRIDS:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    usual_ks, usual_rows, usual_columns, every = _GRIDS[name]
    if name == "narrow":
        columns = None  # all rows of this suite have one length
    shapes: Iterable[tuple[int, int]] = itertools.product(
        rows or usual_rows, columns or usual_columns
    )
    if name == "adversarial":
        shapes = [
            (r, c)
            for r, c in ADVERSARIAL_SHAPES
            if (not rows or r in rows) and (not columns or c in columns)
        ]
    cells = itertools.product(dtypes or ("bfloat16", "float32"), shapes, every, ks or usual_ks)
    return [Case(name, dtype, k, r, c, **more) for dtype, (r, c), more, k in cells]
