"""The figures of the README and of docs/, made from the committed results.

``python -m benchmarks.tables NAME`` prints the text between the markers of that name. ``readme``
prints the text between the ``figures`` markers. The markers of ``recall`` are in docs/numerics.md,
those of ``ratios`` in docs/notes/topk.md, all others in docs/results.md.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.server.measure import paired
from benchmarks.tables.recall import table
from dsv4_plugin.cli.checks import compare
from dsv4_plugin.cli.checks.compare import best_peers, geomean
from dsv4_plugin.cli.shared.run import reading

__all__ = [
    "RESULTS", "SERVER", "SERVER33", "SERVERS", "gain", "load", "profiled", "ratios", "readme",
    "reads", "recall", "served", "server",
]  # fmt: skip

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TOPK, READ = "h200_topk.json", "h200_read.json"
# Whole servers of DeepSeek-V4: the file, and in it the server with ``DSV4_TOPK=auto`` or its like.
SERVER, SERVER33 = "h200_vllm_e2e.json", "h200_vllm033_e2e.json"
SERVERS = {SERVER33: "on", SERVER: "bf16"}
_ROWS = (1, 8, 32, 64, 128)
_COLUMNS = (8192, 16_384, 32_768, 65_536, 131_072, 256_000)


def load(name: str) -> Any:
    """Return a committed results file."""
    with reading(RESULTS / name):
        return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def profiled(sides: list[dict[str, Any]]) -> list[str]:
    """Return two cells of servers' profiles: the busy GPU, ms, and the indexer, µs a layer."""
    return [
        " / ".join(f"{side['busy_us'] / 1e3:.2f}" for side in sides),
        " / ".join(f"{side['chain_us_layer']:.1f}" for side in sides),
    ]


def _decode(topk: Any) -> list[dict[str, Any]]:
    """Return the decode cells; an older file has no others."""
    return [r for r in topk["results"] if r.get("suite", "decode") == "decode"]


def readme() -> str:
    """Return the Markdown between the ``figures`` markers of docs/results.md."""
    topk = load(TOPK)
    warm = {
        (r["dtype"], r["k"], r["rows"], r["columns"], r["implementation"]): r["warm_us"]
        for r in _decode(topk)
    }
    upstream = topk.get("vllm_choice", "vllm33")
    about = topk["machine"]
    lines = [
        f"On one {about['gpu']} (CUDA graphs, warm, µs; `benchmarks/results/{TOPK}`, of "
        f"commit {about['commit'].removeprefix('g')[:7]}), k = 512: the plugin on bfloat16 "
        "scores / what vLLM 0.33 runs on float32 scores:",
        "",
        "| rows | " + " | ".join(f"{c // 1024}K" for c in _COLUMNS) + " |",
        "|---" * (len(_COLUMNS) + 1) + "|",
    ]
    for rows in _ROWS:
        cells = []
        for c in _COLUMNS:
            plugin = warm["bfloat16", 512, rows, c, "dsv4"]
            engine = warm["float32", 512, rows, c, upstream]
            cells.append(f"{plugin:.1f} / {engine:.1f}")
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    ratios, best = [], []
    fastest = best_peers(_decode(topk), "bfloat16")
    exact = all(r["exact"] for r in _decode(topk) if r["implementation"] == "dsv4")
    for (dtype, k, rows, c, name), us in warm.items():
        if dtype == "bfloat16" and name == "dsv4":
            ratios.append(us / warm["float32", k, rows, c, upstream])
            best.append(us / fastest[k, rows, c]["warm_us"])
    mean = geomean(ratios)
    slower = sum(r > 1 for r in ratios)
    lines += [
        "",
        f"Over all {len(ratios)} cells (k 512, 1024, 2048) the geometric mean of the ratio is "
        f"{mean:.2f}; the plugin is slower in {slower} of them (worst {max(ratios):.2f}). Against "
        f"the fastest upstream kernel of any dtype in each cell it is {geomean(best):.2f}, slower "
        f"in {sum(r > 1 for r in best)} (worst {max(best):.2f}). "
        f"The plugin is {'exact in every cell' if exact else 'NOT exact in some cell'}.",
        "",
        _served(topk, upstream)[1],
    ]
    return "\n".join(lines)


