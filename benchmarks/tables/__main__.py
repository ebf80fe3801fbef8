"""``python -m benchmarks.tables NAME``: print the text between the markers of a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.tables import (
    aside,
    candidates,
    engines,
    engines_v41,
    expected,
    logits,
    readme,
    server,
    settings,
)
from benchmarks.tool import tool
from dsv4_plugin.cli.shared.run import Parser

TABLES = {
    "readme": readme.readme, "server": readme.server, "gain": readme.gain,
    "served": readme.served, "reads": readme.reads, "recall": readme.recall,
    "ratios": readme.ratios, "logits": logits.markdown,
    "sglang": engines.sglang, "tokenspeed": engines.tokenspeed, "engines": engines.engines,
    "modes": server.modes, "drills": server.drills, "sglang-server": server.sglang,
    "ab": server.ab, "sglang-drills": server.sglang_drills,
    "tokenspeed-server": server.tokenspeed,
    "expected": expected.expected, "v41-server": candidates.server,
    "v41-step": candidates.step, "v41-layers": candidates.layers, "v41-fp4": candidates.fp4,
    "sglang-v41": engines_v41.sglang, "tokenspeed-v41": engines_v41.tokenspeed,
    "sglang-publish": engines_v41.publish, "settings": settings.table,
    "aside": aside.aside, "aside-table": aside.module,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print one of the texts; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("name", choices=tuple(TABLES))
    return tool(parser, _print, argv)


def _print(arguments: argparse.Namespace) -> int:
    print(TABLES[arguments.name]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
