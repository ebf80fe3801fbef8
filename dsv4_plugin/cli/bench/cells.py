"""What the benchmarks share: each measures *cells* (one case at one size), warm and cold.

*Warm*: every launch uses the same tensors. *Cold*: the launches rotate over copies of what is read.
The copies together are larger than the L2, or each is read once after the L2 was overwritten.
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
DIRTY = -2  # an output is filled with it before a call; it is no answer
MOST_COPIES = 64
MOST_BYTES = 12 << 30  # all copies together; some hold more than is read
COLD_PEERS = 2  # how many of a cell's best peers are measured cold too
GRAPH_US = 8000.0  # a graph is not made much longer than this

Row = dict[str, Any]
# measures a case; returns its floor in µs and the shown text
Cell = Callable[[Any], tuple[float, str]]


@dataclass
class CellBench:
    """Measures cells; ``results`` grows with each cell, and then ``saved`` is called."""

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
        """Measure the cases; cases with the same tensors (their ``data``) are measured together."""
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
            del cell  # and the tensors that it holds, before new ones are made

    def _begin(self, group: list[Any]) -> Cell:
        """Make the tensors of a group; return the function that measures one of its cases."""
        raise NotImplementedError

    def _end(self) -> None:
        """Add figures that need the results of a whole group."""

    def measure(
        self,
        case: Any,
        about: Row,
        runs: dict[str, Any],
        warm: Callable[[str], Row],
        cold: Callable[[str, float], float | None],
    ) -> str:
        """Measure every implementation in one cell; return the text of the progress line.

        ``runs`` has the plugin first. ``warm`` returns the figures of an implementation. ``cold``
        gets the warm microseconds and returns those on cold memory; it is called for the plugin and
        the best peers.
        """
        mine: list[Row] = []
        for name in runs:
            try:
                mine.append({**about, "implementation": name, **warm(name)})
            except Exception as error:  # the peer does not take this case
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
        """Log once per dtype that a peer does not take a case."""
        if (name, case.dtype) not in self._refused:
            self._refused.add((name, case.dtype))
            self.say(f"  {name} refuses {case}: {error}"[:160])


def copies_for(read: int, held: int) -> int:
    """Return how many copies make a call cold that reads ``read`` of each copy's ``held`` bytes."""
    return max(1, min(MOST_COPIES, -(-COLD_BYTES // read), MOST_BYTES // held))


def launches_for(us: float, most: int) -> int:
    """Return the launches of a graph: fewer if one launch takes long (at least ``us``)."""
    return max(4, min(most, int(GRAPH_US / max(2 * us, 1e-3))))


def time_cold(
    calls: Sequence[Callable[[], Any]], device: str, warm_us: float, *, replays: int
) -> float:
    """Time a rotation; a single buffer that is larger than the L2 is already cold."""
    if len(calls) == 1:
        return warm_us
    # The rotation is larger than the L2, or each copy gets one launch after the L2 was flushed.
    again = len(calls) < MOST_COPIES and warm_us < GRAPH_US / 20
    launches = max(20, len(calls)) if again else len(calls)
    return round(time_calls(calls, device, launches=launches, replays=replays, flush=True), 3)


def _warm_us(row: Row) -> float:
    return row["warm_us"]


def _shown(row: Row) -> str:
    """Show warm/cold, if cold was measured; ! marks a wrong answer."""
    cold = "" if row["cold_us"] is None else f"/{row['cold_us']:.2f}"
    return f"{row['implementation']} {row['warm_us']:.2f}{cold}{'' if sound(row) else '!'}"
