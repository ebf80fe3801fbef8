"""The table at the end of ``bench candidates``."""

from __future__ import annotations

from typing import Any

__all__ = ["table"]

Row = dict[str, Any]


def table(results: list[Row]) -> list[str]:
    """Return a block of lines for each suite: a line per op, a column per cell."""
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in results):
        some = [row for row in results if row["suite"] == suite]
        counts = sorted({(row.get("next_n", 1), row["rows"]) for row in some})
        for next_n, rows in counts:
            mine = [r for r in some if (r.get("next_n", 1), r["rows"]) == (next_n, rows)]
            columns = sorted({row["columns"] for row in mine})
            heads = "".join(f"{f'{n // 1024}K':>10s}" for n in columns)
            of = f", {next_n} a request" if next_n > 1 else ""
            title = f"{suite}, {rows} row{'s' if rows > 1 else ''}{of}, us"
            lines += ["", f"{title:50s}{heads}"]
            found: dict[tuple[str, str, str], dict[int, Row]] = {}
            for row in mine:
                key = row["implementation"], row["dtype"], row["op"]
                found.setdefault(key, {})[row["columns"]] = row
            for key, cells in found.items():
                shown = "".join(
                    f"{cells[n]['us']:9.2f}{' ' if cells[n]['exact'] else '!'}"
                    if n in cells else f"{'-':>10s}"
                    for n in columns
                )  # fmt: skip
                lines.append(f"{' '.join(key):50s}{shown}")
    return lines
