"""The figures of DeepSeek-V4.1's index layers in SGLang's and TokenSpeed's own code.

:func:`sglang`, :func:`tokenspeed` and :func:`publish` make what stands between the ``sglang-v41``,
``tokenspeed-v41`` and ``sglang-publish`` markers of docs/results.md.
"""

from __future__ import annotations

from typing import Any

from benchmarks.engines.forward.variants import OFF
from benchmarks.tables.candidates import rounded
from benchmarks.tables.readme import load

__all__ = ["PUBLISH", "SGLANG", "TOKENSPEED", "publish", "sglang", "tokenspeed"]

SGLANG, TOKENSPEED = "h200_sglang_v41.json", "h200_tokenspeed_v41.json"
PUBLISH = "h200_publish_decode.json"
KINDS = ("plain", "source", "consumer")
Row = dict[str, Any]


def sglang() -> str:
    """Return the Markdown between the ``sglang-v41`` markers of docs/results.md."""
    document = load(SGLANG)
    lines = [
        f"{_head(document, SGLANG)} The eight index layers of one step, SGLang's own code without "
        f"the plugin and with it on the same tensors; {_checked(document)} Decode is timed in a "
        "CUDA graph. Prefill is timed eagerly, because SGLang's own prefill waits for the GPU. "
        "Memory is what a step allocates, without the plugin / with it.",
        "",
        "| rows x keys | SGLang | plugin | ratio | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for part, of in _parts(document).items():
        us = [of[name]["us"] for name in (OFF, "plugin")]
        mode, _, shape = part.partition(" ")
        rows, keys = map(int, shape.split("x"))
        memory = " / ".join(f"{of[name]['mib']:,.0f}" for name in (OFF, "plugin"))
        times = " | ".join(map(_time, us))
        lines.append(f"| {mode} {rows:,} x {keys:,} | {times} | {us[1] / us[0]:.3f} | {memory} |")
    waits = [row["host_waits"] for row in document["results"] if "host_waits" in row]
    return "\n".join([
        *lines,
        "",
        f"CUDA's detector of synchronization saw a wait in {sum(waits)} of {len(waits)} prefills: "
        f"{_waiting(document, OFF)} of SGLang's, {_waiting(document, 'plugin')} of the plugin's.",
    ])  # fmt: skip


def tokenspeed() -> str:
    """Return the Markdown between the ``tokenspeed-v41`` markers of docs/results.md."""
    document = load(TOKENSPEED)
    parts = _parts(document)
    plugin = "bf16 plugin"
    lines = [
        f"{_head(document, TOKENSPEED)} One call of `dsv41_index_topk`, µs in a CUDA graph, "
        f"TokenSpeed's own kernels / the plugin's; {_checked(document)}",
    ]
    for mode in ("decode", "prefill"):
        shapes = [name.split()[-1] for name in parts if name.startswith(f"v41 plain {mode} ")]
        lines += ["", f"| {mode}, rows x keys | plain | source | consumer |", "|---" * 4 + "|"]
        for shape in shapes:
            cells = (parts[f"v41 {kind} {mode} {shape}"] for kind in KINDS)
            us = (f"{rounded(of[OFF]['us'])} / {rounded(of[plugin]['us'])}" for of in cells)
            rows, keys = map(int, shape.split("x"))
            lines.append(f"| {rows:,} x {keys:,} | {' | '.join(us)} |")
    ratios = [of[plugin]["us"] / of[OFF]["us"] for of in parts.values()]
    recalls = [[of[name]["recall"] for of in parts.values()] for name in (OFF, plugin)]
    return "\n".join([
        *lines,
        "",
        f"The plugin takes half of the time or less in {sum(r <= 0.5 for r in ratios)} of "
        f"{len(ratios)} cells, and {max(ratios):.2f} of it in the worst. Where it takes more than "
        "half, scoring the keys is most of the work on both sides. Both round the queries to FP8. "
        "By queries that are not rounded, TokenSpeed selects in each cell "
        f"{min(recalls[0]):.3f} to {max(recalls[0]):.3f} of the 512 best keys, and the plugin "
        f"{min(recalls[1]):.3f} to {max(recalls[1]):.3f}.",
    ])  # fmt: skip


def publish() -> str:
    """Return the Markdown between the ``sglang-publish`` markers of docs/results.md."""
    document = load(PUBLISH)
    rows = document["results"]
    runs = document["runs"]
    differ = [row for row in rows if row["blocks_differ"] or row["keys_differ"]]
    missed = [row for row in rows if row["blocks_missed"] or row["keys_missed"]]
    far = [row for row in rows if row["keys"] > 262_144]
    return (
        f"{_head(document, PUBLISH)} SGLang's own `publish_decode`, called {runs} times on "
        f"the same tensors, gives different answers in {len(differ)} of {len(rows)} cases, among "
        f"them {sum(row in differ for row in far)} of {len(far)} cases above 262,144 keys. In "
        f"{len(missed)} cases, all with nearly equal scores, it also leaves out blocks or keys "
        "that are better than the worst that it selects. The plugin selects the lowest index of "
        "equal scores, in every run."
    )


def _head(document: Any, name: str) -> str:
    about = document["machine"]
    return (
        f"On one {about['gpu']} (`benchmarks/results/{name}`, of commit {about['commit'][:7]}): "
        f"{document['version']}."
    )


def _checked(document: Any) -> str:
    right = all(row["right"] for row in document["results"]) and not document["failed"]
    return "every answer was checked." if right else "every answer was checked, SOME ARE WRONG."


def _parts(document: Any) -> dict[str, dict[str, Row]]:
    """Return what was timed: a shape → a variant → its result."""
    parts: dict[str, dict[str, Row]] = {}
    for row in document["results"]:
        if row.get("us"):
            parts.setdefault(row["part"], {})[row["variant"]] = row
    return parts


def _waiting(document: Any, variant: str) -> int:
    return sum(row.get("host_waits", False) for row in _of(document, variant))


def _of(document: Any, variant: str) -> list[Row]:
    return [row for row in document["results"] if row["variant"] == variant]


def _time(us: float) -> str:
    return f"{us / 1000:,.1f} ms" if us >= 10_000 else f"{rounded(us)} µs"
