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
BEST = "best upstream kernel of any dtype"
FEW = 4  # peers that are all drawn
ACROSS = 3  # panels side by side: more cannot be read in a page
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
    others = _peers_drawn(document, decode)
    across = 2 if len(counts) == 4 else min(len(counts), ACROSS)
    lines = -(-len(counts) // across)
    figure, axes = pyplot.subplots(
        2 * lines, across, figsize=(10.8, 4.4 * lines + 1.0), squeeze=False,
        height_ratios=(2, 1) * lines,
    )  # fmt: skip
    panels = [
        (above, below)
        for line in range(lines)
        for above, below in zip(axes[2 * line], axes[2 * line + 1], strict=True)
    ]
    for unused in panels[len(counts) :]:
        for axis in unused:
            axis.remove()
    for at, count in enumerate(counts):
        above, below = panels[at]
        rows = [row for row in decode if row["rows"] == count]
        for name, line in _curves(rows, floor, others).items():
            above.plot(*zip(*line, strict=True), label=name, **_style(name, others))
        ratio_of, ratios = _ratios(rows, floor)
        for dtype, line in ratios.items():
            name = f"{PLUGIN} {dtype}"
            below.plot(*zip(*line, strict=True), **_style(name, others))
        below.axhline(1.0, color="0.6", linewidth=0.8)
        above.set_title(f"{count} row{'s' if count > 1 else ''}")
        _plain_log(above)
        over_columns(above, rows, "")
        above.tick_params(labelbottom=False)
        over_columns(below, rows, "columns")
        for axis in (above, below):
            axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
        if at % across == 0:
            above.set_ylabel("µs, warm")
            below.set_ylabel(f"plugin / {ratio_of}")
    _same_scale([above for above, _ in panels[: len(counts)]])
    _same_scale([below for _, below in panels[: len(counts)]], bottom=0.0)
    about = document.get("machine", {})
    figure.suptitle(f"{TITLE[what]}{f', k = {k}' if k else ''}: {about.get('gpu', 'no GPU')}, "
                    f"dsv4-plugin {about.get('plugin', '?')}")  # fmt: skip
    labels: dict[str, Any] = {}
    for above, _ in panels[: len(counts)]:
        labels |= dict(zip(*reversed(above.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=min(3, len(labels)))
    figure.tight_layout(rect=(0, 0.8 / figure.get_figheight(), 1, 1))
    outputs.save(figure, file)


def _peers_drawn(document: Row, decode: list[Row]) -> list[str]:
    """Return the peers that have a curve: few all, of many what the engines run and the best."""
    names = list(
        dict.fromkeys(
            f"{row['implementation']} {row['dtype']}"
            for row in decode
            if row["implementation"] != PLUGIN
        )
    )
    if len(names) <= FEW:
        return names
    choices = [document.get(f"{engine}_choice") for engine in ("vllm", "sglang")]
    return [name for name in names if name.split()[-2] in choices] + [BEST]


def _plain_log(axis: Any) -> None:
    """Make a logarithmic y axis with plain numbers at 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _same_scale(axes: list[Any], bottom: float | None = None) -> None:
    """Give the panels one y axis, which ends where the highest of them ends."""
    low = min(axis.get_ylim()[0] for axis in axes) if bottom is None else bottom
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)


def _curves(rows: list[Row], floor_name: str, others: list[str]) -> dict[str, Line]:
    """Return the curves of one panel by name: the plugin, the peers ``others``, the floor."""
    curves: dict[str, Line] = {}
    for row in rows:
        name = f"{row['implementation']} {row['dtype']}"
        if row["implementation"] == PLUGIN or name in others:
            curves.setdefault(name, []).append((row["columns"], row["warm_us"]))
    if BEST in others:
        best = best_peers(rows, "any")
        curves[BEST] = [(row["columns"], row["warm_us"]) for row in best.values()]
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
    """The plugin is thick, the floor dashed, peers are thin and on top."""
    if name in FLOOR.values():
        return {"color": "black", "linestyle": "--", "linewidth": 1.0}
    if name.startswith(f"{PLUGIN} "):
        # float32 is the wide line beneath: where the two coincide both are seen.
        colors = {"bfloat16": "tab:red", "float32": "orange", "float16": "tab:pink"}
        color = colors.get(name.split()[1], "tab:brown")
        wide = name.endswith("float32")
        return {"color": color, "linewidth": 4.0 if wide else 1.8, "marker": "o",
                "markersize": 6 if wide else 4, "zorder": 2.1 if wide else 2.3}  # fmt: skip
    palette = ("tab:blue", "tab:green", "tab:purple", "tab:cyan", "tab:olive", "tab:gray")
    at = others.index(name)
    mark = "^svDxP"[at // len(palette) % 6]
    return {"color": palette[at % len(palette)], "linewidth": 1.0, "marker": mark,
            "markersize": 4, "zorder": 2.5}  # fmt: skip
