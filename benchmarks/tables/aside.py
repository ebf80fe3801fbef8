"""What ``DSV4_TOPK=auto`` leaves to an engine's own kernel: the table in the package, and docs.

``python -m benchmarks.tables aside-table`` prints ``dsv4_plugin/engines/shared/aside_table.py``,
which :func:`longest` makes of the file that ``python -m benchmarks.tuning.aside`` writes.
``python -m benchmarks.tables aside`` prints what stands between the markers of docs/kernels.md.
"""

from __future__ import annotations

import collections
from statistics import geometric_mean
from typing import Any

from benchmarks.tables import readme as figures
from dsv4_plugin.engines.shared import aside as choice
from dsv4_plugin.engines.shared.decision import Selection

__all__ = [
    "ASIDE", "LEVEL", "NARROW", "SINCE", "aside", "longest", "module", "verdict", "with_auto",
]  # fmt: skip

ASIDE = "h200_aside.json"
LEVEL = 1.02  # up to this ratio two figures are the same
SCATTER_US = 2.0  # by which the figures behind the logits, differences of two, scatter
NARROW = 131_072  # wider buffers are cut for as many CTAs as the widest that was measured
SINCE = {"vllm": (0, 33), "sglang": (0, 5, 23)}  # the releases of the kernels in the file

Row = dict[str, Any]
Entry = tuple[int, int, int]  # rows, and up to which length in narrow buffers and in wide ones


def verdict(row: Row) -> str:
    """Return who is faster in a cell, ``"plugin"``, ``"engine"`` or ``""``.

    The times just after the logits decide. If they differ by less than their scatter, the times of
    the two kernels replayed alone decide.
    """
    for name, scatter in (("us", SCATTER_US), ("warm_us", 0.0)):
        plugin, engine = row[f"plugin_{name}"], row[f"engine_{name}"]
        if engine > LEVEL * plugin + scatter:
            return "plugin"
        if plugin > LEVEL * engine + scatter:
            return "engine"
    return ""


def longest(document: Any) -> dict[tuple[str, int], list[Entry]]:
    """Return for each call and k the numbers of rows, and up to which length they are the engine's.

    0: the plugin keeps them. The engine gets a length if its kernel was exact there and at every
    shorter one, and if it was faster at one of them and the plugin at none, or if it was faster at
    that length and, in the geometric mean, not slower up to it. For narrow buffers all cells count,
    and the mean of the narrow ones as well; for wide ones only those of wide buffers. If the kernel
    was wrong on a distribution, the engine gets no row of that length or longer.
    """
    cells = collections.defaultdict(list)
    for row in document["results"]:
        cells[row["call"], row["k"], row["rows"]].append(row)
    table: dict[tuple[str, int], list[Entry]] = {}
    for (call, k, rows), measured in sorted(cells.items(), key=lambda cell: cell[0][2]):
        wrong = min(
            (
                row["columns"]
                for row in document["exactness"]
                if (row["call"], row["k"]) == (call, k) and not row["engine_exact"]
            ),
            default=1 << 31,
        )
        wide = [row for row in measured if row["width"] > NARROW]
        narrow = min(NARROW, _longest(measured, wrong))
        table.setdefault((call, k), []).append((rows, narrow, _longest(wide, wrong)))
    return {about: table[about] for about in sorted(table)}


def _longest(measured: list[Row], wrong: int) -> int:
    most = 0
    before: list[Row] = []
    for columns in sorted({row["columns"] for row in measured}):
        here = [row for row in measured if row["columns"] == columns]
        before += here
        if columns >= wrong or not all(row["engine_exact"] for row in here):
            break
        said = [verdict(row) for row in before]
        last = said[-len(here) :]
        if ("engine" in said and "plugin" not in said) or (
            "engine" in last and "plugin" not in last and _not_slower(before)
        ):
            most = columns
    return most


def _not_slower(rows: list[Row]) -> bool:
    """Whether the engine's kernel was, in the mean, not slower, and in narrow buffers neither."""
    narrow = [row for row in rows if row["width"] <= NARROW]
    return all(
        geometric_mean([row["plugin_us"] / row["engine_us"] for row in some]) >= 1
        for some in (rows, narrow)
        if some
    )