def reads() -> str:
    """Return the Markdown between the ``reads`` markers of docs/results.md."""
    read = load(READ)
    lines = [
        f"Reads of 14,338 keys (`benchmarks/results/{READ}`):",
        "",
        "| | CUDA | Triton | torch | vLLM | byte floor |",
        "|---|---|---|---|---|---|",
    ]
    # The name of vLLM's gather contains the release, but not in older files.
    us = {
        (r["case"], re.sub(r"^vllm.* cp_gather$", "vllm cp_gather", r["implementation"])): r
        for r in read["results"]
        if "us" in r
    }
    for case in ("read float32 warm", "read bfloat16 warm", "gather quantised"):
        shown = []
        for implementation in ("cuda", "triton", "torch", "vllm cp_gather"):
            row = us.get((case, implementation))
            shown.append(f"{row['us']:.2f}" if row else "")
        floor = us[case, "cuda"]["floor_us"]
        lines.append(f"| {case.removesuffix(' warm')} | " + " | ".join(shown) + f" | {floor:.2f} |")
    return "\n".join(lines)


def served() -> str:
    """Return the Markdown between the ``served`` markers of docs/results.md."""
    topk = load(TOPK)
    table, summary = _served(topk, topk.get("vllm_choice", "vllm33"))
    return f"{table}\n\n{summary}"


