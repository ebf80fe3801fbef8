"""A case for each path of the top-k, the logits and the candidates, made for compute-sanitizer.

    python tests/kits/sanitizer_driver.py [--only NAME ...] [--plant outside | uninitialised]

The tools watch only kernels of this project (test_sanitizer_gpu.py filters by name), so data that a
kernel of torch writes does not count as initialised. All data is therefore drawn on the CPU and
copied. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is its own cudaMalloc, so the tools see a
read one element outside of it. Memory outside of a row's window (of the scores, of the block table)
is never written, so initcheck finds a kernel that reads it. `--plant` makes a fault on purpose, to
check that the tool finds it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

import torch
from kits import logits_cases

from dsv4_plugin import (
    block_maxima,
    candidate_logits,
    candidate_logits_ragged,
    candidate_select,
    paged_logits,
    ragged_logits,
    select,
    select_blocks,
    select_candidates,
    topk,
)
from dsv4_plugin.cli.checks import candidate_oracles
from dsv4_plugin.cli.checks.inputs import scores

SIZES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Path:
    """One call. `lengths` are taken in turn by the rows; columns past them are uninitialised."""

    name: str
    rows: int
    width: int
    lengths: tuple[int, ...]
    k: int = 512
    dtype: str = "bfloat16"
    kind: str = "normal"
    offset: int = 0  # of the first row, in elements
    start: int = 0  # row_starts, where not 0
    next_n: int = 1
    pages: bool = False
    sort: bool = False


# One entry for each path: a change of choose_topk (csrc) is a change here. CTAs a row grow with the
# length and shrink with the rows; a row past what 16 CTAs hold goes to the wide kernel.
PATHS = (
    Path("short rows", 5, 700, (-1, 0, 1, 511, 512)),
    Path("one CTA", 2, 8192, (513, 8192)),
    Path("one CTA, float32", 2, 4096, (4096, 2049), dtype="float32", k=2048),
    Path("one CTA, larger slice", 70, 16_384, (16_384, 9001)),
    Path("cluster of 2", 2, 16_000, (16_000, 15_999)),
    Path("cluster of 4", 2, 32_768, (32_767, 32_768), k=2048),
    Path("cluster of 8", 1, 65_536, (65_535,), k=1024),
    Path("cluster of 16", 1, 131_072, (131_072,)),
    Path("cluster of 16, larger slice", 1, 262_144, (262_143,), k=2048),
    Path("cluster of 16, float32", 1, 200_000, (200_000,), dtype="float32"),
    Path("very long row", 1, 600_000, (600_000,), dtype="float32"),
    Path("wide kernel", 1, 4_200_000, (4_199_999,)),
    Path("short and long rows of one grid", 9, 100_000, (300, 513, 8192, 8193, 100_000)),
    Path("more rows than clusters", 40, 65_536, (65_536, 100, 40_000)),
    Path("cluster of 4, largest slice", 18, 140_000, (140_000, 8192, 8193, 100)),
    Path("cluster of 6", 18, 60_000, (60_000, 8192, 8193, 100)),
    Path("half of a cluster", 3, 140_000, (140_000, 65_536, 20_000)),
    Path("a guess, float32", 70, 20_001, (20_001, 9001, 8192, 100), k=2048, dtype="float32"),
    Path("a guess, slots", 70, 9216, (9216, 9001), k=1000, dtype="float32", pages=True),
    Path("a wrong guess", 70, 9216, (9216, 9001), k=2048, dtype="float32", kind="two_values"),
    Path("two CTAs a multiprocessor", 100, 40_000, (40_000, 8192, 8193, 100), k=2048),
    Path("more rows than SMs", 140, 9000, (9000, 513, 4097)),
    Path("float16", 2, 40_000, (40_000, 39_999), dtype="float16"),
    Path("misaligned", 3, 20_001, (20_001, 19_990, 515), offset=3),
    Path("aligned to 2 bytes, to the end", 1, 20_001, (20_001,), offset=7),
    Path("aligned to 2 bytes, short, to the end", 1, 8191, (8191,), offset=1),
    Path("aligned to 4 bytes, to the end", 1, 20_003, (20_003,), dtype="float32", offset=3),
    Path("to the end of the allocation", 2, 131_075, (131_075,)),
    Path("misaligned float32", 3, 20_001, (20_001, 19_990, 515), dtype="float32", offset=1),
    Path("row starts", 3, 50_000, (30_000, 8192, 600), start=7),
    Path("row starts to the end", 2, 9000, (9000 - 13,), start=13, dtype="float32"),
    Path("next_n", 4, 40_000, (40_000, 514), next_n=2),
    Path("page table", 3, 40_000, (40_000, 513, 100), pages=True),
    Path("page table, sorted", 2, 40_000, (40_000, 100), pages=True, sort=True, k=1000),
    Path("sorted", 3, 40_000, (40_000, 2049, 100), sort=True, k=2048),
    Path("sorted, one CTA", 3, 8192, (8192, 513, 100), sort=True),
    Path("all equal", 2, 40_000, (40_000, 39_999), kind="all_equal"),
    Path("all equal, one CTA", 2, 8192, (8192, 8000), kind="all_equal", k=2048),
    Path("plateau, cluster", 1, 131_072, (131_071,), kind="relu_sum", k=2048),
    Path("two values, float32", 2, 65_536, (65_536, 40_001), kind="two_values", dtype="float32"),
    Path("one crowded bin, float32", 2, 40_000, (40_000,), kind="one_huge_bin", dtype="float32"),
    Path("NaN and infinities", 2, 40_000, (40_000, 600), kind="special"),
    Path("odd k", 2, 40_000, (40_000, 101), k=100),
    Path("k of 1", 2, 40_000, (40_000, 1), k=1),
)  # fmt: skip


class Call:
    """The tensors of a path, on the CPU whole and on the GPU initialised in the windows only."""

    def __init__(self, path: Path, plant: str = "") -> None:
        self.path = path
        dtype = SIZES[path.dtype]
        requests = path.rows // path.next_n
        ends = [path.lengths[i % len(path.lengths)] for i in range(requests)]
        self.lengths = torch.tensor(ends, dtype=torch.int32)
        step = torch.arange(1 - path.next_n, 1)
        windows = (self.lengths[:, None] + step).clamp(min=0).reshape(-1).tolist()
        self.starts = torch.full((path.rows,), path.start, dtype=torch.int32)
        self.logits = scores(path.kind, path.rows, path.width, dtype)
        width = path.width
        count = path.offset + path.rows * width
        if plant == "outside":  # the allocation ends before the last row does
            held = torch.empty(count - width // 2, dtype=dtype, device="cuda")
            flat = beyond(held, count)
            self.held = held
        else:
            flat = torch.empty(count, dtype=dtype, device="cuda")
        self.gpu_logits = flat[path.offset :].view(path.rows, width)
        room = flat.shape[0] - (width // 2 if plant == "outside" else 0)
        for r, n in enumerate(windows):
            n = max(0, min(n, width - path.start))
            if plant == "uninitialised" and n:
                n -= 1
            begin = path.offset + r * width + path.start
            end = min(begin + n, room)
            part = self.logits[r, path.start : path.start + end - begin]
            flat[begin:end].copy_(part)  # contiguous on both sides: a plain copy, no kernel
        self.table = None
        if path.pages:
            pages = -(-width // 64)
            self.table = torch.arange(requests * pages, dtype=torch.int32).view(requests, pages)
            self.table[:, ::7] = -1

    def arguments(self, device: str) -> dict[str, object]:
        """The keywords of `topk`."""
        path = self.path
        more: dict[str, object] = {"next_n": path.next_n, "sort": path.sort}
        if path.start:
            more["row_starts"] = self.starts.to(device)
        if self.table is not None:
            more["page_table"] = self.table.to(device)
        return more

    def run(self) -> torch.Tensor:
        """Call the kernel twice, the second beginning while the first ends."""
        path, lengths, more = self.path, self.lengths.cuda(), self.arguments("cuda")
        outs = [torch.empty(path.rows, path.k, dtype=torch.int32, device="cuda") for _ in range(2)]
        raws, counts = [None, None], None
        if path.pages:
            raws = [torch.empty_like(out) for out in outs]
            counts = torch.empty(path.rows, dtype=torch.int32, device="cuda")
        for out, raw in zip(outs, raws, strict=True):
            topk(self.gpu_logits, lengths, path.k, out=out, out_raw=raw, out_counts=counts,
                 backend="cuda", **more)  # fmt: skip
        results = [out.cpu() for out in outs]
        if not torch.equal(*results):
            raise AssertionError(f"{path.name}: the second call differs from the first")
        return results[0]

    def want(self) -> torch.Tensor:
        """The torch reference's answer, on the CPU."""
        more = self.arguments("cpu")
        return topk(self.logits, self.lengths, self.path.k, backend="torch", **more)


