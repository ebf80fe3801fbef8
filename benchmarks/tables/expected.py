"""What the README's first screen says of the expected gain, a line a model.

:func:`expected` makes what stands between the ``expected`` markers.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from benchmarks.tables.candidates import SERVERS as V41_SERVERS
from benchmarks.tables.readme import SERVER, TOPK, load
from benchmarks.tables.server import SGLANG

__all__ = ["expected"]


def expected() -> str:
    """Return the Markdown between the ``expected`` markers of the README."""
    server, sglang, topk, *v41 = map(load, (SERVER, SGLANG, TOPK, *V41_SERVERS))
    gpus = {document["machine"]["gpu"] for document in (server, sglang, topk, *v41)}
    (v41_release,) = {document["machine"]["vllm"] for document in v41}
    layer = [r["ratio"] for of in v41 for r in of["summary"] if r["figure"] == "chain_us_layer"]
    alone = _float32(topk, 2048)
    return "\n".join([
        f"| model | with the plugin | measured on one {' or '.join(gpus)} |",
        "|---|---|---|",
        "| DeepSeek-V4.1 | most index layers score candidate keys and not all | vLLM "
        f"{v41_release}: the indexer's kernels take {min(layer):.2f} to "
        f"{max(layer):.2f} of their time, {_token(*v41)} |",
        "| DeepSeek-V4 | bfloat16 scores, an exact top-k, slots in the same kernel | vLLM "
        f"{server['machine']['vllm']}: {_token(server)}; SGLang {sglang['machine']['sglang']}: "
        f"{_changes(sglang)} |",
        "| DeepSeek-V3.2, GLM | an exact float32 top-k | the top-k alone takes "
        f"{geometric_mean(alone):.2f} of the time of vLLM 0.33's; it is slower in "
        f"{sum(r > 1 for r in alone)} of {len(alone)} shapes |",
    ])  # fmt: skip


def _tokens(*documents: Any) -> list[Any]:
    return [row for each in documents for row in each["summary"] if row["figure"] == "tpot_ms"]


def _changes(document: Any) -> str:
    """Say how a token's time changed in every case."""
    return " and ".join(f"{100 * (row['ratio'] - 1):+.1f}" for row in _tokens(document)) + " %"


def _token(*documents: Any) -> str:
    """Say how a token's time changed in the cases whose 95 % interval is on one side of 1."""
    rows = _tokens(*documents)
    sure = [row for row in rows if not row["interval95"][0] <= 1 <= row["interval95"][1]]
    changes = sorted(100 * (row["ratio"] - 1) for row in sure)
    return f"a token {changes[-1]:+.1f} to {changes[0]:+.1f} % ({len(sure)} of {len(rows)} cases)"


def _float32(topk: Any, k: int) -> list[float]:
    """Return the plugin's time over vLLM's choice, both on float32 scores, a number a cell."""
    us = {
        (row["rows"], row["columns"], row["implementation"]): row["warm_us"]
        for row in topk["results"]
        if row.get("suite", "decode") == "decode"
        and "recorded" not in row
        and (row["dtype"], row["k"]) == ("float32", k)
    }
    upstream = topk.get("vllm_choice", "vllm33")
    return [time / us[r, n, upstream] for (r, n, name), time in us.items() if name == "dsv4"]
