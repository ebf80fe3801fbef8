"""The plot of a recall file: overlap over the columns, a panel per k, a line per dtype and kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["draw"]

Row = dict[str, Any]
_LINES = {"mean": "-", "worst": ":"}


def draw(document: Row, file: Path) -> None:
    """Draw the mean and the worst row into ``file`` (.png, .svg, .pdf).

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to draw.
    """
    outputs.require()
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    results = [row for row in document["results"] if row["rows"]]
    if not results:
        raise UsageError("the results have no row longer than k: nothing to draw")
    ks = sorted({row["k"] for row in results})
    names = list(dict.fromkeys((row["scores"], row["dtype"]) for row in results))
    figure, axes = pyplot.subplots(1, len(ks), figsize=(10.8, 5.2), squeeze=False, sharey=True)
    for axis, k in zip(axes[0], ks, strict=True):
        for number, (scores, dtype) in enumerate(names):
            cells = sorted(
                (row["columns"], row)
                for row in results
                if (row["k"], row["scores"], row["dtype"]) == (k, scores, dtype)
            )
            for value, style in _LINES.items():
                label = f"{scores}, {dtype}: {'mean' if value == 'mean' else 'worst row'}"
                points = [100 * row[value] for _, row in cells]
                axis.plot([c for c, _ in cells], points, style, color=f"C{number % 10}",
                          marker="o", markersize=3, linewidth=1.2, label=label)  # fmt: skip
        axis.axhline(100 * document["paper"]["recall"], color="0.4", linewidth=0.8)
        axis.set_title(f"k = {k}")
        axis.set_xscale("log", base=2)
        ticks = sorted({row["columns"] for row in results})
        axis.set_xticks(ticks, [f"{c // 1024}K" if c >= 1024 else str(c) for c in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("columns")
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes[0][0].set_ylabel("% of the float32 selection")
    figure.suptitle("Overlap with the float32 selection; grey: the paper's 99.7 %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", fontsize="small", ncols=3)
    figure.tight_layout(rect=(0, 1.2 / figure.get_figheight(), 1, 1))
    outputs.save(figure, file)
