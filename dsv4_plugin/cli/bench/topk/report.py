"""The tables at the end of ``bench topk``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4_plugin.cli.checks.compare import PLUGIN, best_peers, sound

__all__ = ["grid", "lines"]

Row = dict[str, Any]


def lines(results: list[Row], roof: Row) -> list[str]:
    """Return the table of each suite that ran."""
    text: list[str] = []
    suites = list(dict.fromkeys(row["suite"] for row in results))
    if "decode" in suites:
        text += grid([row for row in results if row["suite"] == "decode"], "one-pass floor")
    if "narrow" in suites:
        text += _narrow(_own(results, "narrow"))
    if "adversarial" in suites:
        text += _adversarial(_own(results, "adversarial"))
    if "prefill" in suites:
        text += _prefill([row for row in results if row["suite"] == "prefill"], roof)
    if "served" in suites:
        text += _served([row for row in results if row["suite"] == "served"])
    if "paged" in suites:
        text += _paged([row for row in results if row["suite"] == "paged"])
    return text


def _own(results: list[Row], suite: str) -> list[Row]:
    return [row for row in results if row["suite"] == suite and row["implementation"] == PLUGIN]


def _distinct(rows: list[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def grid(decode: list[Row], floor: str) -> list[str]:
    """Return one rows x columns table per dtype and k: the plugin beside the best peer."""
    plugin = [row for row in decode if row["implementation"] == PLUGIN]
    text = []
    for dtype in _distinct(plugin, "dtype"):
        best = best_peers(decode, dtype)
        for k in dict.fromkeys(row.get("k", 0) for row in plugin):
            some = {
                (row["rows"], row["columns"]): row
                for row in plugin
                if row["dtype"] == dtype and row.get("k", 0) == k
            }
            columns = list(dict.fromkeys(c for _, c in some))
            text += [
                "",
                f"{dtype}{f', k {k}' if k else ''}: us warm | / best peer | x {floor}; "
                f"! {'not exact' if 'exact' in plugin[0] else 'wrong'}",
                f"{'rows':>5}" + "".join(f"{c:>22}" for c in columns),
            ]
            for r in dict.fromkeys(r for r, _ in some):
                line = f"{r:5d}"
                for c in columns:
                    row, peer = some.get((r, c)), best.get((k, r, c))
                    shown = ""
                    if row is not None:
                        shown = f"{row['warm_us']:.2f}{'' if sound(row) else '!'}"
                        if peer is not None:
                            shown += f" | {row['warm_us'] / peer['warm_us']:.2f}"
                        shown += f" | {row['ratio']:.1f}"
                    line += f"{shown:>22}"
                text.append(line)
    return text


def _narrow(plugin: list[Row]) -> list[str]:
    text = ["", "8,192 columns: us warm at natural width -> in a 256,000-wide buffer (ratio)"]
    natural = {
        (row["dtype"], row["k"], row["rows"]): row["warm_us"]
        for row in plugin
        if row["width"] == row["columns"]
    }
    for row in plugin:
        key = row["dtype"], row["k"], row["rows"]
        if row["width"] > row["columns"] and key in natural:
            us = row["warm_us"]
            text.append(f"{key[0]:9s} k {key[1]:4d} rows {key[2]:4d}  "
                        f"{natural[key]:7.2f} -> {us:7.2f}  ({us / natural[key]:.3f})")  # fmt: skip
    return text


def _adversarial(plugin: list[Row]) -> list[str]:
    kinds = _distinct(plugin, "kind")
    text = ["", "Adversarial scores: us warm for N(0,1), then the ratio to it",
            f"{'':34s}" + "".join(f"{kind:>13}" for kind in kinds)]  # fmt: skip
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in plugin:
        key = row["dtype"], row["k"], row["rows"], row["columns"]
        cells.setdefault(key, {})[row["kind"]] = row["warm_us"]
    for (dtype, k, r, c), us in cells.items():
        if "normal" not in us:
            continue
        line = f"{f'{dtype} k {k} {r} x {c}':34s}"
        for kind in kinds:
            shown = ""
            if kind in us:
                shown = f"{us[kind] / us['normal']:.2f}" if kind != "normal" else f"{us[kind]:.2f}"
            line += f"{shown:>13}"
        text.append(line)
    return text


def _served(rows: list[Row]) -> list[str]:
    title = "As in a server, code and lengths from memory: us (warm)"
    return _cells(title, rows, lambda row: f"{row['served_us']:.2f} ({row['warm_us']:.2f})")


def _paged(rows: list[Row]) -> list[str]:
    return _cells("Answers in pool slots: us warm", rows, lambda row: f"{row['warm_us']:.2f}")


def _cells(title: str, rows: list[Row], us: Callable[[Row], str]) -> list[str]:
    """Return one line per cell with every implementation in it."""
    text = ["", title]
    for cell in dict.fromkeys((row["k"], row["rows"], row["columns"]) for row in rows):
        shown = [
            f"{row['implementation']} {row['dtype']} {us(row)}{'' if row['exact'] else '!'}"
            for row in rows
            if (row["k"], row["rows"], row["columns"]) == cell
        ]
        text.append(f"k {cell[0]:5d} {cell[1]:4d} x {cell[2]:6d}  {'   '.join(shown)}")
    return text


def _prefill(rows: list[Row], roof: Row) -> list[str]:
    read = roof["read_gb_s"]
    text = ["", f"Prefill: us warm, GB/s, share of the measured read roof ({read:.0f} GB/s; "
                f"copy {roof['copy_gb_s']:.0f} GB/s)"]  # fmt: skip
    for row in rows:
        cell = f"{row['dtype']} k {row['k']} {row['rows']} x {row['columns']} {row['windows']}"
        mark = "" if row["exact"] else "  NOT EXACT"
        text.append(f"{cell:40s} {row['implementation']:28s} {row['warm_us']:9.1f} us "
                    f"{row['gb_s']:7.0f} GB/s {row['gb_s'] / read:6.2f}{mark}")  # fmt: skip
    return text
