"""The figures of docs/numerics.md, from a results file of ``dsv4-plugin recall``."""

from __future__ import annotations

from typing import Any

__all__ = ["table"]


def table(document: dict[str, Any]) -> str:
    """Return the Markdown of the figures (docs/numerics.md) from a results document.

    Raises:
        ValueError: the document has a swapped position that rounding does not explain.
    """
    results = [row for row in document["results"] if row["rows"]]
    beyond = sum(row["beyond_ties"] for row in results)
    if beyond:
        raise ValueError(f"{beyond} swapped positions do not tie with the k-th after rounding")
    columns = sorted({row["columns"] for row in results})
    lines = [
        "| scores | k | dtype | " + " | ".join(f"{c // 1024}K" for c in columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    cells = {(r["scores"], r["k"], r["dtype"], r["columns"]): r for r in results}
    for scores, k, dtype in dict.fromkeys(key[:3] for key in cells):
        shown = []
        for c in columns:
            row = cells.get((scores, k, dtype, c))
            percent = [f"{100 * row[n]:.2f}" for n in ("mean", "p1", "worst")] if row else []
            shown.append(" / ".join(percent))
        lines.append(f"| {scores} | {k} | {dtype} | " + " | ".join(shown) + " |")
    worst = {
        d: max(r["gap_worst"] for r in results if r["dtype"] == d)
        for d in dict.fromkeys(r["dtype"] for r in results)
    }
    bf16 = [row for row in results if row["dtype"] == "bfloat16"]
    lines += [
        "",
        "In every cell all positions that differ tie with the k-th after rounding. The lowest "
        "selected score lies at most "
        + ", ".join(f"{100 * worst[d]:.2f} % ({d})" for d in worst)
        + " below the k-th. bfloat16 loses at most "
        f"{100 * max(r['mass_lost_mean'] for r in bf16):.4f} % of the selected scores' sum in the "
        f"mean of a cell, {100 * max(r['mass_lost_worst'] for r in bf16):.4f} % in a row.",
        "",
        f"The paper has {100 * document['paper']['recall']:.1f} % with bfloat16 "
        f"({document['paper']['source']}).",
    ]
    return "\n".join(lines)
