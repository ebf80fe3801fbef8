"""What the README's first screen says of the expected gain, a line a model.

:func:`expected` makes what stands between the ``expected`` markers.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from benchmarks.tables.candidates import CANDIDATES, ratios
from benchmarks.tables.readme import SERVER, TOPK, load

__all__ = ["expected"]


def expected() -> str:
    """Return the Markdown between the ``expected`` markers of the README."""
    candidates, server, topk = map(load, (CANDIDATES, SERVER, TOPK))
    gpus = {document["machine"]["gpu"] for document in (candidates, server, topk)}
    step = ratios(candidates, "step")
    tokens = [100 * (r["ratio"] - 1) for r in server["summary"] if r["figure"] == "tpot_ms"]
    alone = _float32(topk, 2048)
    return "\n".join([
        f"| model | what the plugin changes | what was measured on one {' or '.join(gpus)} |",
        "|---|---|---|",
        "| DeepSeek-V4.1 (vLLM) | consumer layers score the keys of their candidate blocks and "
        "not all keys; the source layer finds the blocks while it scores | the eight index layers "
        f"of a decode step take {min(step):.2f} to {max(step):.2f} of the time of the same work "
        "with all keys scored in every layer, as vLLM does it on Hopper ([below](#measured)) |",
        "| DeepSeek-V4 | bfloat16 logits, an exact top-k on them, pool slots from the top-k | in "
        f"a whole vLLM {server['machine']['vllm']} server a token takes {-max(tokens):.1f} to "
        f"{-min(tokens):.1f} % less time |",
        "| DeepSeek-V3.2, GLM | an exact float32 top-k | the top-k alone (k 2048) takes "
        f"{geometric_mean(alone):.2f} of the time of vLLM 0.33's, in the geometric mean of "
        f"{len(alone)} cells; it is slower in {sum(r > 1 for r in alone)} of them (worst "
        f"{max(alone):.2f}) |",
    ])  # fmt: skip


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
