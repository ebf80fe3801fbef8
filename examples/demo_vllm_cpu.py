#!/usr/bin/env python3
"""Real vLLM indexer code on a CPU: without the plugin, with it, and whether the answers are equal.

    make demo

Every release in the environment runs in its own process. There vLLM loads its plugins like any vLLM
process and builds its own `SparseAttnIndexer` over a paged FP8 cache. It runs the indexer's forward
pass on a small random batch, once without the plugin and once with it. Code that a CPU cannot run
is replaced, for both runs alike, and the output names it. The exit code is 1 if an index or a value
is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "prefill": {"prefill": ((1800, 12), (700, 6), (40, 4))},
    "decode": {"decode": (3000, 1500, 700, 513, 40)},
    "MTP": {"decode": (2000, 900, 40), "next_n": 2},
    "mixed": {"decode": (2600, 700), "prefill": ((1200, 8), (30, 3))},
}
TESTS = Path(__file__).resolve().parents[1] / "tests"
K = 512
READ_TOKENS = 1024
READ_BAR = 50

# --- in the process of a release ------------------------------------------------------------


def least_ms(function, repeats: int) -> float:
    """The best of a few runs; slower ones include other work of the machine."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def run_release() -> dict:
    """Run every case both ways; runs in a process that has one release on its path."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vLLM itself finds the plugin's entry point

    import torch
    from kits.vllm_engine import STANDS_IN, Engine

    import dsv4_plugin

    def ordered(indices):
        last = torch.iinfo(torch.int32).max
        rows = indices.masked_fill(indices < 0, last).sort(dim=1).values
        return rows.masked_fill(rows == last, -1)

    def one_way(problem, enabled: bool, topk: str):
        os.environ["DSV4_PLUGIN"] = "1" if enabled else ""  # what `--plugin dsv4` sets
        os.environ["DSV4_TOPK"] = topk
        with engine.gpu(), engine.config("deepseek_v4"):
            layer = engine.layer(problem)
            dsv4_plugin.state.state.counters.clear()
            engine.calls.clear()
            indices = ordered(engine.step(layer, problem))
            ran = dict(dsv4_plugin.status()["counters"])
            calls = sorted({c.name for c in engine.calls if c.logits is None})
            dtypes = {c.dtype for c in engine.calls if c.logits is not None}
            exact = bool(torch.equal(indices, engine.expected(problem.k)))
        name = "bf16" if dtypes == {torch.bfloat16} else "fp32"
        return {"indices": indices, "counters": ran, "stand_ins": calls, "exact": exact,
                "logits": name}  # fmt: skip

    engine = Engine()
    torch.set_num_threads(2)
    rows = []
    for title, batch in CASES.items():
        problem = engine.problem(**batch, k=K)
        upstream = one_way(problem, False, "auto")
        seen = set()
        for topk in ("auto", "fp32"):
            plugin = one_way(problem, True, topk)
            if plugin["logits"] in seen:
                continue  # no kernel here writes bfloat16, so auto was fp32
            seen.add(plugin["logits"])
            a, b = upstream["indices"], plugin["indices"]
            chosen = int((b >= 0).sum())
            common = sum(
                len(set(x[x >= 0].tolist()) & set(y[y >= 0].tolist()))
                for x, y in zip(a, b, strict=True)
            )
            rows.append({
                "case": title, "rows": len(problem.lengths), "logits": plugin["logits"],
                "upstream": upstream["stand_ins"], "plugin": plugin["counters"],
                "leftover": plugin["stand_ins"], "upstream_exact": upstream["exact"],
                "exact": plugin["exact"], "same": bool(torch.equal(a, b)),
                "common": common / max(chosen, 1),
            })  # fmt: skip
    return {
        "version": engine.version, "engine": dsv4_plugin.status()["engine"],
        "seams": {n: s["where"] for n, s in dsv4_plugin.status()["seams"].items()},
        "torch": torch.__version__, "stands_in": STANDS_IN, "rows": rows, "read": run_read(),
    }  # fmt: skip


def run_read() -> dict:
    """Read the cache by slot: token by token, and in one call."""
    import torch

    import dsv4_plugin

    block, dim, pages = 64, 128, 64
    g = torch.Generator().manual_seed(0)
    cache = torch.zeros(pages, block * (dim + 4), dtype=torch.uint8)
    values = torch.randn(pages, block * dim, generator=g).to(torch.float8_e4m3fn)
    cache[:, : block * dim] = values.view(torch.uint8)
    cache[:, block * dim :] = torch.rand(pages, block, generator=g).view(torch.uint8)
    slots = torch.randperm(pages * block, generator=g)[:READ_TOKENS]
    slots[::100] = -1  # padding

    def loop():
        out = torch.zeros(READ_TOKENS, dim)
        for token, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            page, position = cache[slot // block], slot % block
            begin = block * dim + position * 4
            key = page[position * dim : (position + 1) * dim].view(torch.float8_e4m3fn)
            scale = page[begin : begin + 4].view(torch.float32)
            out[token] = key.to(torch.float32) * scale
        return out

    def at_once():
        return dsv4_plugin.read_indexer_cache(cache, slots)

    same = bool(torch.equal(loop(), at_once()))
    # Take the best of several on both sides; repeat if a busy machine disturbed them.
    for _ in range(3):
        times = {"loop_ms": least_ms(loop, 5), "read_ms": least_ms(at_once, 200)}
        if times["loop_ms"] >= READ_BAR * times["read_ms"]:
            break
    return {**times, "same": same}


# --- in the process the user started --------------------------------------------------------

COLOR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if COLOR else text


def mark(good: bool, text: str) -> str:
    return paint(("✓ " if good else "✗ ") + text, "32" if good else "1;31")


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table; colour codes do not count as width."""

    def width(text: str) -> int:
        for code in ("32", "1;31", "1"):
            text = text.replace(f"\033[{code}m", "")
        return len(text.replace("\033[0m", ""))

    wide = [max(width(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * (w + 2) for w in wide) + right

    def cells(row: list[str]) -> str:
        padded = (text + " " * (w - width(text)) for text, w in zip(row, wide, strict=True))
        return "│ " + " │ ".join(padded) + " │"

    print(line("┌", "┬", "┐"))
    print(cells([paint(text, "1") for text in head]))
    print(line("├", "┼", "┤"))
    for row in rows:
        print(cells(row))
    print(line("└", "┴", "┘"))


def implementations(counters: dict[str, int]) -> str:
    """The implementation that ran, from the plugin's own counters."""
    ran: dict[str, list[str]] = {}
    for name in sorted(counters, reverse=True):  # top-k before gather
        op, by = name.partition(".")[0], name.rpartition(".")[2]
        if (op, name.count(".")) in (("topk", 3), ("gather", 1)):
            ran.setdefault(by, []).append("top-k" if op == "topk" else op)
    return (
        "; ".join(f"{by} {', '.join(dict.fromkeys(ops))}" for by, ops in ran.items()) or "nothing"
    )


SHORT = {
    "cooperative_topk": "coop",
    "cp_gather_indexer_k_quant_cache": "gather",
    "persistent_topk": "persistent",
    "top_k_per_row_prefill": "per_row",
}


def show(result: dict) -> bool:
    """Print one release; return whether everything is right."""
    print(paint(f"vLLM {result['version']}", "1") + f", torch {result['torch']}; patched:")
    for name, where in result["seams"].items():
        print(f"    {name:13s} {where}")
    rows, fine = [], True
    for row in result["rows"]:
        if row["logits"] == "fp32":
            good = row["same"] and row["exact"]
            answer = mark(good, "same as vLLM's" if row["same"] else "DIFFERENT")
        else:  # another dtype: it must be exact on its own logits
            good = row["exact"]
            answer = mark(good, f"exact, {row['common']:.1%} as fp32")
        good = good and row["upstream_exact"] and not row["leftover"]
        fine = fine and good
        rows.append([
            f"{row['case']}, {row['rows']} rows", row["logits"],
            ", ".join(sorted(SHORT.get(n, n) for n in row["upstream"])),
            implementations(row["plugin"]), answer,
        ])  # fmt: skip
    table(["batch", "logits", "vLLM ran", "plugin ran", f"top-{K} indices"], rows)
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", help="comma list; default: all in the environment")
    parser.add_argument("--child", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.child.write_text(json.dumps(run_release()))
        return 0

    releases = Path(sys.prefix) / "releases"
    found = sorted((p.name for p in releases.glob("*")), reverse=True)
    versions = arguments.versions.split(",") if arguments.versions else found
    if not versions:
        print(f"no vLLM in {releases}; `make demo` makes it", file=sys.stderr)
        return 2
    fine, result = True, {}
    for version in versions:
        result = start(releases / version)
        if not result:
            return 1
        fine = show(result) and fine
        print()

    print(paint("Read of the FP8 cache by slot", "1") + f", {READ_TOKENS} tokens × 128, float32:")
    read = result["read"]
    times = read["loop_ms"] / read["read_ms"]
    fine = fine and read["same"]  # a slow machine is no wrong answer
    verdict = "the same bits" if read["same"] else "DIFFERENT"
    table(
        ["per-token loop", "read_indexer_cache (torch)", "faster", "values"],
        [[f"{read['loop_ms']:.2f} ms", f"{read['read_ms']:.3f} ms",
          mark(times >= READ_BAR, f"{times:.0f}× (at least: {READ_BAR}×)"),
          mark(read["same"], verdict)]],
    )  # fmt: skip
    print()
    print("On this CPU, stand-ins replace, for both columns alike:")
    for what, how in result["stands_in"].items():
        print(f"  · {what}: {how}")
    print("So the first table has no times. The indices, patched places and the path from vLLM's")
    print("plugin loader to the top-k are real.")
    print()
    print(mark(fine, "everything is right" if fine else "something is wrong: see above"))
    return 0 if fine else 1


def start(release: Path) -> dict:
    """Run one release in a process of its own."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}
    environ.pop("VLLM_PLUGINS", None)
    environ |= {
        "PYTHONPATH": os.pathsep.join((str(release), str(TESTS))),
        "VLLM_LOGGING_LEVEL": "ERROR", "DSV4_LOG": "warning",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(answer)],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            print(done.stdout, file=sys.stderr)
            print(f"vLLM {release.name} could not be run (exit code {done.returncode})")
            return {}
        return json.loads(answer.read_text())


if __name__ == "__main__":
    sys.exit(main())
