"""``dsv4-plugin bench``: the ops against the peers that are installed, on the GPU at hand.

A peer that is not there is named, not made up. Every figure is microseconds a call inside a CUDA
graph (:mod:`dsv4_plugin.testing.timing`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin import gather_indexer_cache, read_indexer_cache, topk
from dsv4_plugin.testing.inputs import fp8_cache, scores
from dsv4_plugin.testing.timing import machine, time_graph

__all__ = ["add_arguments", "run"]

TOKENS = 14_338  # the prefill batch of the first seed
PAGES = 16_384
HEAD_DIM = 128
COLD_BYTES = 150 << 20
TOPK_COLUMNS = (8192, 16_384, 32_768, 65_536, 131_072, 256_000)
TOPK_ROWS = (1, 8, 32, 64, 128)

Row = dict[str, Any]


def _peer_op(namespace: str, name: str) -> Any:
    """Return an op that an engine registered, or None."""
    try:
        return getattr(getattr(torch.ops, namespace), name)
    except (AttributeError, RuntimeError):
        return None


def _copy_rate() -> float:
    """Measure bytes a microsecond of a large device-to-device copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_graph([lambda: target.copy_(source)], launches=5, replays=7)


def bench_read(progress: Callable[[str], None]) -> list[Row]:
    """The read by slot and the paged gather, against the byte floor and vLLM's gather."""
    rate = _copy_rate()
    progress(f"copy: {rate / 1e6:.2f} TB/s read + written")
    cache = fp8_cache(PAGES, device="cuda")
    g = torch.Generator().manual_seed(0)
    lists = [torch.randint(0, PAGES * 64, (TOKENS,), generator=g).cuda() for _ in range(24)]
    rows: list[Row] = []

    def add(case: str, implementation: str, us: float, floor: float) -> None:
        rows.append({"case": case, "implementation": implementation, "us": round(us, 3),
                     "floor_us": round(floor, 3), "ratio": round(us / floor, 3)})  # fmt: skip
        progress(f"{case:34s} {implementation:28s} {us:9.2f} us  {us / floor:6.2f}x floor")

    for dtype in (torch.float32, torch.bfloat16):
        floor = TOKENS * (8 + HEAD_DIM + 4 + HEAD_DIM * dtype.itemsize) / rate
        name = str(dtype).removeprefix("torch.")
        out = torch.empty(TOKENS, HEAD_DIM, dtype=dtype, device="cuda")
        for backend in ("triton", "torch"):
            warm = [
                lambda b=backend, out=out: read_indexer_cache(cache, lists[0], out=out, backend=b)
            ]
            cold = [lambda s=s, b=backend, out=out: read_indexer_cache(cache, s, out=out, backend=b)
                    for s in lists]  # fmt: skip
            n = 96 if backend == "triton" else 24
            add(f"read {name} warm", backend, time_graph(warm, launches=n), floor)
            add(f"read {name} cold slots", backend, time_graph(cold, launches=n), floor)

    # 16 requests of random pages, as a prefill chunk has them.
    each = [TOKENS // 16 + (i < TOKENS % 16) for i in range(16)]
    cu = torch.tensor([0, *each]).cumsum(0).int().cuda()
    width = -(-max(each) // 64)
    pages = torch.randperm(PAGES, generator=g)[: 16 * width].reshape(16, width).int().cuda()
    values = torch.empty(TOKENS, HEAD_DIM, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(TOKENS, 4, dtype=torch.uint8, device="cuda")
    floor = TOKENS * 2 * (HEAD_DIM + 4) / rate
    add("gather quantised", "triton", time_graph(
        [lambda: gather_indexer_cache(cache, pages, cu, out=(values, scales), backend="triton")]
    ), floor)  # fmt: skip
    theirs = _peer_op("_C_cache_ops", "cp_gather_indexer_k_quant_cache")
    if theirs is None:
        progress("vllm is not loaded: its cp_gather_indexer_k_quant_cache is not compared")
    else:
        ours = values.clone(), scales.clone()
        cache_3d = cache.view(PAGES, 64, HEAD_DIM + 4)
        add("gather quantised", "vllm cp_gather", time_graph(
            [lambda: theirs(cache_3d, values, scales, pages, cu)]
        ), floor)  # fmt: skip
        same = torch.equal(ours[0].view(torch.uint8), values.view(torch.uint8))
        rows.append({"case": "gather equals vllm's bit for bit",
                     "equal": same and torch.equal(ours[1], scales)})  # fmt: skip
    return rows


def bench_topk(
    progress: Callable[[str], None],
    ks: tuple[int, ...] = (512, 1024, 2048),
    rows: tuple[int, ...] = TOPK_ROWS,
    columns: tuple[int, ...] = TOPK_COLUMNS,
) -> list[Row]:
    """The exact top-k over the grid of the peers' table, warm and cold."""
    table: list[Row] = []
    for dtype in (torch.bfloat16, torch.float32):
        for k in ks:
            for r in rows:
                for c in columns:
                    size = r * c * dtype.itemsize
                    copies = max(1, min(64, -(-COLD_BYTES // size)))
                    held = [scores("normal", r, c, dtype, seed=i, device="cuda")
                            for i in range(min(copies, 4))]  # fmt: skip
                    held += [held[0].clone() for _ in range(copies - len(held))]
                    lengths = torch.full((r,), c, dtype=torch.int32, device="cuda")
                    out = torch.empty(r, k, dtype=torch.int32, device="cuda")
                    calls = [lambda x=x: topk(x, lengths, k, out=out, backend="cuda")  # noqa: B023
                             for x in held]  # fmt: skip
                    line: Row = {"dtype": str(dtype).removeprefix("torch."), "k": k, "rows": r,
                                 "columns": c}  # fmt: skip
                    line["warm_us"] = round(time_graph(calls[:1], launches=40, replays=11), 3)
                    line["cold_us"] = round(time_graph(calls, launches=64, replays=11), 3)
                    table.append(line)
                    progress(
                        f"{line['dtype']:9s} k {k:4d}  {r:3d} x {c:6d}  "
                        f"warm {line['warm_us']:8.2f} us  cold {line['cold_us']:8.2f} us"
                    )
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin bench``."""
    parser.add_argument("what", choices=("read", "topk"), help="which ops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--k", type=int, nargs="*", help="top-k: only these k")
    parser.add_argument(
        "--load-library", action="append", default=[], metavar="SO",
        help="torch op library of a peer (vLLM's _C*.so) where the engine itself is not installed",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin bench``; returns the exit code."""
    if not torch.cuda.is_available():
        print("dsv4-plugin bench: there is no CUDA device here; nothing was measured",
              file=sys.stderr)  # fmt: skip
        return 2
    for library in arguments.load_library:
        torch.ops.load_library(library)
    about = machine()
    print(f"{about['gpu']} ({about['sms']} SMs), driver {about['driver']}, torch {about['torch']}, "
          f"triton {about['triton']}, dsv4-plugin {about['plugin']}")  # fmt: skip

    def progress(line: str) -> None:
        print(line, flush=True)

    if arguments.what == "read":
        results = bench_read(progress)
    else:
        results = bench_topk(progress, ks=tuple(arguments.k or (512, 1024, 2048)))
    if arguments.json:
        text = json.dumps({"machine": about, "what": arguments.what, "results": results}, indent=1)
        arguments.json.write_text(text + "\n")
        print(f"written to {arguments.json}")
    return 0
