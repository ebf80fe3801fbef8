"""The plot of ``bench candidates``: a panel per chain, a pair of curves per row count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.plots.cells import over_columns
from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["draw"]

Row = dict[str, Any]

CHAINS = ("consumer", "source", "step")


def draw(document: Row, file: Path) -> None:
    """Draw the chains of decode into ``file``: a panel per chain, a pair of curves per row count.

    Raises:
        UsageError: matplotlib is not installed, or the document has no decode cells.
    """
    outputs.require()
    from matplotlib import pyplot

    rows = [row for row in document["results"] if row["suite"] == "decode"]
    if not rows:
        raise UsageError("the results have no decode cells: nothing to draw")
    figure, axes = pyplot.subplots(1, len(CHAINS), figsize=(13.0, 4.6), squeeze=False)
    for axis, op in zip(axes[0], CHAINS, strict=True):
        for index, count in enumerate(sorted({row["rows"] for row in rows})):
            for name, dtype, style in (
                ("dsv4", "bfloat16", "-o"), ("full width", "float32", "--s"),
            ):  # fmt: skip
                line = sorted(
                    (row["columns"], row["us"])
                    for row in rows
                    if (row["op"], row["implementation"], row["dtype"]) == (op, name, dtype)
                    and row["rows"] == count
                )
                if line:
                    axis.plot(*zip(*line, strict=True), style, color=f"C{index}", markersize=3.5,
                              label=f"{name} {dtype}, {_rows(count)}")  # fmt: skip
        axis.set_title("step: eight index layers" if op == "step" else f"{op} layer")
        axis.set_yscale("log")
        over_columns(axis, rows, "keys a row")
        axis.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes[0][0].set_ylabel("µs")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize="small")
    about = document.get("machine", {})
    figure.suptitle(
        f"DeepSeek-V4.1's indexer, buffers of {document['width'] // 1024}K columns: "
        f"{about.get('gpu', 'no GPU')}, dsv4-plugin {about.get('plugin', '?')}"
    )
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    outputs.save(figure, file)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"
