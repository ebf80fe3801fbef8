"""The expected gain on the README's first screen, one line for each model.

:func:`expected` makes the text between the ``expected`` markers.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from benchmarks.tables.aside import ASIDE, NARROW, verdict, with_auto
from benchmarks.tables.candidates import SERVERS as V41_SERVERS
from benchmarks.tables.readme import SERVERS, load
from benchmarks.tables.server import SGLANG

__all__ = ["expected"]


def expected() -> str:
    """Return the Markdown between the ``expected`` markers of the README."""
    sglang, behind, *v41 = map(load, (SGLANG, ASIDE, *V41_SERVERS))
    v4 = {with_it: load(name) for name, with_it in SERVERS.items()}
    gpus = {document["machine"]["gpu"] for document in (*v4.values(), sglang, behind, *v41)}
    (v41_release,) = {document["machine"]["vllm"] for document in v41}
    layer = [r["ratio"] for of in v41 for r in of["summary"] if r["figure"] == "chain_us_layer"]
    releases = " and ".join(document["machine"]["vllm"] for document in v4.values())
    tokens = [row for of, document in v4.items() for row in _tokens(document, with_it=of)]
    return "\n".join([
        f"| model | with the plugin | measured on one {' or '.join(gpus)} |",
        "|---|---|---|",
        "| DeepSeek-V4.1 | most index layers score only candidate keys | vLLM "
        f"{v41_release}: {min(layer):.2f} to {max(layer):.2f} of the time in the indexer, "
        f"time per token {_sure(_tokens(*v41))} |",
        "| DeepSeek-V4 | bfloat16 scores, an exact top-k, slots in the same kernel | vLLM "
        f"{releases}: time per token {_sure(tokens)}; SGLang {sglang['machine']['sglang']}: "
        f"{_changes(sglang)} |",
        "| DeepSeek-V3.2, GLM | an exact float32 top-k, vLLM's where faster | "
        f"{_behind(behind)} |",
    ])  # fmt: skip


def _tokens(*documents: Any, with_it: str = "on") -> list[Any]:
    rows = [row for each in documents for row in each["summary"] if row["figure"] == "tpot_ms"]
    return [row for row in rows if with_it in row]


def _changes(document: Any) -> str:
    """Say how a token's time changed in every case."""
    return " and ".join(f"{100 * (row['ratio'] - 1):+.1f}" for row in _tokens(document)) + " %"


def _sure(rows: list[Any]) -> str:
    """Say how a token's time changed in the cases whose 95 % interval is on one side of 1."""
    sure = [row for row in rows if not row["interval95"][0] <= 1 <= row["interval95"][1]]
    changes = sorted(100 * (row["ratio"] - 1) for row in sure)
    return f"{changes[-1]:+.1f} to {changes[0]:+.1f} % ({len(sure)} of {len(rows)} cases)"


def _behind(document: Any) -> str:
    """Say what ``auto`` takes of vLLM's time in a captured graph, and where it is slower."""
    cells = [
        (row, ratio)
        for row, ratio in with_auto(document, graph=True)
        if row["call"] == "vllm.decode" and row["width"] > NARROW
    ]
    slower = [row for row, ratio in cells if ratio != 1 and verdict(row) == "engine"]
    short = all(row["columns"] <= 8192 for row in slower)
    return (
        f"decode: {geometric_mean([ratio for _, ratio in cells]):.2f} of vLLM 0.33's time; slower "
        f"in {len(slower)} of {len(cells)} shapes{' (short rows)' if short else ''}"
    )
