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

__all__ = ["ASIDE", "LEVEL", "SINCE", "aside", "longest", "module", "with_auto"]

ASIDE = "h200_aside.json"
LEVEL = 1.02  # up to this ratio two figures are the same
SINCE = {"vllm": (0, 33), "sglang": (0, 5, 23)}  # the releases of the kernels in the file

Row = dict[str, Any]


def longest(document: Any) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Return for each call and k the numbers of rows, and up to which length they are the engine's.

    0: the plugin keeps them. A length is the engine's if there, and at every shorter one, its
    kernel was exact and not slower, in buffers of every width that was measured, and if the plugin
    was slower at one of them. A distribution at which the kernel was wrong takes all rows of that
    length and more from it.
    """
    cells = collections.defaultdict(list)
    for row in document["results"]:
        cells[row["call"], row["k"], row["rows"], row["columns"]].append(row)
    table: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for call, k in dict.fromkeys((call, k) for call, k, _, _ in cells):
        wrong = [
            row["columns"]
            for row in document["exactness"]
            if (row["call"], row["k"]) == (call, k) and not row["engine_exact"]
        ]
        table[call, k] = [
            (rows, _longest(cells, (call, k, rows), min(wrong, default=1 << 31)))
            for rows in sorted({r for c, kk, r, _ in cells if (c, kk) == (call, k)})
        ]
    return table


def _longest(cells: Any, about: tuple[str, int, int], wrong: int) -> int:
    most, slower = 0, False
    for columns in sorted(c for *others, c in cells if tuple(others) == about):
        measured = cells[(*about, columns)]
        if columns >= wrong or not all(row["engine_exact"] for row in measured):
            break
        if any(row["engine_us"] > LEVEL * row["plugin_us"] for row in measured):
            break
        slower = slower or any(row["plugin_us"] > LEVEL * row["engine_us"] for row in measured)
        most = columns if slower else 0
    return most


def module() -> str:
    """Return the source of ``dsv4_plugin/engines/shared/aside_table.py``."""
    document = figures.load(ASIDE)
    about = document["machine"]
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
        "# call, k -> (rows, up to which length of a row the call is the engine's; 0: it is not)",
        "LONGEST: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {",
    ]
    for (call, k), measured in longest(document).items():
        lines.append(f'    ("{call}", {k}): (')
        lines += [f"        ({rows}, {most})," for rows, most in measured]
        lines.append("    ),")
    return "\n".join([*lines, "}"])


def with_auto(document: Any) -> list[tuple[Row, float]]:
    """Return each cell with the time of what ``auto`` takes there over that of the engine's."""
    found = []
    for row in document["results"]:
        engine, _, call = row["call"].partition(".")
        selection = Selection("fp32", "cuda", aside=engine)
        left = choice.faster(selection, call, row["k"], row["rows"], row["width"])
        found.append((row, 1.0 if left else row["plugin_us"] / row["engine_us"]))
    return found


def aside() -> str:
    """Return the Markdown between the ``aside`` markers of docs/kernels.md."""
    document = figures.load(ASIDE)
    about = document["machine"]
    table = longest(document)
    lines = [
        f"One {about['gpu']}, commit {about['commit'][:7]} (`benchmarks/results/{ASIDE}`).",
        "",
        "| call | k | rows | rows of up to … scores go to the engine |",
        "|---|---|---|---|",
    ]
    for (call, k), measured in table.items():
        for rows, most in measured:
            lines.append(f"| `{call}` | {k} | {rows} | {most or '–'} |")
    lines.append("")
    cells = with_auto(document)
    for call in dict.fromkeys(row["call"] for row, _ in cells):
        mine = [(row, ratio) for row, ratio in cells if row["call"] == call]
        plugin = [row["plugin_us"] / row["engine_us"] for row, _ in mine]
        auto = [ratio for _, ratio in mine]
        lines.append(
            f"- `{call}`, {len(mine)} cells, time over that of the engine's kernel: the plugin "
            f"alone {geometric_mean(plugin):.2f}, slower in {_slower(plugin)}, worst "
            f"{max(plugin):.2f}; `auto` {geometric_mean(auto):.2f}, slower in {_slower(auto)}, "
            f"worst {max(auto):.2f}."
        )
    return "\n".join(lines)


def _slower(ratios: list[float]) -> int:
    return sum(ratio > LEVEL for ratio in ratios)
