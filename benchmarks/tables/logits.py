"""The figures of the logits and of the chain, made from the committed results.

``python -m benchmarks.tables logits`` prints the text between the ``logits-figures`` markers of a
page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.tables import readme as figures
from dsv4_plugin.cli.checks.compare import PLUGIN, best_peers, chain_name, geomean, sound

__all__ = ["markdown"]

LOGITS, CHAIN = "h200_logits.json", "h200_chain.json"


def markdown() -> str:
    """Return the Markdown between the ``logits-figures`` markers: the logits, then the chain."""
    scores, chain = figures.load(LOGITS), figures.load(CHAIN)
    return "\n".join([*_logits_lines(scores), "", *_chain_lines(chain)])


def _logits_lines(document: Any) -> list[str]:
    rows = [row for row in document["results"] if row["suite"] == "decode"]
    half = [row for row in rows if row["dtype"] == "bfloat16"]
    plugin = {_cell(row): row for row in half if row["implementation"] == PLUGIN}
    best = best_peers(half, "bfloat16")
    peers = dict.fromkeys(row["implementation"] for row in half if row["implementation"] != PLUGIN)
    lines = [
        f"Index logits on one {document['machine']['gpu']} (CUDA graphs, warm, bfloat16, µs; "
        f"`benchmarks/results/{LOGITS}`): the plugin / {' or '.join(peers)} / the keys' bytes at "
        "the read rate:",
        "",
        *_table(plugin, lambda cell: [
            plugin[cell]["warm_us"], best.get((0, *cell), {}).get("warm_us"),
            plugin[cell]["floor_us"],
        ]),
    ]  # fmt: skip
    every = [row for row in document["results"] if row["implementation"] == PLUGIN]
    right = all(row["right"] for row in every)
    what = "the fastest peer of each cell"
    text = _against(_ratios(plugin, best, "warm_us"), what)
    cold = _ratios(plugin, best_peers(half, "bfloat16", "cold_us"), "cold_us")
    if cold:
        text += _against(cold, what, "With keys that no cache holds, against")
    return [
        *lines, "",
        f"{text}The plugin is {'' if right else 'NOT '}within the stated bound in every cell.",
        *_other_shapes(document),
    ]  # fmt: skip


def _ratios(
    plugin: dict[tuple[int, int], Any], best: dict[tuple[int, int, int], Any], field: str
) -> list[float]:
    return [
        row[field] / best[(0, *cell)][field]
        for cell, row in plugin.items()
        if row[field] is not None and (0, *cell) in best
    ]


def _other_shapes(document: Any) -> list[str]:
    """Return a table of prefill and of several queries a request: one row for each cell."""
    rows = [
        row for row in document["results"]
        if row["dtype"] == "bfloat16" and (row["next_n"] > 1 or row["suite"] == "prefill")
    ]  # fmt: skip
    if not rows:
        return []
    cells: dict[str, dict[bool, float]] = {}
    for row in rows:
        prefill = row["suite"] == "prefill"
        name = f"{row['batch']:,} x {row['columns']:,} keys"
        name += ", prefill" if prefill else f", {row['next_n']} queries a request"
        of = cells.setdefault(name, {})
        of_plugin = row["implementation"] == PLUGIN
        if sound(row) and row["warm_us"] is not None:
            of[of_plugin] = min(row["warm_us"], of.get(of_plugin, math.inf))
    lines = ["", "| bfloat16, warm, µs | the plugin | the fastest of them |", "|---|---|---|"]
    for name, of in cells.items():
        lines.append(
            f"| {name} | " + " | ".join(_us(of.get(side)) for side in (True, False)) + " |"
        )
    return lines


def _us(us: float | None) -> str:
    return "–" if us is None else f"{us:.1f}"


def _chain_lines(document: Any) -> list[str]:
    rows = document["results"]
    choices = {
        "vLLM 0.33's": document["vllm_choice"],
        "SGLang 0.5.23's": document["sglang_choice"],
    }
    engines: dict[str, dict[tuple[int, int, int], float]] = {name: {} for name in choices}
    for name, topk in choices.items():
        for row in rows:
            if row["implementation"].endswith(chain_name("", topk)) and sound(row):
                key = (row["k"], *_cell(row))
                engines[name][key] = min(row["warm_us"], engines[name].get(key, math.inf))
    half = [row for row in rows if row["dtype"] == "bfloat16" and row["implementation"] == PLUGIN]
    k = min(row["k"] for row in half)
    plugin = {_cell(row): row for row in half if row["k"] == k}
    lines = [
        f"From the keys to indices in one graph on one {document['machine']['gpu']} (warm, µs; "
        f"`benchmarks/results/{CHAIN}`), k = {k}: the plugin in bfloat16 / {' / '.join(choices)} "
        "in float32:",
        "",
        *_table(plugin, lambda cell: [
            plugin[cell]["warm_us"], *(engines[name].get((k, *cell)) for name in choices)
        ]),
        "",
    ]  # fmt: skip
    for name in choices:
        ratios = [
            row["warm_us"] / engines[name][(row["k"], *_cell(row))]
            for row in half
            if (row["k"], *_cell(row)) in engines[name]
        ]
        if ratios:
            lines.append(_against(ratios, f"{name} chain").strip())
    exact = all(sound(row) for row in rows if row["implementation"] == PLUGIN)
    lines.append(f"The plugin is {'exact in every cell' if exact else 'NOT exact in some cell'}.")
    return lines


def _cell(row: Any) -> tuple[int, int]:
    return row["batch"], row["columns"]


def _table(
    plugin: dict[tuple[int, int], Any], found_in: Callable[[tuple[int, int]], list[float | None]]
) -> list[str]:
    """Return a table requests x keys; a missing figure is a dash."""
    columns = sorted({c for _, c in plugin})
    lines = [
        "| requests | " + " | ".join(f"{c // 1024}K" for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for batch in sorted({b for b, _ in plugin}):
        cells = []
        for c in columns:
            found = found_in((batch, c)) if (batch, c) in plugin else []
            cells.append(" / ".join(map(_us, found)))
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return lines


def _against(ratios: list[float], what: str, begin: str = "Against") -> str:
    if not ratios:
        return ""
    slower = sum(r > 1 for r in ratios)
    mean = geomean(ratios)
    return (
        f"{begin} {what} the geometric mean of the ratio over {len(ratios)} cells is "
        f"{mean:.2f}; the plugin is slower in {slower} (worst {max(ratios):.2f}). "
    )
