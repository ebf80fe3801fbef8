"""The bars that the top-k is held to, and what a results file says of each.

Ratios are between figures of one run, except where a recorded figure (``--against``) is the best
upstream one; such bars are reported apart and say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dsv4_plugin.cli.bench.topk.peers import OURS, is_vllm_choice, seed_figures

__all__ = [
    "FLOOR_RATIO",
    "Bar",
    "Cell",
    "all_bars",
    "best_peers",
    "geomean",
    "seed_lines",
    "sound",
]

Row = dict[str, Any]
Cell = tuple[int, int, int]  # k, rows, columns

BEST_MEAN = {"bfloat16": 0.60, "float32": 0.80}
BEST_WORST = {"bfloat16": 0.95, "float32": 1.05}
VLLM_MEAN = {"bfloat16": 0.45, "float32": 0.65}
ABSOLUTE_US = {  # bfloat16, k = 512: (rows, columns) → microseconds on an H200
    (1, 8192): 2.5,
    (1, 65_536): 4.2,
    (1, 256_000): 5.0,
    (32, 65_536): 6.5,
    (32, 256_000): 11.0,
    (128, 131_072): 16.0,
    (128, 256_000): 28.0,
}
NARROW = 1.05  # 8K rows in a 256,000-wide buffer over the same rows at their natural width
ADVERSARIAL = {"bfloat16": 1.5, "float32": 2.0}  # over the N(0,1) time
PREFILL = {"vllm": 0.5, "sglang": 1 / 1.3}  # bfloat16 over the peers whose name has this
FLOOR_RATIO = 2.5  # above this times one pass over the scores, a cell wants an explanation


@dataclass(frozen=True)
class Bar:
    """One bar: ``value`` must not be above ``most``."""

    name: str
    value: float
    most: float
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.value <= self.most

    def __str__(self) -> str:
        """Return the line of the summary."""
        note = f"  ({self.note})" if self.note else ""
        word = "PASS" if self.met else "MISS"
        return f"{word}  {self.name}: {self.value:.3f}, bar {self.most:.3f}{note}"

    def as_dict(self) -> Row:
        """Return the bar for the results file."""
        return {
            "bar": self.name, "value": round(self.value, 4), "most": round(self.most, 4),
            "met": self.met, "note": self.note,
        }  # fmt: skip


def all_bars(results: list[Row], vllm: str) -> list[Bar]:
    """Return every bar that the results have figures for.

    ``vllm`` is the implementation that stands for vLLM 0.33's own choice of kernel.
    """
    bars = []
    live = [row for row in results if not row.get("recorded")]
    sources = [("", live)]
    if len(live) != len(results):
        sources.append((", recorded figures of another run included", results))
    for where, rows in sources:
        decode = [row for row in rows if row["suite"] == "decode"]
        for dtype in ("bfloat16", "float32"):
            bars += _against_peers(decode, dtype, where)
            bars += _against_vllm(decode, dtype, vllm, where)
    bars += _absolute(live)
    bars += _narrow(live)
    bars += _adversarial(live)
    bars += _prefill(live)
    bars += _exactness(live)
    return bars


def best_peers(decode: list[Row], dtype: str, field: str = "warm_us") -> dict[Cell, Row]:
    """Return the fastest peer of every cell: of any dtype, or of float32 where ``dtype`` is it.

    A peer whose answer was wrong in the cell has no time there.
    """
    best: dict[Cell, Row] = {}
    for row in decode:
        if row["implementation"] == OURS or row.get(field) is None:
            continue
        if not sound(row):
            continue
        if dtype == "float32" and row["dtype"] != "float32":
            continue
        cell = _cell(row)
        if cell not in best or row[field] < best[cell][field]:
            best[cell] = row
    return best


def sound(row: Row) -> bool:
    """Whether an answer was not found wrong: not exact, or, of logits, out of tolerance."""
    return row.get("exact") is not False and row.get("right") is not False


def _cell(row: Row) -> Cell:
    return row.get("k", 0), row["rows"], row["columns"]


def _ours(rows: Iterable[Row], dtype: str) -> dict[Cell, Row]:
    return {
        _cell(row): row for row in rows if row["implementation"] == OURS and row["dtype"] == dtype
    }


def geomean(ratios: Iterable[float]) -> float:
    """Return the mean by which ratios are compared."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))


