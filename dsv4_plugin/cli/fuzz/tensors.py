"""What the runs of the fuzzer share: guarded tensors, replays, and how a finding is raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.cli.checks.canary import Guarded
from dsv4_plugin.cli.checks.oracles import Wrong
from dsv4_plugin.cli.checks.replay import captured

__all__ = ["Parts", "Tensors", "bits", "dirty", "raise_wrong", "run_parts"]

_DIRT = 0xAB  # the bytes that outputs are filled with

# The call, what cleans its other outputs, and what checks its answer.
Parts = tuple[Callable[[], torch.Tensor], Callable[[], Any], Callable[[torch.Tensor, str], None]]


class Tensors:
    """The tensors of a case; :meth:`fill` gives those in place the content of a step."""

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device = case, device
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
        self._before = {name: x.clone() for name, x in self.inputs.items()}

    def check_inputs(self) -> None:
        """Raise :class:`Wrong` if an input was written to."""
        for name, before in self._before.items():
            now = self.inputs[name]
            if not torch.equal(bits(before), bits(now)):
                raise Wrong(f"{name} was written to")


def run_parts(problem: Tensors, parts: Parts) -> None:
    """Call, or replay, and check; raises :class:`Wrong` for what is not as promised."""
    call, clean, check = parts
    if problem.case.graph:
        replay, answer = captured(call, problem.device)
        for step in range(problem.case.graph):
            problem.fill(step)
            clean()
            dirty(answer)
            # Without a GPU a replay is a call, and may give another tensor.
            again = replay()
            problem.check_inputs()
            check(answer if again is None else again, f"replay {step}: ")
    else:
        answer = call()
        problem.check_inputs()
        check(answer, "")
    for name, held in problem.guards:
        fault = held.fault()
        if fault:
            raise Wrong(f"around {name}: {fault}")


def dirty(x: torch.Tensor) -> torch.Tensor:
    """Fill a result, in place, with what no call would write."""
    x.view(torch.uint8).fill_(_DIRT)
    return x


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(words)


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
