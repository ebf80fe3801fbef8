"""The figures of DeepSeek-V4.1's index layers, made from the committed results.

:func:`server`, :func:`step` and :func:`layers` make the texts between the ``v41-server``,
``v41-step`` and ``v41-layers`` markers of docs/results.md.
"""

from __future__ import annotations

from typing import Any

from benchmarks.tables.readme import load, profiled

__all__ = [
    "CANDIDATES",
    "SERVER",
    "SERVERS",
    "fp4",
    "layers",
    "ratios",
    "rounded",
    "server",
    "step",
]

CANDIDATES, SERVER = "h200_candidates.json", "h200_vllm_v41.json"
SERVERS = (SERVER, "h200_vllm_v41_four.json", "h200_vllm_v41_long.json")
DRAFT, FP4 = "h200_draft.json", "h200_fp4.json"
MEMORY = "h200_vllm_v41_memory.json"
PLUGIN, FULL_WIDTH = ("dsv4", "bfloat16"), ("full width", "float32")
Cells = dict[tuple[str, int, int], float]  # op, rows, keys → µs


def server() -> str:
    """Return the Markdown between the ``v41-server`` markers of docs/results.md."""
    documents = {name: load(name) for name in SERVERS}
    document = documents[SERVER]
    about = document["machine"]
    kernels = {
        (profile["context"], profile.get("concurrency", 1)): profile["servers"]
        for each in documents.values()
        for profile in each["profiles"]
    }
    files = ", ".join(
        f"`benchmarks/results/{name}`, of commit {each['machine']['commit'][:7]}"
        for name, each in documents.items()
    )
    lines = [
        f"A whole vLLM {about['vllm']} server of DeepSeek-V4.1, "
        f"{document['model']['num_hidden_layers']} layers of random weights, on one {about['gpu']} "
        f"({files}), without the plugin / with it. The profiler gives the time of all kernels and "
        "of the indexer's kernels:",
        "",
        "| requests x tokens of context | ms a token | ratio (95 % interval) | all kernels, ms a "
        "step | indexer, µs a layer |",
        "|---|---|---|---|---|",
    ]
    for row in (row for each in documents.values() for row in each["summary"]):
        if row["figure"] != "tpot_ms":
            continue
        low, high = row["interval95"]
        busy = indexer = "–"
        found = kernels.get((row["context"], row["concurrency"]), {})
        sides = [side for side in found.values() if "busy_us" in side]  # off, on
        if sides:
            busy, indexer = profiled(sides)
        lines.append(
            f"| {row['concurrency']} x {row['context']:,} | {row['off']:.2f} / {row['on']:.2f} | "
            f"{row['ratio']:.3f} ({low:.3f} – {high:.3f}) | {busy} | {indexer} |"
        )
    return "\n".join([*lines, "", memory()])


def memory() -> str:
    """Return torch's GPU memory when a server with graphs of many rows begins to serve.

    vLLM's own figure of its graphs is not used: it comes from the free memory of the GPU, and both
    servers captured at the same time.
    """
    document = load(MEMORY)
    held = " / ".join(
        f"{document['servers'][name]['memory']['serving'][0]['reserved_gib']:.1f}"
        for name in ("off", "on")
    )
    command = document["command"]
    rows = command[command.index("--max-num-seqs") + 1]
    return (
        f"With graphs of up to {rows} rows, each as wide as a million keys, torch holds {held} GiB "
        f"of the GPU (without the plugin / with it) when the server begins to serve "
        f"(`benchmarks/results/{MEMORY}`, of commit {document['machine']['commit'][:7]}; nothing "
        "else was measured in that run)."
    )


def step() -> str:
    """Return the Markdown between the ``v41-step`` markers of docs/results.md."""
    document = load(CANDIDATES)
    found = ratios(document, "step")
    return "\n".join([
        f"The eight index layers of one decode step, µs, on one {document['machine']['gpu']} "
        f"(`benchmarks/results/{CANDIDATES}`, of commit {document['machine']['commit'][:7]}), "
        "with the plugin's ops in bfloat16 / the same work at full width in float32:",
        "",
        *_table(document, "step"),
        "",
        f"The ratio is {min(found):.2f} to {max(found):.2f}; every answer was "
        f"{'checked' if _exact(document) else 'checked, and SOME ARE WRONG'}. *Full width* scores "
        "all keys, masks a buffer of "
        f"{document['width']:,} columns in each consumer layer and selects over the whole row, as "
        "vLLM does on Hopper. It uses the plugin's float32 logits and top-k for that and not "
        "vLLM's kernels.",
        "",
        _draft(),
    ])  # fmt: skip