def _compare(ours: dict[Cell, Row], theirs: dict[Cell, Row], field: str) -> dict[Cell, float]:
    return {
        cell: row[field] / theirs[cell][field]
        for cell, row in ours.items()
        if cell in theirs and row.get(field) is not None and theirs[cell].get(field) is not None
    }


def _show(cell: Cell) -> str:
    return f"k {cell[0]}, {cell[1]} x {cell[2]}"


def _against_peers(decode: list[Row], dtype: str, where: str) -> list[Bar]:
    bars = []
    of = "of any dtype" if dtype == "bfloat16" else "of float32"
    for field in ("warm_us", "cold_us"):
        theirs = best_peers(decode, dtype, field)
        ratios = _compare(_ours(decode, dtype), theirs, field)
        if not ratios:
            continue
        heat = field.removesuffix("_us")
        cell, worst = max(ratios.items(), key=lambda item: item[1])
        name = f"{dtype} {heat} / best upstream {of}"
        bars.append(Bar(f"{name}, geometric mean", geomean(ratios.values()), BEST_MEAN[dtype],
                        f"{len(ratios)} cells{where}"))  # fmt: skip
        note = f"{_show(cell)}, against {theirs[cell]['implementation']}{where}"
        bars.append(Bar(f"{name}, worst cell", worst, BEST_WORST[dtype], note))
    return bars


def _against_vllm(decode: list[Row], dtype: str, vllm: str, where: str) -> list[Bar]:
    theirs: dict[Cell, Row] = {}
    for row in decode:
        if row["dtype"] == "float32" and is_vllm_choice(row, vllm):
            theirs.setdefault(_cell(row), row)  # a live figure, which comes first, wins
    bars = []
    for field in ("warm_us", "cold_us"):
        ratios = _compare(_ours(decode, dtype), theirs, field)
        if ratios:
            heat = field.removesuffix("_us")
            bars.append(Bar(f"{dtype} {heat} / {_own(vllm)} own choice, geometric mean",
                            geomean(ratios.values()), VLLM_MEAN[dtype],
                            f"{len(ratios)} cells{where}"))  # fmt: skip
    return bars


def _own(vllm: str) -> str:
    """Name the release whose choice the peer is; that of an installed vLLM has it in its name."""
    return f"{vllm}'s" if vllm.startswith("vllm ") else "vLLM 0.33's"


def _absolute(live: list[Row]) -> list[Bar]:
    ours = _ours((row for row in live if row["suite"] == "decode"), "bfloat16")
    return [
        Bar(f"bfloat16 warm, k 512, {rows} x {columns}, us", ours[512, rows, columns]["warm_us"],
            most, "the bar is for an H200")
        for (rows, columns), most in ABSOLUTE_US.items()
        if (512, rows, columns) in ours
    ]  # fmt: skip


def _worst_by_dtype(
    rows: Iterable[Row], base: Callable[[Row], Row | None], most: Callable[[str], float], name: str
) -> list[Bar]:
    """Hold each row against another one of ours; the worst of every dtype makes the bar."""
    worst: dict[str, tuple[float, Row]] = {}
    for row in rows:
        other = base(row)
        if other is not None:
            ratio = row["warm_us"] / other["warm_us"]
            if row["dtype"] not in worst or ratio > worst[row["dtype"]][0]:
                worst[row["dtype"]] = ratio, row
    return [
        Bar(f"{dtype} {name}, worst cell", ratio, most(dtype),
            f"{_show(_cell(row))}{'' if row['kind'] == 'normal' else ' ' + row['kind']}")
        for dtype, (ratio, row) in worst.items()
    ]  # fmt: skip


