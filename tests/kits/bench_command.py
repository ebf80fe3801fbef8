"""``dsv4-plugin bench`` as a function; the fixture ``peers_file`` is the peers' file."""

from __future__ import annotations

from dsv4_plugin.cli.main import main


def bench(*arguments: object) -> int:
    """Run the command; returns its exit code."""
    return main(["bench", *map(str, arguments)])