def module() -> str:
    """Return the source of ``dsv4_plugin/engines/shared/aside_table.py``."""
    document = figures.load(ASIDE)
    about, results = document["machine"], document["results"]
    widest = {row["call"]: 0 for row in results}
    for row in results:
        widest[row["call"]] = max(widest[row["call"]], row["width"])
    lines = [
        '"""Where an engine\'s own top-k is faster than the plugin\'s; do not edit.',
        "",
        "``python -m benchmarks.tables aside-table`` makes this file of",
        f"``benchmarks/results/{ASIDE}`` ({about['gpu']}, commit {about['commit'][:7]}).",
        '"""',
        "",
        "# engine -> the release whose kernels were measured",
        "SINCE: dict[str, tuple[int, ...]] = {",
        *(f'    "{engine}": {release},' for engine, release in SINCE.items()),
        "}",
        "",
        f"SMS = {about['sms']}  # multiprocessors of the GPU that was measured",
        "# call -> the widest buffer that was measured, in scores",
        "WIDEST: dict[str, int] = {",
        *(f'    "{call}": {most},' for call, most in sorted(widest.items())),
        "}",
        f"NARROW = {NARROW}  # a buffer that is wider is a wide one",
        "",
        "# call, k -> (rows, up to which length of a row the call is the engine's in a narrow",
        "# buffer, and in a wide one); 0: it is the plugin's",
        "LONGEST: dict[tuple[str, int], tuple[tuple[int, int, int], ...]] = {",
    ]
    for (call, k), measured in longest(document).items():
        lines.append(f'    ("{call}", {k}): (')
        lines += [f"        {entry}," for entry in measured]
        lines.append("    ),")
    return "\n".join([*lines, "}"])


def with_auto(document: Any, *, graph: bool = False) -> list[tuple[Row, float]]:
    """Return each cell with the ratio of the time under ``auto`` to that of the engine's kernel.

    The times are those just after the logits. The host knows how long the rows are, or, in a
    captured ``graph``, how wide their buffer is.
    """
    found = []
    for row in document["results"]:
        engine, _, call = row["call"].partition(".")
        selection = Selection("fp32", "cuda", aside=engine)
        longest = row["width"] if graph else row["columns"]
        left = choice.faster(selection, call, row["k"], row["rows"], longest, row["width"])
        found.append((row, 1.0 if left else row["plugin_us"] / row["engine_us"]))
    return found


def aside() -> str:
    """Return the Markdown between the ``aside`` markers of docs/kernels.md."""
    document = figures.load(ASIDE)
    about = document["machine"]
    lines = [
        f"One {about['gpu']}, commit {about['commit'][:7]} (`benchmarks/results/{ASIDE}`). "
        f"A wide buffer has rows of more than {NARROW:,} scores. The time of a call just after "
        f"its scores were written scatters by {SCATTER_US:g} µs.",
        "",
        "| call | k | rows | the engine gets the call up to a longest row of | in a wide buffer |",
        "|---|---|---|---|---|",
    ]
    for (call, k), measured in longest(document).items():
        for rows, narrow, wide in measured:
            lines.append(f"| `{call}` | {k} | {rows} | {_length(narrow)} | {_length(wide)} |")
    lines.append("")
    known, graphs = with_auto(document), with_auto(document, graph=True)
    for call in dict.fromkeys(row["call"] for row, _ in known):
        mine = [row for row, _ in known if row["call"] == call]
        plugin = [row["plugin_us"] / row["engine_us"] for row in mine]
        captured = any(row["width"] > row["columns"] for row in mine)
        lines.append(
            f"- `{call}`, {len(mine)} cells, the time divided by that of the engine's kernel: the "
            f"plugin alone {geometric_mean(plugin):.2f}, slower in "
            f"{sum(verdict(row) == 'engine' for row in mine)}; `auto` {_auto(known, call)}"
            + (f"; `auto` in a captured graph {_auto(graphs, call)}." if captured else ".")
        )
    return "\n".join(lines)


def _auto(cells: list[tuple[Row, float]], call: str) -> str:
    """Say what ``auto`` takes: the mean, and in how many cells the plugin is slower and serves."""
    mine = [(row, ratio) for row, ratio in cells if row["call"] == call]
    slower = sum(verdict(row) == "engine" and ratio != 1 for row, ratio in mine)
    left = sum(ratio == 1 for _, ratio in mine)
    mean = geometric_mean([ratio for _, ratio in mine])
    return f"{mean:.2f}, slower in {slower}, with {left} cells left to the engine"


def _length(most: int) -> str:
    return f"{most:,}" if most else "–"
