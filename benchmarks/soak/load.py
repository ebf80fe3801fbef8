"""The load of a server on the ops, for as long as the caller wants.

One CUDA graph has a chain of 43 layers. A layer gathers and reads keys of its FP8 cache, computes
the index logits of its keys and selects, and makes a top-k of much wider scores. The soak replays
two such graphs on two streams, with lengths, slots and pages that change, while it allocates and
frees other tensors. At every look it repeats known steps: their answers must equal the first
answers bit for bit, and memory must be what it was. The oracles judge the first answers. Without a
GPU a replay is a run of the calls.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from kits.oracles import check_selection, fp8_keys
from kits.replay import captured

from dsv4_plugin import gather_indexer_cache, read_indexer_cache, select, topk
from dsv4_plugin.cli.checks.inputs import fp8_cache, scores
from dsv4_plugin.cli.checks.oracles import same_bits

__all__ = ["SMALL", "Result", "Shape", "shape_on", "soak"]

HEADS = 64
OUTPUTS = ("keys", "values", "scales", "indices", "index logits", "selected indices")
SLACK = 64 << 20  # bytes of device memory that others may take in between


@dataclass(frozen=True)
class Shape:
    """How large a chain is."""

    layers: int = 43
    rows: int = 16
    columns: int = 140_000
    k: int = 512
    tokens: int = 2048
    pages: int = 64


SMALL = Shape(layers=3, rows=4, columns=3000, tokens=60, pages=12)  # for a CPU


def shape_on(device: str) -> Shape:
    """Return the shape that a device gets by default."""
    return Shape() if device == "cuda" else SMALL


@dataclass
class Result:
    """The result of a soak; ``faults`` is empty if everything was right."""

    device: str
    shape: Shape
    seconds: float = 0.0
    replays: int = 0
    looks: int = 0
    allocations: int = 0
    rows: int = 0
    allocated: list[int] = field(default_factory=list)  # bytes by torch's allocator, at each look
    used: list[int] = field(default_factory=list)  # bytes of the device, at each look
    faults: list[str] = field(default_factory=list)


class Chain:
    """The calls of all layers over their own buffers, and the graph of these calls."""

    def __init__(
        self, shape: Shape, device: str, seed: int, function: Callable[..., torch.Tensor] = topk
    ) -> None:
        self.shape, self.device, self.seed, self.topk = shape, device, seed, function
        layers, rows = shape.layers, shape.rows
        kinds = ("normal", "relu_sum", "crowded", "two_values")
        self.logits = [
            scores(kinds[i % 4], rows, shape.columns, torch.bfloat16, seed=seed + i, device=device)
            for i in range(min(layers, 4))
        ]
        self.caches = [fp8_cache(shape.pages, seed=seed + i, device=device) for i in range(4)]

        def room(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.lengths, self.table = room(rows), room(rows, shape.pages)
        self.cu = room(rows + 1)
        self.slots = room(shape.tokens, dtype=torch.int64)
        self.keys = room(layers, shape.tokens, 128, dtype=torch.bfloat16)
        self.values = room(layers, shape.tokens, 128, dtype=torch.uint8)
        self.scales = room(layers, shape.tokens, 4, dtype=torch.uint8)
        self.indices = room(layers, rows, shape.k)
        # From the keys to indices: as many columns as a request has pages of keys.
        g = torch.Generator().manual_seed(seed)
        q = torch.randn(rows, 1, HEADS, 128, generator=g).to(torch.float8_e4m3fn)
        self.q, self.weights = q.to(device), torch.rand(rows, HEADS, generator=g).to(device)
        self.seen = room(rows)
        self.scores = room(layers, rows, shape.pages * 64, dtype=torch.bfloat16)
        self.selected = room(layers, rows, shape.k)
        self.step(0)
        self.replay, _ = captured(self.calls, device)

    def calls(self) -> None:
        """Run one forward of all layers."""
        for i in range(self.shape.layers):
            cache = self.caches[i % len(self.caches)]
            gather_indexer_cache(
                cache, self.table, self.cu, out=(self.values[i], self.scales[i])
            )  # fmt: skip
            read_indexer_cache(cache, self.slots, out=self.keys[i])
            self.topk(self.logits[i % len(self.logits)], self.lengths, self.shape.k,
                      out=self.indices[i])  # fmt: skip
            select(self.q, cache, self.weights, self.seen, self.table, self.shape.k,
                   out=self.selected[i], logits=self.scores[i])  # fmt: skip

    def step(self, number: int) -> None:
        """Put the lengths, slots and pages of a step in place, on the current stream."""
        shape, r = self.shape, random.Random(f"{self.seed} {number}")
        near = (32_767, 32_772, 131_072, shape.k, shape.k + 1, 0, -1, shape.columns)
        lengths = [
            min(shape.columns, r.choice((*near, r.randint(0, shape.columns))))
            for _ in range(shape.rows)
        ]
        g = torch.Generator().manual_seed(r.randint(0, 1 << 30))
        total = shape.pages * 64
        cuts = torch.randint(0, shape.tokens + 1, (shape.rows - 1,), generator=g).sort().values
        # A sequence is no longer than its table.
        cu = [0, *cuts.tolist(), shape.tokens]
        for i in range(shape.rows):
            cu[i + 1] = min(cu[i + 1], cu[i] + total)
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.seen.copy_(torch.tensor([n % (total + 2) - 1 for n in lengths], dtype=torch.int32))
        self.cu.copy_(torch.tensor(cu, dtype=torch.int32))
        self.table.copy_(torch.randint(0, shape.pages, self.table.shape, generator=g))
        slots = torch.randint(0, total, (shape.tokens,), generator=g)
        self.slots.copy_(slots.masked_fill(torch.rand(shape.tokens, generator=g) < 0.05, -1))

    def answers(self, number: int) -> list[torch.Tensor]:
        """Replay one step over dirty outputs and return copies of what it wrote."""
        outs = [self.keys, self.values, self.scales, self.indices, self.scores, self.selected]
        for out in outs:
            out.view(torch.uint8).fill_(0xAB)
        self.step(number)
        self.replay()
        return [out.clone() for out in outs]

    def judge(self) -> None:
        """Raise if the outputs are not right now."""
        for i in range(self.shape.layers):
            logits, cache = self.logits[i % len(self.logits)], self.caches[i % len(self.caches)]
            check_selection(logits, self.lengths, self.shape.k, self.indices[i], ascending=True)
            check_selection(
                self.scores[i], self.seen, self.shape.k, self.selected[i], ascending=True
            )
            at = self.slots.clamp(min=0)
            want = fp8_keys(cache, at // 64, at % 64, 64, 128)[2].masked_fill(
                (self.slots < 0)[:, None], 0.0
            )
            if not bool(same_bits(self.keys[i], want.bfloat16()).all()):
                raise AssertionError(f"layer {i}: a key is not the cache's")


def _compare(result: Result, chain: Chain, known: list[list[torch.Tensor]]) -> None:
    """Record the outputs of known steps that differ from the first time.

    This is a separate function, so that no answer is alive when memory is read. The allocator may
    give an answer a block that is up to a megabyte larger, and counts all of it.
    """
    for step, want in enumerate(known):
        for name, a, b in zip(OUTPUTS, chain.answers(step), want, strict=True):
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                result.faults.append(
                    f"after {result.replays} replays the {name} of step {step} differ"
                )


def soak(
    *,
    device: str,
    seconds: float,
    shape: Shape | None = None,
    seed: int = 0,
    look_every: float = 5.0,
    progress: Callable[[Result], None] = lambda result: None,
    function: Callable[..., torch.Tensor] = topk,
    result: Result | None = None,
) -> Result:
    """Replay until the time is up; returns the result. ``function`` replaces the top-k.

    The function fills and returns ``result``, so the caller of an interrupted run has it too.
    """
    shape = shape or shape_on(device)
    result = result or Result(device, shape)
    chains = [Chain(shape, device, seed + 1000 * i, function) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in chains] if device == "cuda" else []
    known = []
    for chain in chains:
        known.append([chain.answers(step) for step in range(3)])
        _guarded(result, chain.judge)
    churn: list[torch.Tensor] = []
    r = random.Random(seed)

    def settle() -> None:
        churn.clear()
        if device == "cuda":
            torch.cuda.synchronize()

    def look() -> None:
        settle()
        for chain, answers in zip(chains, known, strict=True):
            _compare(result, chain, answers)
            _guarded(result, chain.judge)
        settle()
        result.looks += 1
        if device == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            result.allocated.append(torch.cuda.memory_allocated())
            result.used.append(total - free)
        progress(result)

    look()
    began = looked = time.monotonic()
    while (now := time.monotonic()) - began < seconds and not result.faults:
        step = result.replays
        for i, chain in enumerate(chains):
            if streams:
                with torch.cuda.stream(streams[i]):
                    chain.step(step)
                    chain.replay()
            else:
                chain.step(step)
                chain.replay()
            result.replays += 1
            result.rows += shape.layers * shape.rows
        churn.append(torch.empty(r.randint(1, 32 << 20), dtype=torch.uint8, device=device))
        result.allocations += 1
        if len(churn) > 8:
            churn.pop(r.randrange(len(churn))).fill_(0xFF)
        result.seconds = now - began
        if now - looked >= look_every:
            look()
            looked = time.monotonic()
    look()
    result.seconds = time.monotonic() - began
    if result.allocated and result.allocated[-1] > result.allocated[0]:
        grown = result.allocated[-1] - result.allocated[0]
        result.faults.append(f"torch's allocator holds {grown} bytes more than at the beginning")
    if result.used and result.used[-1] > result.used[0] + SLACK:
        result.faults.append(f"the device holds {result.used[-1] - result.used[0]} bytes more")
    return result


def _guarded(result: Result, judge: Callable[[], None]) -> None:
    try:
        judge()
    except AssertionError as wrong:
        result.faults.append(f"after {result.replays} replays: {wrong}")
