"""The README's picture: ``python -m benchmarks.tables.picture docs/gain.svg``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables.candidates import SERVER
from benchmarks.tables.readme import load
from benchmarks.tool import tool
from dsv4_plugin.cli.shared import outputs
from dsv4_plugin.cli.shared.run import Parser

__all__ = ["bars", "draw"]

COLOURS = {"off": "#9aa0a6", "on": "#1a73e8"}


def bars(document: Any) -> list[tuple[str, float, float]]:
    """Return, for each pair of bars, a label and the indexer's µs a layer without and with it."""
    found = []
    for profile in document["profiles"]:
        requests = profile.get("concurrency", 1)
        plural = "s" if requests > 1 else ""
        label = f"{requests} request{plural}\n{profile['context'] // 1000}K tokens"
        us = [profile["servers"][name]["chain_us_layer"] for name in ("off", "on")]
        found.append((requests, profile["context"], label, *us))
    return [(label, off, on) for _, _, label, off, on in sorted(found)]


def draw(file: Path) -> None:
    """Draw the time of the indexer's kernels in a whole server of DeepSeek-V4.1.

    Raises:
        UsageError: matplotlib is not installed.
    """
    outputs.require()
    from matplotlib import pyplot

    document = load(SERVER)
    rows, about = bars(document), document["machine"]
    with pyplot.rc_context({"svg.fonttype": "none", "font.size": 13}):
        figure, axis = pyplot.subplots(figsize=(8.3, 3.9), layout="constrained")
        for i, (_, *times) in enumerate(rows):
            for side, name, us in zip((-0.2, 0.2), COLOURS, times, strict=True):
                axis.bar(i + side, us, 0.38, color=COLOURS[name])
                axis.text(i + side, us, f"{us:.1f}", ha="center", va="bottom")
        axis.set_xticks(range(len(rows)), [label for label, *_ in rows])
        axis.margins(y=0.12)
        axis.set_ylabel("µs a layer")
        axis.set_title(
            f"Kernels of DeepSeek-V4.1's indexer\nvLLM {about['vllm']}, one {about['gpu']}, "
            "random weights",
            fontsize=13,
        )
        axis.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
        axis.legend(handles, [f"vLLM {about['vllm']}", "with the plugin"], frameon=False)
        outputs.save(figure, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.tables.picture", description=__doc__)
    parser.add_argument("file", type=outputs.plot, help="an .svg or .png to write")
    return tool(parser, _draw, argv)


def _draw(arguments: argparse.Namespace) -> int:
    draw(arguments.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
