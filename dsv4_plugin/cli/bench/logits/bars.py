"""The bars that the logits and the chain are held to, all between figures of one run."""

from __future__ import annotations

from typing import Any

from dsv4_plugin.cli.bench.topk.bars import Bar, best_peers, sound
from dsv4_plugin.cli.bench.topk.peers import OURS

__all__ = ["chain_bars", "logits_bars"]

Row = dict[str, Any]

PEER_RATIO = 1.03  # of every decode cell, over the best peer of the same dtype
LATENCY_US = {(1, 8192): 2.9}  # bfloat16, warm
ROOF_SHARE = 0.85  # of the read rate, in these cells
ROOF_CELLS = [(batch, columns) for batch in (8, 32) for columns in (65_536, 131_072, 256_000)]

# How many times faster our bfloat16 chain is: (requests, keys) → (vLLM's chain, SGLang's).
SPEEDUP = {
    (1, 65_536): (1.8, 1.4),
    (1, 256_000): (1.8, 1.3),
    (8, 65_536): (1.35, 1.15),
    (32, 65_536): (1.2, 1.1),
}
H200 = "the bar is for an H200"


def chain_name(logits: str, topk: str) -> str:
    """Return the name of a peers' chain."""
    return f"{logits} + {topk}"


def logits_bars(results: list[Row]) -> list[Bar]:
    """Return every bar of the logits that the results have figures for."""
    bars = []
    decode = [row for row in results if row["suite"] == "decode"]
    for dtype in ("bfloat16", "float32"):
        ours = _ours(decode, dtype)
        for field in ("warm_us", "cold_us"):
            best = best_peers([row for row in decode if row["dtype"] == dtype], dtype, field)
            ratios = {
                (batch, columns): row[field] / best[0, batch, columns][field]
                for (batch, columns), row in ours.items()
                if (0, batch, columns) in best and row.get(field)
            }
            if ratios:
                cell, worst = max(ratios.items(), key=lambda item: item[1])
                heat = field.removesuffix("_us")
                note = f"{cell[0]} x {cell[1]}, {len(ratios)} cells"
                name = f"{dtype} {heat} / best peer of {dtype}, worst cell"
                bars.append(Bar(name, worst, PEER_RATIO, note))
        shares = {
            cell: ours[cell]["floor_us"] / ours[cell]["warm_us"]
            for cell in ROOF_CELLS
            if cell in ours
        }
        if shares:
            cell, least = min(shares.items(), key=lambda item: item[1])
            name = f"{dtype} warm / keys at the read rate, 8-32 x 64K-250K, worst cell"
            note = f"{cell[0]} x {cell[1]}: {least:.1%} of the rate"
            bars.append(Bar(name, 1 / least, 1 / ROOF_SHARE, note))
    half = _ours(decode, "bfloat16")
    bars += [
        Bar(f"bfloat16 warm, {batch} x {columns}, us", half[batch, columns]["warm_us"], most, H200)
        for (batch, columns), most in LATENCY_US.items()
        if (batch, columns) in half
    ]
    mine = [row for row in results if row["implementation"] == OURS]
    wrong = [row for row in mine if not sound(row)]
    note = f"of {len(mine)}" + (f"; first: {wrong[0].get('why')}" if wrong else "")
    return [*bars, Bar("cells in which ours is out of tolerance", float(len(wrong)), 0.0, note)]


def chain_bars(results: list[Row], vllm: str, sglang: str) -> list[Bar]:
    """Return every bar of the chain that the results have figures for.

    ``vllm`` and ``sglang`` are the top-k peers that end the engines' chains; of several logits
    kernels the one with the fastest chain counts.
    """
    bars = []
    mine = [row for row in results if row["implementation"] == OURS]
    for row in mine:
        cell = row["batch"], row["columns"]
        if row["dtype"] != "bfloat16" or cell not in SPEEDUP:
            continue
        for engine, topk, least in zip(
            ("vLLM", "SGLang"), (vllm, sglang), SPEEDUP[cell], strict=True
        ):
            theirs = [
                other["warm_us"]
                for other in results
                if other["implementation"].endswith(chain_name("", topk))
                and sound(other)
                and (other["k"], other["batch"], other["columns"]) == (row["k"], *cell)
            ]
            if theirs:
                ratio = row["warm_us"] / min(theirs)
                note = f"{1 / ratio:.2f} times as fast, bar {least:g}; {H200}"
                bars.append(Bar(f"k {row['k']}, {cell[0]} x {cell[1]}: bfloat16 / {engine}'s chain",
                                ratio, 1 / least, note))  # fmt: skip
    wrong = [row for row in mine if not (sound(row) and row.get("lowest_index", True))]
    note = f"of {len(mine)}" + (f"; first: {wrong[0].get('why')}" if wrong else "")
    return [*bars, Bar("cells in which ours is not exact", float(len(wrong)), 0.0, note)]


def _ours(rows: list[Row], dtype: str) -> dict[tuple[int, int], Row]:
    return {
        (row["batch"], row["columns"]): row
        for row in rows
        if row["implementation"] == OURS and row["dtype"] == dtype
    }
