"""The plot of a results file: microseconds and ratios over the columns, one panel per row count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.checks.compare import PLUGIN, best_peers
from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["TITLE", "draw", "over_columns"]

Row = dict[str, Any]
Line = list[tuple[int, float]]

FLOOR = {  # what the floor is, by what was measured
    "topk": "one pass over bfloat16",
    "logits": "bytes of the keys",
    "chain": "bytes of the keys",
}
TITLE = {"topk": "Exact top-k", "logits": "Index logits", "chain": "Index logits and exact top-k"}


def over_columns(axis: Any, rows: list[Row], label: str) -> None:
    """Make the x axis of a panel show the rows' columns, in powers of two."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    ticks = sorted({row["columns"] for row in rows})
    axis.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label)


def draw(document: Row, file: Path, *, k: int | None = None) -> None:
    """Draw the decode suite of a results document into ``file`` (.png, .svg, .pdf).

    Above: microseconds, warm, with the floor. The floor of the top-k is one pass over the bfloat16
    scores; elsewhere it is the bytes of the keys. Below: the plugin over the best peer of the cell,
    or over the floor if the document has no peers.

    Raises:
        UsageError: matplotlib is not installed, or the document has no such cells.
    """
    outputs.require()
    from matplotlib import pyplot

    decode = [row for row in document["results"] if row.get("suite", "decode") == "decode"]
    own = [row for row in decode if row["implementation"] == PLUGIN]
    if not own:
        raise UsageError("the results have no decode cells of the plugin: nothing to draw")
    known = sorted({row.get("k", 0) for row in own})
    k = known[0] if k is None else k
    if k not in known:
        raise UsageError(f"--k must be one of those in the results ({known}), got {k}")
    decode = [row for row in decode if row.get("k", 0) == k and row["warm_us"] is not None]
    what = document.get("what", "topk")
    floor = FLOOR[what]
    counts = sorted({row["rows"] for row in decode if row["implementation"] == PLUGIN})
    others = [n for n in _curves(decode, floor) if not n.startswith((f"{PLUGIN} ", floor))]
    figure, axes = pyplot.subplots(
        2, len(counts), figsize=(3.6 * len(counts) + 2.4, 6.4), squeeze=False, sharex=True,
        sharey="row", height_ratios=(2, 1),
    )  # fmt: skip
    for above, below, count in zip(axes[0], axes[1], counts, strict=True):
        rows = [row for row in decode if row["rows"] == count]
        for name, line in _curves(rows, floor).items():
            above.plot(*zip(*line, strict=True), label=name, **_style(name, others))
        ratio_of, ratios = _ratios(rows, floor)
        for dtype, line in ratios.items():
            name = f"{PLUGIN} {dtype}"
            below.plot(*zip(*line, strict=True), **_style(name, others))
        below.axhline(1.0, color="0.6", linewidth=0.8)
        above.set_title(f"{count} row{'s' if count > 1 else ''}")
        above.set_yscale("log")
        over_columns(below, rows, "columns")
        for axis in (above, below):
            axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        if axis is axes[1][0]:
            above.set_ylabel("µs, warm")
            below.set_ylabel(f"plugin / {ratio_of}")
    about = document.get("machine", {})
    figure.suptitle(f"{TITLE[what]}{f', k = {k}' if k else ''}: {about.get('gpu', 'no GPU')}, "
                    f"dsv4-plugin {about.get('plugin', '?')}")  # fmt: skip
    # shared by the row of panels; set last, because it ends the automatic scaling
    axes[1][0].set_ylim(bottom=0)
    labels: dict[str, Any] = {}
    for axis in axes[0]:
        labels |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels.keys(), loc="center right", fontsize="small")
    figure.tight_layout(rect=(0, 0, 1 - 2.4 / figure.get_figwidth(), 1))
    outputs.save(figure, file)


def _curves(rows: list[Row], floor_name: str) -> dict[str, Line]:
    """Return the curves of one panel by name: the plugin, the peers, the floor."""
    curves: dict[str, Line] = {}
    for row in rows:
        curves.setdefault(f"{row['implementation']} {row['dtype']}", []).append(
            (row["columns"], row["warm_us"])
        )
    floor = {
        row["columns"]: row["floor_us"]
        for row in rows
        if row["dtype"] == "bfloat16" and row.get("floor_us")
    }
    if floor:
        curves[floor_name] = list(floor.items())
    return {name: sorted(line) for name, line in curves.items()}


def _ratios(rows: list[Row], floor_name: str) -> tuple[str, dict[str, Line]]:
    """Return what the plugin is divided by, and each dtype's ratios over the columns."""
    ratios: dict[str, Line] = {}
    peers = any(row["implementation"] != PLUGIN for row in rows)
    for row in rows:
        if row["implementation"] != PLUGIN:
            continue
        if peers:
            best = best_peers(rows, row["dtype"])
            other = best.get((row.get("k", 0), row["rows"], row["columns"]), {}).get("warm_us")
        else:
            other = row.get("floor_us")
        if other:
            line = ratios.setdefault(row["dtype"], [])
            line.append((row["columns"], row["warm_us"] / other))
    name = "best peer" if peers else floor_name
    return name, {dtype: sorted(line) for dtype, line in ratios.items()}


def _style(name: str, others: list[str]) -> Row:
    """The plugin is thick, the floor dashed, peers thin; a name looks the same in all panels."""
    if name in FLOOR.values():
        return {"color": "black", "linestyle": "--", "linewidth": 1.0}
    if name.startswith(f"{PLUGIN} "):
        colors = {"bfloat16": "tab:red", "float32": "tab:orange", "float16": "tab:pink"}
        color = colors.get(name.split()[1], "tab:brown")
        return {"color": color, "linewidth": 2.4, "marker": "o", "markersize": 4}
    palette = ("tab:blue", "tab:green", "tab:purple", "tab:cyan", "tab:olive", "tab:gray")
    at = others.index(name)
    mark = "^svDxP"[at // len(palette) % 6]
    return {"color": palette[at % len(palette)], "linewidth": 1.0, "marker": mark,
            "markersize": 3, "alpha": 0.8}  # fmt: skip
