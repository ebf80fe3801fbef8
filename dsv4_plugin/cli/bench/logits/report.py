"""The tables at the end of ``bench logits`` and ``bench chain``."""

from __future__ import annotations

from typing import Any

from dsv4_plugin.cli.bench.topk.report import grid
from dsv4_plugin.cli.checks.compare import PLUGIN, sound

__all__ = ["FLOOR", "lines"]

Row = dict[str, Any]

FLOOR = "the keys' bytes at the read rate"
TITLES = {
    "next_n": "Several queries per request",
    "varied": "Lengths from 1 to the columns",
    "prefill": "Prefill: causal windows of gathered keys",
}


def lines(results: list[Row]) -> list[str]:
    """Return the table of each suite that ran."""
    text = grid([row for row in results if row["suite"] == "decode"], FLOOR)
    for suite, title in TITLES.items():
        some = [row for row in results if row["suite"] == suite]
        if some:
            text += ["", f"{title}: us warm, TB/s of keys, TFLOP/s", *map(_line, some)]
    return text + _agreement([row for row in results if row.get("agreement")])


def _line(row: Row) -> str:
    cell = f"{row['dtype']} {row['batch']} x {row['columns']}"
    cell += f" next_n {row['next_n']}" if row["next_n"] > 1 else ""
    mark = "" if sound(row) else "  WRONG"
    return (f"{cell:36s} {row['implementation']:24s} {row['warm_us']:9.2f} us "
            f"{row['gb_s'] / 1e3:6.2f} TB/s {row['tflops']:7.1f} TFLOP/s{mark}")  # fmt: skip


def _agreement(plugin: list[Row]) -> list[str]:
    """Describe how much of the plugin's choice the peers' float32 chains share."""
    text: list[str] = []
    for dtype in dict.fromkeys(row["dtype"] for row in plugin):
        for name in dict.fromkeys(name for row in plugin for name in row["agreement"]):
            found = [
                row["agreement"][name]
                for row in plugin
                if row["dtype"] == dtype and name in row["agreement"]
            ]
            if found:
                mean = sum(one["mean"] for one in found) / len(found)
                worst = min(one["worst"] for one in found)
                text.append(f"{PLUGIN} {dtype} shares {mean:.3%} of its indices with {name}; "
                            f"worst row {worst:.3%}")  # fmt: skip
    return ["", *text] if text else []
