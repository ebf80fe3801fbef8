"""The plot of ``bench read``: a group per case, a bar per implementation, a line for the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["draw"]

COLORS = {"cuda": "tab:red", "triton": "tab:orange", "torch": "tab:gray"}


def draw(document: dict[str, Any], file: Path) -> None:
    """Draw microseconds and the floor of each case into ``file`` (.png, .svg, .pdf).

    Raises:
        UsageError: matplotlib is not installed, or there is nothing to draw.
    """
    outputs.require()
    from matplotlib import pyplot

    rows = [row for row in document["results"] if "us" in row]
    if not rows:
        raise UsageError("the results have no times: nothing to draw")
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    figure, axis = pyplot.subplots(figsize=(8, 1.4 + 0.28 * (len(rows) + len(cases))))
    at, middles, seen = 0.0, [], set()
    for some in cases.values():
        begin = at
        for row in some:
            name = row["implementation"]
            label = name if name not in seen else None
            seen.add(name)
            axis.barh(at, row["us"], color=COLORS.get(name, "tab:blue"), label=label)
            axis.text(row["us"], at, f" {row['us']:.2f}", va="center", fontsize="x-small")
            at += 1
        floor = some[0]["floor_us"]
        label = "bytes at the copy rate" if begin == 0 else None
        axis.plot([floor, floor], [begin - 0.5, at - 0.5], "k--", linewidth=1.0, label=label)
        middles.append((begin + at - 1) / 2)
        at += 0.8
    axis.set_yticks(middles, list(cases))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.set_xlabel("µs")
    about = document.get("machine", {})
    figure.suptitle(f"Reads of the indexer cache: {about.get('gpu', 'no GPU')}, "
                    f"dsv4-plugin {about.get('plugin', '?')}", fontsize="medium")  # fmt: skip
    axis.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    outputs.save(figure, file)
