"""What the runs of the fuzzer share: guarded tensors, replays, and how a finding is raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kits.canary import Guarded
from kits.oracles import bits, check_selection
from kits.replay import captured

from dsv4_plugin.cli.checks.oracles import Wrong
from tests.fuzz.case import FORMS

__all__ = [
    "Parts", "Requests", "Tensors", "check_form", "check_indices", "dirty", "page_view",
    "raise_wrong", "run_parts",
]  # fmt: skip

_DIRT = 0xAB  # the bytes that outputs are filled with
_REMEMBERED = 1 << 23  # elements; a larger input is not copied to be compared

# The call, the outputs that are beside its answer, and what checks the answer.
Parts = tuple[
    Callable[[], torch.Tensor], tuple[torch.Tensor | None, ...], Callable[[torch.Tensor], None]
]


class Tensors:
    """The tensors of a case; :meth:`fill` gives those in place the content of a step."""

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device = case, device
        self.index = torch.int64 if getattr(case, "wide", 0) else torch.int32
        self.guards: list[tuple[str, Guarded]] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.more: Callable[[int], None] = lambda step: None  # what a step draws beside all that
        self._before: dict[str, torch.Tensor] = {}

    def guarded(
        self,
        name: str,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        given: bool = True,
        **more: int,
    ) -> Any:
        """Make a tensor with guards; ``given``: one that a call must leave as it is."""
        held = Guarded(rows, columns, dtype, device=self.device, **more)
        self.guards.append((name, held))
        if given:
            self.inputs[name] = held.inside
        return held.inside

    def output(self, name: str, rows: int, columns: int, dtype: torch.dtype, **more: int) -> Any:
        """Make an output with guards, full of what no call would write."""
        return dirty(self.guarded(name, rows, columns, dtype, given=False, **more))

    def vector(self, name: str, rows: int) -> torch.Tensor:
        """Make an output of one int32 a row."""
        return self.output(name, 1, rows, torch.int32)[0]

    def fill(self, step: int) -> None:
        """Draw the content of a step."""
        raise NotImplementedError

    def remember(self, step: int) -> None:
        """End :meth:`fill`: keep the inputs, which a call must leave as they are."""
        self.more(step)
        self._before = {
            name: bits(x).clone() for name, x in self.inputs.items() if x.numel() <= _REMEMBERED
        }

    def check_inputs(self) -> None:
        """Raise :class:`Wrong` if an input was written to."""
        for name, before in self._before.items():
            if not torch.equal(before, bits(self.inputs[name])):
                raise Wrong(f"{name} was written to")

    def check_guards(self) -> None:
        """Raise :class:`Wrong` if anything around a tensor was written to."""
        for name, held in self.guards:
            fault = held.fault()
            if fault:
                raise Wrong(f"around {name}: {fault}")


class Requests(Tensors):
    """The tensors of a :class:`~tests.fuzz.case.RequestsCase`: lengths, and tables."""

    def __init__(self, case: Any, device: str) -> None:
        super().__init__(case, device)
        self.batch, self.next_n = case.kept[1], case.next_n
        self.rows = rows = self.batch * case.next_n
        room = torch.zeros(
            rows if FORMS[case.form] else self.batch, 2, dtype=self.index, device=device
        )
        self.lengths = {
            "rows": lambda: room[:, 0].clone(),
            "batch": lambda: room[:, 0].clone(),
            "batch1": lambda: room[:, :1].clone(),
            "two_d": lambda: room[:, 0].clone().view(self.batch, case.next_n),
            "strided": lambda: room[:, 0],
        }[case.form]()
        self.inputs["lengths"] = self.lengths
        self.per_row = torch.zeros(rows, dtype=torch.int64, device=device)

    def fill_lengths(self, step: int, less: torch.Tensor | None = None) -> None:
        """Draw the lengths; ``less``: how much less than its request each row drawn sees."""
        case = self.case
        lengths = torch.tensor(case.requests_of(step), dtype=torch.int64, device=self.device)
        if less is None:
            ahead = torch.arange(1 - case.next_n, 1, device=self.device)
        else:
            ahead = -less[case.kept[0] :][: self.batch].to(self.device)
        self.per_row.copy_((lengths[:, None] + ahead).reshape(-1))
        given = self.per_row if FORMS[case.form] else lengths
        self.lengths.copy_(given.view(self.lengths.shape))

    def of_rows(self, drawn: torch.Tensor) -> torch.Tensor:
        """Return the part of what was drawn for all rows that is kept."""
        return drawn[self.case.kept[0] * self.next_n :][: self.rows]

    def table_of(self, name: str, pages: int, per_row: int = 0) -> Any:
        """Make a table of pages, a row for every row or every request."""
        rows = self.rows if per_row else self.batch
        return self.guarded(name, rows, max(0, pages), torch.int32, stride=max(0, pages) + 3)

    def fill_table(self, table: torch.Tensor, g: torch.Generator, per_row: int = 0) -> None:
        """Draw the pages of such a table."""
        rows, first = self.case.requests, self.case.kept[0]
        if per_row:
            rows, first = rows * self.next_n, first * self.next_n
        pages = torch.randint(-1, 10_000, (rows, table.shape[1]), generator=g).int()
        table.copy_(pages[first : first + table.shape[0]])


def run_parts(problem: Tensors, parts: Parts) -> None:
    """Call, or replay, and check; raises :class:`Wrong` for what is not as promised."""
    call, beside, check = parts
    if problem.case.graph:
        replay, answer = captured(call, problem.device)
        for step in range(problem.case.graph):
            problem.fill(step)
            for x in (*beside, answer):
                if x is not None:
                    dirty(x)
            # Without a GPU a replay is a call, and may give another tensor.
            again = replay()
            problem.check_inputs()
            check_in(f"replay {step}: ", check, answer if again is None else again)
    else:
        answer = call()
        problem.check_inputs()
        check(answer)
    problem.check_guards()


def check_in(context: str, check: Callable[[torch.Tensor], None], answer: torch.Tensor) -> None:
    """Check an answer, and say of which call it is."""
    try:
        check(answer)
    except Wrong as wrong:
        raise Wrong(f"{context}{wrong}", wrong.rows) from None


def dirty(x: torch.Tensor) -> torch.Tensor:
    """Fill a result, in place, with what no call would write."""
    x.view(torch.uint8).fill_(_DIRT)
    return x


def page_view(pages: torch.Tensor, dimensions: int, block: int) -> torch.Tensor:
    """Return a cache ``[pages, bytes]`` with so many dimensions, in which engines hand it over."""
    size = pages.shape[1]
    row = size // block
    shape = {2: (size,), 3: (block, row), 4: (block, 1, row)}[dimensions]
    inner = {2: (1,), 3: (row, 1), 4: (row, row, 1)}[dimensions]
    return pages.as_strided(
        (pages.shape[0], *shape), (pages.stride(0), *inner), pages.storage_offset()
    )


def check_form(got: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`Wrong` unless the answer has a shape and a dtype."""
    if (tuple(got.shape), got.dtype) != (shape, dtype):
        raise Wrong(f"the answer is {got.dtype} {tuple(got.shape)}")


def check_indices(problem: Requests, logits: torch.Tensor, index: Any, starts: Any = None) -> None:
    """Hold the indices of a top-k against what they are selected among; None is no answer."""
    if index is not None:
        case = problem.case
        check_selection(
            logits, problem.per_row, case.k, index, starts=starts, sort=bool(case.sort),
            ascending=True,
        )  # fmt: skip


def raise_wrong(
    wrong: torch.Tensor, why: str, values: Callable[[int, int], str] = lambda row, column: ""
) -> None:
    """Raise :class:`Wrong` if any element is."""
    if not bool(wrong.any()):
        return
    rows = wrong.any(1).nonzero().reshape(-1).tolist()
    column = int(wrong[rows[0]].nonzero()[0])
    found = values(rows[0], column)
    raise Wrong(
        f"{why}, in {len(rows)} of {len(wrong)} rows, first {rows[0]}, column {column}"
        + (f": {found}" if found else ""),
        rows,
    )
