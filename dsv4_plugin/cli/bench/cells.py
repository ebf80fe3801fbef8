"""What the benchmarks of cells have in common: the plugin beside the peers, warm and cold.

*Warm*: the same tensors at every launch. *Cold*: a rotation over copies of what is read, more than
the L2 holds or each read once after the L2 was overwritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4_plugin.cli.bench import dry
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.cli.checks.compare import PLUGIN, sound
from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.checks.timing import time_calls

__all__ = ["DIRTY", "Cell", "CellBench", "Row", "copies_for", "launches_for", "time_cold"]

COLD_BYTES = 150 << 20
DIRTY = -2  # what fills an output before a call: no answer
MOST_COPIES = 64
MOST_BYTES = 12 << 30  # of all copies together: some hold more than is read
COLD_PEERS = 2  # the best peers of a cell that are measured cold too
GRAPH_US = 8000.0  # a graph is not made much longer than this

Row = dict[str, Any]
Cell = Callable[[Any], tuple[float, str]]  # measures a case: its floor in µs, and what is shown


@dataclass
class CellBench:
    """Measures cells; ``results`` grows as it goes, and ``saved`` is called after each cell."""

    peers: Peers
    say: Callable[[str], None]
    saved: Callable[[], None] = lambda: None
    device: str = "cuda"
    cold_all: bool = False
    launches: int = 40
    replays: int = 7
    budget_s: float | None = None
    results: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set the clock."""
        self.progress = Progress(self.say, self.budget_s)
        self._refused: set[tuple[str, str]] = set()

    @property
    def backend(self) -> str:
        """The plugin's backend: the kernels, or the torch reference in a dry run."""
        return "cuda" if self.device == "cuda" else "torch"

    def run(self, cases: Sequence[Any]) -> None:
        """Measure the cases, those on the same tensors (their ``data``) together."""
        if self.progress.out_of_time:
            return
        self.progress.start(len(cases))
        for _, some in itertools.groupby(cases, key=lambda case: case.data):
            group = list(some)
            if self.progress.spent():
                return
            cell = self._begin(group)
            for case in group:
                if self.progress.spent():
                    break
                floor_us, text = cell(case)
                floor = f"  floor {floor_us:.2f}" if self.device == "cuda" else ""
                self.progress.done(f"{case}{floor}  {text}")
                self.saved()
            self._end()
            del cell  # and the tensors that it holds, before there are others

    def _begin(self, group: list[Any]) -> Cell:
        """Make the tensors of a group; returns what measures one of its cases."""
        raise NotImplementedError

    def _end(self) -> None:
        """Add to the results of a group what needs all of them."""

    def measure(
        self,
        case: Any,
        about: Row,
        runs: dict[str, Any],
        warm: Callable[[str], Row],
        cold: Callable[[str, float], float | None],
    ) -> str:
        """Measure every implementation in one cell; returns what the progress line shows.

        ``runs`` has the plugin first. ``warm`` gives the figures of an implementation, ``cold`` its
        microseconds on cold memory, given the warm ones; that of the best peers is taken.
        """
        mine: list[Row] = []
        for name in runs:
            try:
                mine.append({**about, "implementation": name, **warm(name)})
            except Exception as error:  # outside of what this peer takes
                if name == PLUGIN:
                    raise
                self._refuse(name, case, error)
                continue
            self.results.append(mine[-1])
        chosen = mine[1:] if self.cold_all else sorted(mine[1:], key=_warm_us)[:COLD_PEERS]
        for row in [mine[0], *chosen]:
            row["cold_us"] = cold(row["implementation"], row["warm_us"])
        return "  ".join(map(_shown if self.device == "cuda" else dry.shown, mine))

    def _refuse(self, name: str, case: Any, error: Exception) -> None:
        """Say once for each dtype that a peer does not take a case."""
        if (name, case.dtype) not in self._refused:
            self._refused.add((name, case.dtype))
            self.say(f"  {name} refuses {case}: {error}"[:160])


def copies_for(read: int, held: int) -> int:
    """Return how many copies make a call cold that reads ``read`` of the ``held`` bytes of each."""
    return max(1, min(MOST_COPIES, -(-COLD_BYTES // read), MOST_BYTES // held))


def launches_for(us: float, most: int) -> int:
    """Return how many launches of at least ``us`` a graph gets: fewer where one takes long."""
    return max(4, min(most, int(GRAPH_US / max(2 * us, 1e-3))))


def time_cold(
    calls: Sequence[Callable[[], Any]], device: str, warm_us: float, *, replays: int
) -> float:
    """Time a rotation; one buffer that is larger than the L2 is cold already."""
    if len(calls) == 1:
        return warm_us
    # The rotation is larger than the L2, or each copy has one launch after the L2 was flushed.
    again = len(calls) < MOST_COPIES and warm_us < GRAPH_US / 20
    launches = max(20, len(calls)) if again else len(calls)
    return round(time_calls(calls, device, launches=launches, replays=replays, flush=True), 3)


def _warm_us(row: Row) -> float:
    return row["warm_us"]


def _shown(row: Row) -> str:
    """Show warm/cold, where cold was measured; ! is an answer that is wrong."""
    cold = "" if row["cold_us"] is None else f"/{row['cold_us']:.2f}"
    return f"{row['implementation']} {row['warm_us']:.2f}{cold}{'' if sound(row) else '!'}"