def _served(topk: Any, upstream: str) -> tuple[str, str]:
    """Return the table of calls as a server makes them, and its summary, of the same run."""
    us = {
        (r["dtype"], r["k"], r["rows"], r["columns"], r["implementation"]): r
        for r in topk["results"]
        if r["suite"] == "served"
    }
    shapes = [key[2:4] for key in us if key[:2] == ("bfloat16", 512) and key[4] == "dsv4"]
    columns = sorted({c for _, c in shapes})
    about = topk["machine"]
    lines = [
        f"On one {about['gpu']} (µs; `benchmarks/results/{TOPK}`, suite `served`), k = "
        "512: the plugin on bfloat16 scores / what vLLM 0.33 runs on float32 scores:",
        "",
        "| rows | " + " | ".join(f"{c // 1024}K" for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    ratios, best = [], []
    for (dtype, k, rows, c, name), row in us.items():
        if dtype == "bfloat16" and name == "dsv4":
            ratios.append(row["served_us"] / us["float32", k, rows, c, upstream]["served_us"])
            others = [
                r["served_us"]
                for key, r in us.items()
                if key[1:4] == (k, rows, c) and key[4] != "dsv4" and r["exact"]
            ]
            best.append(row["served_us"] / min(others))
    for rows in sorted({r for r, _ in shapes}):
        cells = [
            f"{us['bfloat16', 512, rows, c, 'dsv4']['served_us']:.1f} / "
            f"{us['float32', 512, rows, c, upstream]['served_us']:.1f}"
            for c in columns
        ]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines), (
        "In a server the code of a call comes from memory, because the other kernels of a layer "
        "have evicted it, and the launch takes time too. Measured in this way over "
        f"{len(ratios)} cells (k 512, 2048), the plugin takes {geomean(ratios):.2f} of vLLM's time "
        f"(worst {max(ratios):.2f}), and {geomean(best):.2f} of the time of the fastest exact "
        f"upstream kernel of any dtype (worst {max(best):.2f}). Each figure is a difference of two "
        "medians, and scatters by 1 µs."
    )


def ratios() -> str:
    """Return the Markdown between the ``ratios`` markers of docs/notes/topk.md."""
    document = load(TOPK)
    about = document["machine"]
    lines = [
        f"`benchmarks/results/{TOPK}`: one {about['gpu']}, driver {about['driver']}, torch "
        f"{about['torch']}, commit {about['commit'][:7]}. The plugin's time divided by the peer's; "
        "below 1 the plugin is faster.",
        "",
        "| what | geometric mean | cells | worst cell |",
        "|---|---|---|---|",
    ]
    for one in compare.ratios(document["results"], vllm=document["vllm_choice"]):
        lines.append(
            f"| {one.name} | {one.mean:.2f} | {one.cells} | {one.worst:.2f}: {one.where} |"
        )
    rows = [row for row in document["results"] if row["implementation"] == compare.PLUGIN]
    exact = sum(map(compare.right, rows))
    return "\n".join([*lines, "", f"The plugin is exact in {exact} of {len(rows)} cells."])


def recall() -> str:
    """Return the Markdown between the ``recall`` markers of docs/numerics.md."""
    document = load("cpu_recall.json")
    rows = max(row["rows"] for row in document["results"])
    head = (
        f"Overlap with the float32 selection in %, mean / 1st percentile / worst of {rows} rows "
        "(`benchmarks/results/cpu_recall.json`), by the number of columns:"
    )
    return f"{head}\n\n{table(document)}"


def server() -> str:
    """Return the Markdown between the ``server`` markers of docs/results.md."""
    return "\n\n".join(_server(name, with_it) for name, with_it in SERVERS.items())


def _server(name: str, with_it: str) -> str:
    document = load(name)
    about = document["machine"]
    chain = {
        (p["context"], p.get("concurrency", 1)): {
            name: (
                s["busy_us"] / 1e3,
                s["chain_us_layer"],
                *(s["parts"][k]["us_call"] for k in ("topk", "logits")),
            )
            for name, s in p["servers"].items()
        }
        for p in document["profiles"]
    }
    topk = document["servers"][with_it]["environment"].get("DSV4_TOPK", "auto")
    lines = [
        f"vLLM {about['vllm']} with {document['model']['num_hidden_layers']} layers of random "
        f"weights, on one {about['gpu']} (`benchmarks/results/{name}`, of commit "
        f"{about['commit'][:7]}), without the plugin / with it (`DSV4_TOPK={topk}`). "
        "The profiler gives the time in which the GPU is busy, and that of the "
        "indexer's kernels: K write, logits, fill, top-k and index transform:",
        "",
        "| requests x tokens of context | ms a token | ratio (95 % interval) | "
        "GPU busy, ms a step | indexer, µs a layer | its top-k | its logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _server_rows(document, "tpot_ms"):
        (side,) = row.keys() & (document["servers"].keys() - {"off"})
        layer = chain.get((row["context"], row["concurrency"]))
        kernels = ["", "", "", ""]
        if layer:
            kernels = [
                f"{o:.{digits}f} / {w:.{digits}f}"
                for o, w, digits in zip(layer["off"], layer[side], (2, 1, 1, 1), strict=True)
            ]
        case = f"{row['concurrency']} x {row['context']:,}"
        lines.append(
            f"| {case}{'' if side == with_it else f', `{side}`'} | "
            f"{row['off']:.2f} / {row[side]:.2f} | {_ratio(row)} | {' | '.join(kernels)} |"
        )
    firsts = [
        f"{row['context']:,} tokens {row['off']:.2f} / {row[with_it]:.2f} s, {_ratio(row)}"
        for row in _server_rows(document, "ttft_s")
    ]
    if firsts:
        text = f"Time to the first token of a prompt that no cache holds: {'; '.join(firsts)}."
        lines += ["", text]
    return "\n".join(lines)


def _server_rows(document: Any, figure: str) -> list[dict[str, Any]]:
    rows = [row for row in document["summary"] if row["figure"] == figure]
    return sorted(rows, key=lambda row: (row["concurrency"], row["context"]))


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["interval95"]
    return f"{row['ratio']:.3f} ({low:.3f} – {high:.3f})"


def gain() -> str:
    """Return the Markdown between the ``gain`` markers of docs/results.md."""
    return "\n".join(_gain(name, with_it) for name, with_it in SERVERS.items())


def _gain(name: str, with_it: str) -> str:
    document = load(name)
    rows = [row for row in _server_rows(document, "tpot_ms") if with_it in row]
    changes = ", ".join(
        f"{100 * (row['ratio'] - 1):+.1f} % ({row['concurrency']} x {row['context']:,})"
        for row in rows
    )
    faster = sum(row["interval95"][1] < 1 for row in rows)
    slower = sum(row["interval95"][0] > 1 for row in rows)
    about = document["machine"]
    times: dict[str, list[float]] = {"off": [], with_it: []}
    for cell in document["tpot_ms"]:
        for side, of in times.items():
            of.extend(cell["servers"][side])
    pooled = paired(times["off"], times[with_it])
    low, high = (100 * (bound - 1) for bound in pooled["interval95"])
    head = "a small gain" if high < 0 else "a loss" if low > 0 else "no gain that is certain"
    return (
        f"- In a whole server the plugin gives {head} (vLLM {about['vllm']}, one {about['gpu']}, "
        f"commit {about['commit'][:7]}). The time of a token changes by {changes}; in parentheses "
        "are requests at a time x tokens of context. By the 95 % intervals the plugin is faster in "
        f"{faster} of {len(rows)} cases and slower in {slower}. Over all {pooled['pairs']} pairs "
        f"the change is {100 * (pooled['ratio'] - 1):+.1f} % ({low:+.1f} … {high:+.1f} %)."
    )
