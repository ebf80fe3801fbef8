"""``dsv4-plugin bench read``: the reads of the indexer cache against the engines' gathers."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsv4_plugin import gather_indexer_cache, read_indexer_cache
from dsv4_plugin.cli import plots
from dsv4_plugin.cli.bench.floor import copy_rate
from dsv4_plugin.cli.bench.upstream import kernels
from dsv4_plugin.cli.checks.inputs import fp8_cache
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.checks.timing import time_graph
from dsv4_plugin.cli.shared.run import interruptible

__all__ = ["bench_read", "run"]

TOKENS = 14_338  # the prefill batch of the first measurement
PAGES = 16_384
HEAD_DIM = 128

Row = dict[str, Any]


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the reads, and keep the results file up to date."""
    engines = list(dict.fromkeys(arguments.against)) or ["vllm"]
    document = file.document
    with interruptible() as work:
        bench_read(say, engines, document["results"], file.save)
    document["complete"] = work.whole
    work.must(document["results"], "nothing was measured", file.said())
    file.save(now=True)
    if arguments.plot:
        plots.draw(document, arguments.plot)
        say(f"drawn to {arguments.plot}")
    work.end(file.said())


def bench_read(
    progress: Callable[[str], None],
    engines: Sequence[str],
    rows: list[Row],
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Time the read by slot and the paged gather, beside the byte floor and the engines' gathers.

    ``rows`` grows with each figure, and then ``saved`` is called.
    """
    peers = {name: call for e in engines for name, call in kernels(e, "gather").items()}
    for name, why in peers.items():
        if isinstance(why, str):
            progress(f"{name} is not compared: {why}")
    rate = copy_rate("cuda")
    progress(f"copy: {rate / 1e6:.2f} TB/s read + written")
    cache = fp8_cache(PAGES, device="cuda")
    g = torch.Generator().manual_seed(0)
    lists = [torch.randint(0, PAGES * 64, (TOKENS,), generator=g).cuda() for _ in range(24)]

    def add(case: str, implementation: str, us: float, floor: float) -> None:
        rows.append({"case": case, "implementation": implementation, "us": round(us, 3),
                     "floor_us": round(floor, 3), "ratio": round(us / floor, 3)})  # fmt: skip
        progress(f"{case:34s} {implementation:28s} {us:9.2f} us  {us / floor:6.2f}x floor")
        saved()

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

    # 16 requests with random pages, as in a prefill chunk.
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
    plugin = values.clone(), scales.clone()
    cache_3d = cache.view(PAGES, 64, HEAD_DIM + 4)
    for name, gather_of_engine in peers.items():
        if callable(gather_of_engine):
            values.view(torch.uint8).zero_()
            scales.zero_()
            call = functools.partial(gather_of_engine, cache_3d, pages, cu, values, scales)
            add("gather quantised", name, time_graph([call]), floor)
            same = torch.equal(plugin[0].view(torch.uint8), values.view(torch.uint8))
            rows.append({"case": f"gather equals {name}'s bit for bit",
                         "equal": same and torch.equal(plugin[1], scales)})  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        keys = torch.empty(TOKENS, HEAD_DIM, dtype=dtype, device="cuda")
        floor = TOKENS * (HEAD_DIM + 4 + HEAD_DIM * dtype.itemsize) / rate

        def dequantise(backend: str, keys: torch.Tensor = keys) -> None:
            gather_indexer_cache(cache, pages, cu, dtype=keys.dtype, out=keys, backend=backend)

        for backend in ("cuda", "triton"):
            us = time_graph([functools.partial(dequantise, backend)])
            add(f"gather {str(dtype).removeprefix('torch.')}", backend, us, floor)