def _narrow(live: list[Row]) -> list[Bar]:
    ours = [row for row in live if row["suite"] == "narrow" and row["implementation"] == OURS]
    natural = {(row["dtype"], *_cell(row)): row for row in ours if row["width"] == row["columns"]}
    return _worst_by_dtype(
        (row for row in ours if row["width"] > row["columns"]),
        lambda row: natural.get((row["dtype"], *_cell(row))),
        lambda dtype: NARROW,
        "8K rows in a 256,000-wide buffer / at natural width",
    )


def _adversarial(live: list[Row]) -> list[Bar]:
    ours = [row for row in live if row["suite"] == "adversarial" and row["implementation"] == OURS]
    normal = {(row["dtype"], *_cell(row)): row for row in ours if row["kind"] == "normal"}
    bars = []
    for kind in dict.fromkeys(row["kind"] for row in ours if row["kind"] != "normal"):
        bars += _worst_by_dtype(
            (row for row in ours if row["kind"] == kind),
            lambda row: normal.get((row["dtype"], *_cell(row))),
            lambda dtype: ADVERSARIAL["float32" if dtype == "float32" else "bfloat16"],
            f"{kind} / N(0,1)",
        )
    return bars


def _prefill(live: list[Row]) -> list[Bar]:
    rows = [row for row in live if row["suite"] == "prefill"]
    bars = []
    for engine, most in PREFILL.items():
        ratios: dict[str, float] = {}
        for ours in rows:
            if ours["implementation"] != OURS or ours["dtype"] != "bfloat16":
                continue
            theirs = [
                row["warm_us"]
                for row in rows
                if engine in row["implementation"].lower()
                and (*_cell(row), row["windows"]) == (*_cell(ours), ours["windows"])
            ]
            if theirs:
                where = f"{_show(_cell(ours))} {ours['windows']}"
                ratios[where] = ours["warm_us"] / min(theirs)
        if ratios:
            cell, worst = max(ratios.items(), key=lambda item: item[1])
            name = f"bfloat16 prefill / {engine}"
            bars.append(Bar(f"{name}, geometric mean", geomean(ratios.values()), most,
                            f"{len(ratios)} cells"))  # fmt: skip
            bars.append(Bar(f"{name}, worst cell", worst, most, cell))
    return bars


def _exactness(live: list[Row]) -> list[Bar]:
    """Count what must be none: a fast answer that is not exact is a bug."""
    ours = [row for row in live if row["implementation"] == OURS]
    if not ours:
        return []
    wrong = [row for row in ours if not (row["exact"] and row.get("lowest_index", True))]
    note = f"of {len(ours)}"
    if wrong:
        first = wrong[0]
        note += f"; first: {first['dtype']} {_show(_cell(first))} {first['kind']}"
    return [Bar("cells in which ours is not exact", float(len(wrong)), 0.0, note)]


def seed_lines(results: list[Row]) -> list[str]:
    """Return the seed's table: our bfloat16 over our own float32, the seed's figure beside it."""
    rows = [row for row in results if row["suite"] in ("seed", "decode")]
    half, full = _ours(rows, "bfloat16"), _ours(rows, "float32")
    seed = seed_figures()
    cells = [cell for cell in seed if cell in half and cell in full]
    if not cells:
        return []
    columns = list(dict.fromkeys(c for _, _, c in cells))
    lines = [
        "Speed-up of bfloat16 over float32, warm: ours (the seed's, vLLM #40811, its own machine)",
        f"{'k':>5} {'rows':>5} " + "".join(f"{c:>14}" for c in columns),
    ]
    for k, r in dict.fromkeys((k, r) for k, r, _ in cells):
        line = f"{k:5d} {r:5d} "
        for c in columns:
            cell = k, r, c
            shown = ""
            if cell in half and cell in full and cell in seed:
                ratio = full[cell]["warm_us"] / half[cell]["warm_us"]
                shown = f"{ratio:.2f} ({seed[cell]:.2f})"
            line += f"{shown:>14}"
        lines.append(line)
    ratios = [full[cell]["warm_us"] / half[cell]["warm_us"] for cell in cells]
    theirs = [seed[cell] for cell in cells]
    lines.append(
        f"geometric mean over {len(cells)} cells: {geomean(ratios):.2f} ({geomean(theirs):.2f})"
    )
    return lines
