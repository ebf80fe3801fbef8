"""The plot of a run: the figures of every pair, and the ratios with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["check", "draw"]

Row = dict[str, Any]
SHOWN = ("TTFT mean", "TPOT mean", "ITL p99", "output throughput")
COLORS = {
    "better": "tab:green", "worse": "tab:red", "undecided": "0.4", "higher": "0.4", "lower": "0.4",
}  # fmt: skip


def check(file: Path, *coming: Path) -> None:
    """Check that a plot can be drawn into ``file``; the folders ``coming`` will exist by then.

    Raises:
        UsageError: the file's form is unknown, or its folder or matplotlib is missing.
    """
    try:
        outputs.check_plot(file)
        if file.absolute().parent not in coming:
            outputs.file(str(file))
    except UsageError as error:
        raise UsageError(f"--plot {error}") from error


def draw(document: Row, file: Path) -> None:
    """Draw a complete run into ``file`` (.png, .svg, .pdf): a row of panels for each workload.

    Left: B/A of every metric with its interval. Right: the pairs; a line joins A and its B.

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to draw.
    """
    outputs.require()
    from matplotlib import pyplot

    rows = document.get("summary") or []
    if not rows:
        raise UsageError("the run has no summary (it did not complete): nothing to draw")
    loads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axes = pyplot.subplots(
        len(loads), 1 + len(SHOWN), figsize=(6 + 2.4 * len(SHOWN), 0.8 + 3.6 * len(loads)),
        squeeze=False, width_ratios=(3, *[1] * len(SHOWN)),
    )  # fmt: skip
    for panels, load in zip(axes, loads, strict=True):
        mine = [row for row in rows if row["workload"] == load]
        _ratios(panels[0], mine, load)
        for axis, name in zip(panels[1:], SHOWN, strict=True):
            _pairs(axis, next((row for row in mine if row["metric"] == name), None), name)
    about = document["machine"]
    figure.suptitle(
        f"A: {_what(document, 'A')}   B: {_what(document, 'B')}   "
        f"({about['gpu'] or 'no GPU'}, {document['engine']}, dsv4-plugin {about['plugin']})",
        fontsize="medium",
    )
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _what(document: Row, side: str) -> str:
    return " ".join(f"{n}={v}" for n, v in document["sides"][side]["asked_env"].items()) or "as is"


def _ratios(axis: Any, rows: list[Row], load: str) -> None:
    for y, row in enumerate(reversed(rows)):
        color = COLORS[row["verdict"]]
        axis.plot((row["low"], row["high"]), (y, y), color=color, linewidth=1.6)
        axis.plot(row["ratio"], y, "o", color=color, markersize=4)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["metric"] for row in reversed(rows)], fontsize="small")
    axis.set_xlabel("B / A, 95 % interval (green: B is better, red: worse)", fontsize="small")
    axis.set_title(load, fontsize="medium")
    axis.grid(True, axis="x", linewidth=0.4, alpha=0.5)


def _pairs(axis: Any, row: Row | None, name: str) -> None:
    axis.set_title(name, fontsize="medium")
    axis.set_xticks((0, 1), ("A", "B"))
    axis.set_xlim(-0.4, 1.4)
    if row is None:
        axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color="0.5")
        return
    for a, b in zip(row["a"], row["b"], strict=True):
        axis.plot((0, 1), (a, b), "o-", color="0.5", linewidth=0.8, markersize=4)
    axis.plot((0, 1), (row["a_mean"], row["b_mean"]), color=COLORS[row["verdict"]], linewidth=2.4)
    axis.set_ylabel(row["unit"])
    axis.grid(True, axis="y", linewidth=0.4, alpha=0.5)