def _draft() -> str:
    """Return a line on the time of a step of one request with draft tokens."""
    document = load(DRAFT)
    us = [_cells(document, "decode", of) for of in (PLUGIN, FULL_WIDTH)]
    ((op, rows, columns),) = (cell for cell in us[0] if cell[0] == "step")
    times = [some[op, rows, columns] for some in us]
    return (
        f"One request of {rows} rows (draft tokens) at {_keys(columns)}: {rounded(times[0])} / "
        f"{rounded(times[1])} (`benchmarks/results/{DRAFT}`)."
    )


def fp4() -> str:
    """Return the Markdown between the ``v41-fp4`` markers of docs/results.md."""
    document = load(FP4)
    rows = [r for r in document["results"] if (r["suite"], r["op"]) == ("decode", "step")]
    columns = sorted({row["columns"] for row in rows})
    us = {(row["rows"], row.get("next_n", 1), row["columns"]): row["us"] for row in rows}
    lines = [
        "The eight index layers of one decode step over SGLang's FP4 keys, µs, on one "
        f"{document['machine']['gpu']} (`benchmarks/results/{FP4}`, of commit "
        f"{document['machine']['commit'][:7]}; every answer was "
        f"{'checked' if _exact(document) else 'checked, and SOME ARE WRONG'}):",
        "",
        "| requests x rows of each | " + " | ".join(_keys(n) for n in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for count, each in sorted({(count, each) for count, each, _ in us}, key=lambda x: x[::-1]):
        cells = (rounded(us[count, each, n]) for n in columns)
        lines.append(f"| {count // each} x {each} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers() -> str:
    """Return the Markdown between the ``v41-layers`` markers of docs/results.md."""
    document = load(CANDIDATES)
    lines = [
        f"On one {document['machine']['gpu']} (`benchmarks/results/{CANDIDATES}`, µs in a CUDA "
        "graph), with the plugin's ops in bfloat16 / the same work at full width in float32; "
        f"{document['heads']} heads, k {document['k']}, {document['candidates']:,} candidate "
        "blocks a row, keys from memory.",
    ]
    for op, what in (("consumer", "A consumer layer"), ("source", "The source layer")):
        lines += ["", f"{what} at decode:", "", *_table(document, op)]
    found = _cells(document, "prefill", PLUGIN), _cells(document, "prefill", FULL_WIDTH)
    shown = (
        f"{rows:,} rows x {_keys(n)} {rounded(us)} / {rounded(found[1][op, rows, n])}"
        for (op, rows, n), us in found[0].items()
        if op == "consumer"
    )
    return "\n".join([*lines, "", f"A consumer layer at prefill: {'; '.join(shown)}."])


def ratios(document: Any, op: str) -> list[float]:
    """Return the plugin's time of a decode chain over that at full width, for each cell."""
    with_it, without = (_cells(document, "decode", of) for of in (PLUGIN, FULL_WIDTH))
    return [us / without[cell] for cell, us in with_it.items() if cell[0] == op]


def _table(document: Any, op: str) -> list[str]:
    with_it, without = (_cells(document, "decode", of) for of in (PLUGIN, FULL_WIDTH))
    columns = sorted({n for name, _, n in with_it if name == op})
    lines = [
        "| rows | " + " | ".join(_keys(n) for n in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for rows in sorted({rows for name, rows, _ in with_it if name == op}):
        cells = (
            f"{rounded(with_it[op, rows, n])} / {rounded(without[op, rows, n])}" for n in columns
        )
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    return lines


def _cells(document: Any, suite: str, of: tuple[str, str]) -> Cells:
    return {
        (row["op"], row["rows"], row["columns"]): row["us"]
        for row in document["results"]
        if row["suite"] == suite and (row["implementation"], row["dtype"]) == of
    }


def rounded(value: float) -> str:
    """Return microseconds for a cell of a table."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _keys(count: int) -> str:
    return f"{count >> 20}M keys" if count >= 1 << 20 else f"{count >> 10}K keys"


def _exact(document: Any) -> bool:
    return all(row["exact"] for row in document["results"])
