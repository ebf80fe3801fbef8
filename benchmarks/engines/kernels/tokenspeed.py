"""The calls of TokenSpeed: the registered kernels, the gather by slot, and the cache readers."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kits.engine_tensors import ARENA, PAGE, Decode, Prefill, in_row, key_values, plane
from kits.inputs import mxfp4_cache, slot_list
from kits.oracles import fp8_keys, mxfp4_keys

from benchmarks.engines.choices import TOKENSPEED_CALLS
from benchmarks.engines.kernels.cells import (
    Run,
    Scores,
    Task,
    backend_for,
    named,
    recall,
    shapes_of,
)
from dsv4_plugin.cli.bench.cells import DIRTY, Row
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.tokenspeed import kernels, readers

__all__ = ["cells", "has_deep_gemm"]

# Below 65,536 columns TokenSpeed's Triton top-k is unrolled over them (to the next power of two).
# On an H100's host the compiler took 25 s for 8,192 and had not finished 16,384 after 58 s. From
# 65,536 on there are other kernels, which all compiled in 10 s.
DECODE = ((1, 8192), (1, 65_536), (8, 65_536), (8, 8192), (32, 65_536))
PREFILL = ((512, 8192), (512, 65_536))
READ = ((1024, 4096), (14_338, 16_384))  # tokens, pages
SHAPES = dict(zip(TOKENSPEED_CALLS, (*[DECODE] * 3, PREFILL, *[READ] * 3), strict=True))
SCALE = 0.1


def has_deep_gemm() -> bool:
    """Whether DeepGEMM can be imported, so that it can write the logits."""
    return "deep_gemm" in sys.modules or importlib.util.find_spec("deep_gemm") is not None


def cells(
    device: str, peers: Peers, ks: Sequence[int], rows: Sequence[int], columns: Sequence[int]
) -> Iterator[Task]:
    """Give all cells."""
    for call, shapes in SHAPES.items():
        reads = call in ("gather", "read_fp8", "read_mxfp4")
        for r, c in shapes_of(shapes, rows, columns):
            for k in (None,) if reads else ks:
                about = {"suite": "tokenspeed", "call": call, "k": k, "rows": r, "columns": c}
                make = _read if reads else _prefill if call == "dsa_prefill" else _decode
                yield Task(about, functools.partial(make, about, device, peers))


@dataclasses.dataclass
class _Selection:
    """The outputs of a run, and the columns of a row that they mean."""

    out: torch.Tensor
    lens: torch.Tensor | None
    local: Callable[[torch.Tensor], torch.Tensor]

    def soil(self) -> None:
        self.out.fill_(DIRTY)
        if self.lens is not None:
            self.lens.fill_(DIRTY)


def _choices(device: str, dtypes: Sequence[str] = ("bf16", "fp32")) -> list[Selection]:
    """Return the plugin's runs: each dtype, on DeepGEMM's scores if it is there, and on its own."""
    who = ("engine", "plugin") if has_deep_gemm() else ("plugin",)
    backend = backend_for(device)
    return [Selection(d, backend, d == "bf16" and w == "engine", w) for w in who for d in dtypes]


def _runs(
    about: Row,
    device: str,
    peers: dict[str, Any],
    make: Callable[[Any, _Selection], Callable[[], Any]],
    selection: Callable[[], _Selection],
    truth: tuple[list[torch.Tensor], list[int]],
    lengths: torch.Tensor,
) -> list[Run]:
    """Return the runs of the plugin and of the peers for a call that scores and selects."""
    runs = []

    def judged(held: _Selection, scores: Scores | None) -> Row:
        local = held.local(held.out)
        row: Row = {} if scores is None else scores.judge(local)
        if held.lens is not None and not torch.equal(held.lens, lengths.clamp(0, about["k"])):
            row |= {"exact": False, "why": "the numbers of valid indices are wrong"}
        return row | recall(*truth, local)

    for topk in _choices(device):
        held, scores = selection(), Scores()
        call = scores.watching(make(topk, held))
        judge = functools.partial(judged, held, scores)
        runs.append(Run(named(topk), call, held.soil, judge, plugin=True))
    for name, peer in peers.items():
        held = selection()
        runs.append(Run(name, make(peer, held), held.soil, functools.partial(judged, held, None)))
    return runs


def _decode(about: Row, device: str, peers: Peers) -> list[Run]:
    call, k, rows, columns = (about[name] for name in ("call", "k", "rows", "columns"))
    t = Decode.make(rows, columns, device)
    q8 = t.q.to(torch.float8_e4m3fn)
    fp8 = call == "dsv4_decode"
    slots = call == "dsa_decode_slots"

    def selection() -> _Selection:
        out = torch.empty(rows, k, dtype=torch.int32, device=device)
        lens = None if fp8 else torch.empty(rows, dtype=torch.int32, device=device)
        return _Selection(out, lens, (lambda out: in_row(out, t.table)) if slots else _same)

    def make(which: Any, held: _Selection) -> Callable[[], Any]:
        if fp8:
            dsv4 = functools.partial(kernels.dsv4_decode, which)
            return functools.partial(
                dsv4 if isinstance(which, Selection) else which, (q8, q8[:0]),
                t.weights.contiguous(), t.cache, t.lengths.unsqueeze(1), t.table, page_size=PAGE,
                topk=k, max_context_len=t.table.shape[1] * PAGE, plan=None, out=held.out,
            )  # fmt: skip
        dsa = functools.partial(kernels.dsa_decode, which)
        return functools.partial(
            dsa if isinstance(which, Selection) else which, t.q, t.weights, t.lengths, t.table,
            page_size=PAGE, topk=k, softmax_scale=SCALE, index_k_cache=t.cache,
            topk_layout="global_slots" if slots else "logical_offsets", out=held.out,
            lens_out=held.lens,
        )  # fmt: skip

    truth = t.truth(q8.float() if fp8 else None)
    by_engine = peers["tokenspeed_dsv4_decode" if fp8 else "tokenspeed_decode"]
    return _runs(about, device, by_engine, make, selection, truth, t.lengths)


def _same(out: torch.Tensor) -> torch.Tensor:
    return out


def _prefill(about: Row, device: str, peers: Peers) -> list[Run]:
    k, rows, columns = about["k"], about["rows"], about["columns"]
    t = Prefill.make(rows, columns, device)

    def local(out: torch.Tensor) -> torch.Tensor:
        return torch.where(out < 0, out, out - t.starts[:, None])

    def selection() -> _Selection:
        out = torch.empty(rows, k, dtype=torch.int32, device=device)
        return _Selection(out, torch.empty(rows, dtype=torch.int32, device=device), local)

    def make(which: Any, held: _Selection) -> Callable[[], Any]:
        plugin = functools.partial(kernels.dsa_prefill, which)
        return functools.partial(
            plugin if isinstance(which, Selection) else which, t.q, t.weights, t.slots, t.starts,
            t.ends, topk=k, softmax_scale=SCALE, index_k_cache=t.cache, page_size=PAGE,
            out=held.out, lens_out=held.lens,
        )  # fmt: skip

    lengths = t.ends - t.starts
    by_engine = peers["tokenspeed_prefill"]
    return _runs(about, device, by_engine, make, selection, t.truth(), lengths)


def _read(about: Row, device: str, peers: Peers) -> list[Run]:
    call, tokens, pages = about["call"], about["rows"], about["columns"]
    fp4 = call == "read_mxfp4"
    cache = mxfp4_cache(pages, device=device) if fp4 else plane(pages, ARENA, device)
    padding = 0.0 if call == "gather" else 0.1
    slots = slot_list(tokens, pages * PAGE, padding=padding).to(device)
    keep = slots >= 0
    page, at = slots.clamp_min(0) // PAGE, slots.clamp_min(0) % PAGE
    want: tuple[torch.Tensor, ...]
    if call == "gather":
        codes, scale, _ = fp8_keys(cache, page, at, PAGE, 128)
        want = codes.to(torch.uint8), scale
    else:
        dequantised = (
            mxfp4_keys(cache, page, at, PAGE, 128) if fp4 else key_values(cache, slots.clamp_min(0))
        )
        want = (torch.where(keep[:, None], dequantised, 0.0),)
    runs = []

    def add(name: str, function: Callable[[], Any], graph: bool, plugin: bool) -> None:
        held: list[Any] = []

        def call_() -> None:
            held[:] = [function()]

        def judge() -> Row:
            got = held[0] if isinstance(held[0], tuple) else held
            parts = [g.view(torch.uint8) if g.itemsize == 1 else g for g in got]
            same = all(torch.equal(g.reshape(w.shape), w) for g, w in zip(parts, want, strict=True))
            return {"exact": same, **({} if same else {"why": "not the bits of the reference"})}

        runs.append(Run(name, call_, held.clear, judge, graph=graph, plugin=plugin))

    backend = backend_for(device)
    if call == "gather":
        add("dsv4", lambda: kernels.gather_slots(cache, slots, PAGE), True, True)
    else:
        read = readers._READ["read.mxfp4" if fp4 else "read.fp8"]
        for which in ("triton", "torch") if device == "cuda" else (backend,):
            one = functools.partial(read, cache, slots, block_size=PAGE, backend=which)
            add(f"dsv4 {which}", one, True, True)
    form = {"gather": "tokenspeed_gather", "read_fp8": "tokenspeed_read"}.get(call)
    for name, peer in peers[form].items() if form else ():
        add(name, functools.partial(peer, cache, slots, PAGE), call == "gather", False)
    return runs