@dataclasses.dataclass(frozen=True)
class Logits:
    """One call of the logits. `lengths` are taken in turn by the rows, or are ends of windows."""

    name: str
    rows: int
    lengths: tuple[int, ...]
    op: str = "paged"  # or "ragged" or "select"
    heads: int = 64
    next_n: int = 1
    dtype: str = "bfloat16"
    columns: int = 0  # of `out`; 0: as many as the longest row
    pad: int = 0  # bytes between pages
    offset: int = 0  # of `out`, in elements
    holes: bool = False  # pages that are none
    keys: int = 0  # of the table or the windows; 0: as many as the longest row
    kind: str = "normal"  # of queries and keys
    one_request: bool = False  # what the ragged logits are told, right or wrong


# One entry for each path: a change of the launch in csrc/bindings/logits.cu is a change here.
LOGITS = (
    Logits("paged, one page", 1, (64,)),
    Logits("paged, short rows", 8, (0, 1, 63, 64, 65, -1, 127, 129)),
    Logits("paged, 32 heads", 3, (200, 65, 500), heads=32),
    Logits("paged, one long row", 1, (40_000,)),
    Logits("paged, long and short rows", 9, (9000, 1, 300, 0, 4097)),
    Logits("paged, more rows than SMs", 140, (700, 64, 1)),
    Logits("paged, next_n 2", 6, (1000, 65), next_n=2),
    Logits("paged, next_n 4, 32 heads", 8, (129, 1000), next_n=4, heads=32),
    Logits("paged, next_n 6", 12, (700, 64, 63), next_n=6),
    Logits("paged, next_n 6, 32 heads", 12, (700, 64, 63), next_n=6, heads=32),
    Logits("paged, next_n 5, 32 heads, one request", 5, (900,), next_n=5, heads=32),
    Logits("paged, float32", 3, (700, 65, 64), dtype="float32"),
    Logits("paged, float16", 3, (700, 65, 64), dtype="float16"),
    Logits("paged, pages apart", 3, (700, 65, 64), pad=448),
    Logits("paged, pages that are none", 3, (700, 65, 640), holes=True),
    Logits("paged, narrow out", 3, (700, 65, 640), columns=333),
    Logits("paged, wide out", 3, (700, 65, 640), columns=1000),
    Logits("paged, lengths past the table", 3, (700, 65, 640), keys=320),
    Logits("paged, misaligned out", 4, (700, 65, 640, 3), offset=3, columns=701),
    Logits("paged, FP4", 9, (9000, 1, 300, 0, 4097), heads=32, kind="fp4", pad=64),
    Logits("paged, FP4, one long row", 1, (40_000,), heads=32, kind="fp4"),
    Logits("paged, FP4, next_n 2", 6, (1000, 65), heads=32, kind="fp4", next_n=2, holes=True),
    Logits("paged, FP4, next_n 3", 6, (1000, 65), heads=32, kind="fp4", next_n=3),
    Logits("paged, FP4, next_n 5, any scales", 10, (700, 64, 63), heads=32, kind="fp4 wide",
           next_n=5, pad=64),
    Logits("paged, FP4, many rows of a request", 75, (700, 64, 1, 0, 300), heads=32, kind="fp4",
           next_n=75),
    Logits("ragged", 70, (300, 1, 0, 64, 65, 129), op="ragged"),
    Logits("ragged, one row", 1, (5000,), op="ragged"),
    Logits("ragged, windows past the keys", 70, (300, 1, 0, 64, 65, 129), op="ragged", keys=64),
    Logits("ragged, more rows than SMs, 32 heads", 150, (65, 700), op="ragged", heads=32),
    Logits("ragged, larger tiles", 1408, (12_700, 64, 700, 1), op="ragged", heads=32),
    Logits("ragged, larger tiles, few rows", 70, (16_400, 700, 0, 64), op="ragged",
           one_request=True),
    Logits("ragged, most rows of a tile", 1280, (5120, 64, 0, 1, 700, 65, 64, 129), op="ragged",
           one_request=True),
    Logits("ragged, most rows of a tile, 32 heads", 1280, (5120, 64, 0, 1, 700, 65, 64, 129),
           op="ragged", heads=32, one_request=True),
    Logits("ragged, float32, misaligned", 5, (700, 64), op="ragged", dtype="float32", offset=1),
    Logits("select", 4, (3000, 513, 512, 0), op="select"),
    Logits("select, next_n 2, float32", 4, (3000, 600), op="select", next_n=2, dtype="float32"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chain:
    """A source layer and a consumer. `lengths` are taken in turn by the rows."""

    name: str
    rows: int
    lengths: tuple[int, ...]
    held: int = 40  # candidates
    k: int = 32
    block_size: int = 64
    heads: int = 32
    next_n: int = 1
    dtype: str = "bfloat16"
    garbage: bool = False  # candidates that are any int32
    kind: str = "normal"  # of queries and keys


# One entry for each path: a change of the launches in csrc is a change here.
CHAINS = (
    Chain("candidates, short rows", 8, (0, 1, 63, 64, 65, -1, 7, 9)),
    Chain("candidates, one long row", 1, (40_000,), held=2048, k=512),
    Chain("candidates, long and short rows", 9, (20_000, 1, 300, 0, 16_385), held=2048, k=512),
    Chain("candidates, more rows than SMs", 140, (700, 64, 1), held=33),
    Chain("candidates, pages of 32", 5, (1000, 65, 33, 31, 640), block_size=32),
    Chain("candidates, pages of 32, next_n 2, 64 heads", 6, (700, 65), block_size=32, next_n=2,
          heads=64),
    Chain("candidates, next_n 4, float32", 8, (129, 1000), next_n=4, dtype="float32", held=9, k=70),
    Chain("candidates, next_n 6", 12, (129, 1000), next_n=6),
    Chain("candidates, one row, float16", 1, (5000,), dtype="float16", held=601),
    Chain("candidates, any numbers", 6, (700, 65, 3000), garbage=True),
    Chain("candidates, FP4", 9, (20_000, 1, 300, 0, 16_385), held=2048, k=512, kind="fp4"),
    Chain("candidates, FP4, one row", 1, (40_000,), held=2048, k=512, kind="fp4"),
    Chain("candidates, FP4, next_n 6", 12, (1000, 65, 7), next_n=6, kind="fp4"),
    Chain("candidates, FP4, any numbers", 6, (700, 65, 3000), garbage=True, kind="fp4"),
)  # fmt: skip
CASES = (*PATHS, *LOGITS, *CHAINS)


class LogitsCall:
    """The tensors of a case: on the GPU the table of several requests has nothing past a length."""

    def __init__(self, path: Logits, plant: str = "") -> None:
        self.path = path
        ends = [path.lengths[i % len(path.lengths)] for i in range(path.rows)]
        most = max(max(ends), 1)
        self.columns = path.columns or most
        self.width = self.columns + 5
        self.case = logits_cases.paged(
            ends, path.next_n, path.heads, kind=path.kind, columns=path.keys or most, pad=path.pad,
            pages=200,
        )  # fmt: skip
        if path.holes:
            self.case.table[:, 1::3] = -1
            self.case.table[0, 2] = 1 << 30
        self.out = torch.full((path.rows, self.width), -77.0, dtype=SIZES[path.dtype])
        self.plant = plant

    def _cache(self) -> torch.Tensor:
        cache = self.case.cache
        arena = torch.empty(len(cache), cache.stride(0), dtype=torch.uint8, device="cuda")
        for page, content in enumerate(cache):  # what lies between pages is never written
            arena[page, : len(content)].copy_(content)
        return arena[:, : cache.shape[1]]

    def _table(self) -> torch.Tensor:
        table = self.case.table
        batch, width = table.shape
        flat = torch.empty(batch * width, dtype=torch.int32, device="cuda")
        if self.plant == "outside":  # the allocation ends before the table does
            self.held = table.view(-1)[: batch * width // 2].cuda()
            return beyond(self.held, batch * width).view(batch, width)
        longest = self.case.lengths.view(batch, -1).amax(1)
        longest.clamp_(0, min(self.columns, 64 * width))
        if batch == 1 and not self.plant:  # a single request's row is read ahead of its length
            longest[0] = 64 * width
        for b, n in enumerate(longest.tolist()):
            pages = -(-n // 64) - (self.plant == "uninitialised")
            if pages > 0:
                flat[b * width : b * width + pages].copy_(table[b, :pages])
        return flat.view(batch, width)

    def run(self) -> torch.Tensor:
        """Call the kernel twice, the second beginning while the first ends."""
        path, case = self.path, self.case
        wholes = [self.out.cuda() for _ in range(2)]
        outs = [whole[:, path.offset : path.offset + self.columns] for whole in wholes]
        q, weights, lengths = case.q.cuda(), case.weights.cuda(), case.lengths.cuda()
        if path.op == "ragged":
            k, scale = (x.cuda() for x in self._keys())
            starts = self._starts().cuda()
            for out in outs:
                ragged_logits(q[:, 0], k, scale, weights, starts, lengths, out=out, backend="cuda",
                              one_request=path.one_request)  # fmt: skip
        else:
            arguments = (q, self._cache(), weights, lengths, self._table())
            for i, out in enumerate(outs):
                if path.op == "select":
                    chosen = select(*arguments, 512, logits=out, backend="cuda").cpu()
                    logits = wholes[i].cpu()[:, path.offset : path.offset + self.columns]
                    want = topk(logits, case.lengths, 512, next_n=path.next_n, backend="torch")
                    if not torch.equal(chosen.sort(1).values, want.sort(1).values):
                        raise AssertionError(f"{path.name}: not the top-k of the logits")
                else:
                    paged_logits(*arguments, out=out, backend="cuda")
        results = [whole.cpu() for whole in wholes]
        if not torch.equal(*results):
            raise AssertionError(f"{path.name}: the second call differs from the first")
        return results[0]

    def _keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.case.cache
        pages = -(-(self.path.keys or max(self.path.lengths)) // 64)
        split = 64 * logits_cases.D
        scale = cache[:pages, split:].contiguous().view(torch.float32)
        return cache[:pages, :split].reshape(-1, logits_cases.D), scale.reshape(-1)

    def _starts(self) -> torch.Tensor:
        return torch.arange(self.path.rows, dtype=torch.int32) % 7

    def check(self, got: torch.Tensor) -> None:
        """Compare with float64, and what lies outside of the rows with what was there."""
        name = self.path.name
        part = slice(self.path.offset, self.path.offset + self.columns)
        tolerance = logits_cases.TOLERANCE["cuda", self.path.kind]
        for rows, score, size, n in self._oracle():
            logits_cases.check(got[rows, part], score, size, n, tolerance, name)
            logits_cases.untouched(got[rows, part], n, self.out[rows, part], name)
        got[:, part] = -77.0
        if not torch.equal(got, self.out):
            raise AssertionError(f"{name}: wrote outside of out")

    def _oracle(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows, their scores in float64, the scores' sizes, and how many of them count."""
        case = self.case
        if self.path.op != "ragged":
            score, size = logits_cases.oracle(case, columns=self.columns)
            yield slice(None), score, size, case.lengths
            return
        keys, starts = self._keys(), self._starts()
        for begin in range(0, self.path.rows, 64):  # of many rows at once it is gigabytes
            rows = slice(begin, begin + 64)
            yield (
                rows,
                *logits_cases.ragged_oracle(
                    case.q[rows, 0],
                    *keys,
                    case.weights[rows],
                    starts[rows],
                    case.lengths[rows],
                    self.columns,
                ),
            )


class ChainCall:
    """The tensors of a chain; what a row has no scores of is never written."""

    def __init__(self, path: Chain) -> None:
        self.path = path
        ends = [path.lengths[i % len(path.lengths)] for i in range(path.rows)]
        self.case = logits_cases.paged(
            ends, path.next_n, path.heads, kind=path.kind, pages=200, pad=64,
            block_size=path.block_size,
        )  # fmt: skip
        self.columns = self.case.table.shape[1] * path.block_size
        self.dtype = SIZES[path.dtype]

    def run(self) -> dict[str, torch.Tensor]:
        """Call the ops twice, each beginning while the one before ends."""
        first, second = self._once(), self._once()
        for name in first:
            if name == "visible" and self.path.garbage:
                continue  # some number in its range
            if not torch.equal(first[name], second[name]):
                raise AssertionError(f"{self.path.name}: the second {name} differs from the first")
        return first

    def _filled(self, columns: int, value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((self.path.rows, columns), value, dtype=dtype).cuda()

    def _once(self) -> dict[str, torch.Tensor]:
        path, case, rows = self.path, self.case, self.path.rows
        q, weights, n = case.q.cuda(), case.weights.cuda(), case.lengths.cuda()
        pages = (q, case.cache.cuda(), weights)
        table, more = case.table.cuda(), {"block_size": path.block_size, "backend": "cuda"}
        exact = self._filled(self.columns, -torch.inf, self.dtype)
        paged_logits(*pages, n, table, out=exact, **more)
        scored = self._filled(self.columns, -torch.inf, self.dtype)
        blocks = -(-self.columns // 8)
        found = torch.empty(rows, blocks, dtype=self.dtype, device="cuda")
        block_maxima(*pages, n, table, out=found, logits=scored, **more)
        chosen = self._filled(path.held, 7, torch.int32)
        counts = torch.zeros(rows, dtype=torch.int32).cuda()
        select_blocks(found, n, path.held, next_n=path.next_n, out=chosen, out_counts=counts,
                      backend="cuda")  # fmt: skip
        if path.garbage:
            g = torch.Generator().manual_seed(0)
            drawn = torch.randint(-(1 << 31), 1 << 31, (rows, path.held), generator=g)
            drawn[:, ::3] %= 99
            chosen = drawn.int().cuda()
        logits = torch.empty(rows, path.held * 8, dtype=self.dtype, device="cuda")
        visible = torch.zeros(rows, dtype=torch.int32).cuda()
        candidate_logits(*pages, chosen, n, table, out=logits, out_lengths=visible, **more)
        out, slots = (self._filled(path.k, -7, torch.int32) for _ in range(2))
        select_candidates(logits, chosen, n, path.k, next_n=path.next_n, out=out, out_slots=slots,
                          block_table=table, page_size=path.block_size, backend="cuda")  # fmt: skip
        again, places = (self._filled(path.k, -7, torch.int32) for _ in range(2))
        candidate_select(
            *pages, chosen, n, table, path.k, dtype=self.dtype, page_table=table,
            page_size=path.block_size, out=again, out_slots=places, **more,
        )  # fmt: skip
        if not (torch.equal(again, out) and torch.equal(places, slots)):
            raise AssertionError(f"{path.name}: the chain selects otherwise")
        held = -(-case.lengths.clamp(min=0) // 8)
        maxima = torch.full((rows, blocks), -torch.inf, dtype=self.dtype)
        for r, count in enumerate(held.tolist()):
            maxima[r, :count] = found[r, :count].cpu()
        some = {"exact": exact, "scored": scored, "chosen": chosen, "logits": logits,
                "visible": visible, "out": out, "slots": slots, "counts": counts}  # fmt: skip
        if path.kind == "normal":
            self._gathered(q.flatten(0, 1), weights, chosen, n)
        return {name: x.cpu() for name, x in some.items()} | {"maxima": maxima}

    def _gathered(
        self, q: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, n: torch.Tensor
    ) -> None:
        """Score candidates among gathered keys, which are FP8, and hold them against all keys."""
        path, case, rows = self.path, self.case, self.path.rows
        longest = max(1, int(case.lengths.max()))
        g = torch.Generator().manual_seed(1)
        keys = logits_cases.codes((longest, logits_cases.D), "normal", g).cuda()
        scale = torch.rand(longest, generator=g).cuda()
        starts = torch.zeros(rows, dtype=torch.int32).cuda()
        gathered = torch.empty(rows, path.held * 8, dtype=self.dtype, device="cuda")
        candidate_logits_ragged(q, keys, scale, weights, chosen, starts, n, out=gathered,
                                backend="cuda")  # fmt: skip
        dense = self._filled(longest, -torch.inf, self.dtype)
        ragged_logits(q, keys, scale, weights, starts, n, out=dense, backend="cuda")
        same = candidate_oracles.scores(dense.cpu(), chosen.cpu(), case.lengths)
        if not torch.equal(gathered.cpu(), same):
            raise AssertionError(f"{path.name}: other scores of gathered keys")

    def check(self, got: dict[str, torch.Tensor]) -> None:
        """Compare with stable sorts on the scores of `paged_logits`."""
        path, n = self.path, self.case.lengths
        maxima = candidate_oracles.maxima(got["exact"], n)
        want = {
            "scored": got["exact"],
            "maxima": maxima,
            "logits": candidate_oracles.scores(got["exact"], got["chosen"], n),
        }
        if not path.garbage:
            chosen = candidate_oracles.blocks(maxima, n, path.held)
            want |= {
                "chosen": chosen,
                "counts": (chosen >= 0).sum(1).int(),
                "visible": candidate_oracles.visible(chosen, n).int(),
                "out": candidate_oracles.selection(got["logits"], chosen, n, path.k),
            }
        for name, answer in want.items():
            if not torch.equal(got[name], answer):
                raise AssertionError(f"{path.name}: other {name}")
        if not bool(((got["visible"] >= 0) & (got["visible"] <= path.held * 8)).all()):
            raise AssertionError(f"{path.name}: more columns than there are")
        inside = (got["out"] >= -1) & (got["out"] < n.clamp(min=1)[:, None])
        if not bool(inside.all()):
            raise AssertionError(f"{path.name}: positions that the row does not see")


def beyond(held: torch.Tensor, count: int) -> torch.Tensor:
    """A tensor that says it has `count` elements on memory that has fewer."""
    words = {2: "<i2", 4: "<i4"}[held.dtype.itemsize]

    class Claim:
        __cuda_array_interface__ = {
            "shape": (count,), "typestr": words, "data": (held.data_ptr(), False), "version": 3,
        }  # fmt: skip

    return torch.as_tensor(Claim(), device="cuda").view(held.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[path.name for path in CASES])
    parser.add_argument("--plant", choices=("outside", "uninitialised"), default="")
    arguments = parser.parse_args()
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("sanitizer_driver: set PYTORCH_NO_CUDA_MEMORY_CACHING=1, else torch's allocator "
              "hides what lies around a tensor", file=sys.stderr)  # fmt: skip
        return 2
    some = [path for path in CASES if not arguments.only or path.name in arguments.only]
    for path in some:
        if isinstance(path, Chain):
            chain = ChainCall(path)
            chain.check(chain.run())
            print(f"exact: {path.name}", flush=True)
            continue
        if isinstance(path, Logits):
            scored = LogitsCall(path, arguments.plant)
            result = scored.run()
            if not arguments.plant:
                scored.check(result)
            print(f"exact: {path.name}", flush=True)
            continue
        call = Call(path, arguments.plant)
        got, want = call.run(), call.want()
        if not path.sort:
            got, want = got.sort(1).values, want.sort(1).values
        if not torch.equal(got, want) and not arguments.plant:
            raise AssertionError(f"{path.name}: not the reference's answer")
        print(f"exact: {path.name}", flush=True)
    print(f"{len(some)} cases done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
