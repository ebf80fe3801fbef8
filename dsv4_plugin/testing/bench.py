"""``dsv4-plugin bench``: the ops against the peers that are installed, on the GPU at hand.

A peer that is not there is named, not made up. Every figure is microseconds a call inside a CUDA
graph (:mod:`dsv4_plugin.testing.timing`).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin import gather_indexer_cache, read_indexer_cache
from dsv4_plugin.testing import dry, installed, read_plot
from dsv4_plugin.testing.adapters import command as adapters_command
from dsv4_plugin.testing.candidates import command as candidates_command
from dsv4_plugin.testing.inputs import fp8_cache
from dsv4_plugin.testing.installed import ENGINES
from dsv4_plugin.testing.logits import cases as logits_cases
from dsv4_plugin.testing.logits import command as logits_command
from dsv4_plugin.testing.timing import machine, time_graph
from dsv4_plugin.testing.topk import UsageError, command
from dsv4_plugin.testing.topk import cases as topk_cases
from dsv4_plugin.testing.topk.floor import copy_rate

__all__ = ["add_arguments", "run"]

TOKENS = 14_338  # the prefill batch of the first seed
PAGES = 16_384
HEAD_DIM = 128

WHAT = ("read", "topk", "logits", "chain", "candidates", "adapters", "plot")

Row = dict[str, Any]


def bench_read(progress: Callable[[str], None], engines: Sequence[str] = ("vllm",)) -> list[Row]:
    """The read by slot and the paged gather, against the byte floor and the engines' gathers."""
    peers = {name: call for e in engines for name, call in ENGINES[e].kernels("gather").items()}
    for name, why in peers.items():
        if isinstance(why, str):
            progress(f"{name} is not compared: {why}")
    rate = copy_rate("cuda")
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

        def read(slots: torch.Tensor, backend: str, out: torch.Tensor = out) -> None:
            read_indexer_cache(cache, slots, out=out, backend=backend)

        for backend in ("cuda", "triton", "torch"):
            warm = [functools.partial(read, lists[0], backend)]
            cold = [functools.partial(read, slots, backend) for slots in lists]
            n = 24 if backend == "torch" else 96
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

    def gather(backend: str) -> None:
        gather_indexer_cache(cache, pages, cu, out=(values, scales), backend=backend)

    for backend in ("triton", "cuda"):
        us = time_graph([functools.partial(gather, backend)])
        add("gather quantised", backend, us, floor)
    ours = values.clone(), scales.clone()
    cache_3d = cache.view(PAGES, 64, HEAD_DIM + 4)
    for name, theirs in peers.items():
        if callable(theirs):
            values.view(torch.uint8).zero_()
            scales.zero_()
            call = functools.partial(theirs, cache_3d, pages, cu, values, scales)
            add("gather quantised", name, time_graph([call]), floor)
            same = torch.equal(ours[0].view(torch.uint8), values.view(torch.uint8))
            rows.append({"case": f"gather equals {name}'s bit for bit",
                         "equal": same and torch.equal(ours[1], scales)})  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        keys = torch.empty(TOKENS, HEAD_DIM, dtype=dtype, device="cuda")
        floor = TOKENS * (HEAD_DIM + 4 + HEAD_DIM * dtype.itemsize) / rate

        def dequantise(backend: str, keys: torch.Tensor = keys) -> None:
            gather_indexer_cache(cache, pages, cu, dtype=keys.dtype, out=keys, backend=backend)

        for backend in ("cuda", "triton"):
            us = time_graph([functools.partial(dequantise, backend)])
            add(f"gather {str(dtype).removeprefix('torch.')}", backend, us, floor)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin bench``."""
    parser.add_argument("what", choices=WHAT, help="which ops, or a plot")
    parser.add_argument(
        "results", type=Path, nargs="?", metavar="RESULTS.json", help="plot: the file to draw"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--load-library", action="append", default=[], metavar="SO",
        help="torch op library of a peer (vLLM's _C*.so) where the engine itself is not installed",
    )  # fmt: skip
    command.add_arguments(
        parser,
        [name for name in logits_cases.SUITES if name not in topk_cases.SUITES]
        + list(adapters_command.SUITES),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin bench``; returns the exit code."""
    try:
        return _run(arguments)
    except UsageError as error:
        print(f"dsv4-plugin bench: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.what == "plot":
        command.run_plot(arguments)
        print(f"drawn to {arguments.plot}")
        return 0
    if arguments.what == "read":
        if arguments.device != "cuda":
            raise UsageError("bench read has no dry run: --device must be cuda")
        engines = installed.engines_only(arguments.against)
        if arguments.plot:
            read_plot.require()  # now, not when all is measured
    on_cpu = arguments.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise UsageError(
            "there is no CUDA device here; nothing was measured (--device cpu is a dry run, of all "
            "but read)"
        )
    for library in arguments.load_library:
        torch.ops.load_library(library)
    about = machine()
    gpu = (
        f"{about['gpu']} ({about['sms']} SMs), driver {about['driver']}"
        if "gpu" in about
        else "CPU"
    )
    triton = f"triton {about['triton']}" if about["triton"] else "no triton"
    print(f"{gpu}, torch {about['torch']}, {triton}, dsv4-plugin {about['plugin']}")

    def progress(line: str) -> None:
        print(line, flush=True)

    if on_cpu:
        progress(dry.SAID)
        small = dry.shrink(arguments)
        if small:
            progress(small)
    if arguments.what == "topk":
        command.run(arguments, about, progress)
    elif arguments.what in ("logits", "chain"):
        logits_command.run(arguments, about, progress)
    elif arguments.what == "candidates":
        candidates_command.run(arguments, about, progress)
    elif arguments.what == "adapters":
        adapters_command.run(arguments, about, progress)
    else:
        document = {
            "machine": about,
            "what": "read",
            "results": bench_read(progress, engines or ["vllm"]),
        }
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        if arguments.plot:
            read_plot.draw(document, arguments.plot)
            progress(f"drawn to {arguments.plot}")
    if on_cpu:
        progress(f"\n{dry.SAID}")
    if arguments.json:
        print(f"written to {arguments.json}")
    return 0
