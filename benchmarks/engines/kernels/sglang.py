"""The calls of SGLang: pool slots by the fused page table, with raw indices, prefill, and DSA."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from kits.engine_tensors import PAGE, deep_gemm_buffer, in_row, page_table
from kits.inputs import poison_tail

from benchmarks.engines.choices import SGLANG_CALLS
from benchmarks.engines.kernels.cells import Run, Task, backend_for, named, shapes_of, verdict
from dsv4_plugin.cli.bench.cells import DIRTY, Row
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.cli.checks.topk_cases import Problem
from dsv4_plugin.engines.sglang import wrappers
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import Selection

__all__ = ["cells"]

SHAPES = ((1, 8192), (1, 65_536), (8, 65_536), (32, 16_384), (32, 65_536), (8, 256_000))
PREFILL = ((2048, 8192), (2048, 32_768))
Out = list[torch.Tensor]  # of one: some calls allocate what they return
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cells(
    device: str, peers: Peers, ks: Sequence[int], rows: Sequence[int], columns: Sequence[int]
) -> Iterator[Task]:
    """Give all cells."""
    for call in SGLANG_CALLS:
        for r, c in shapes_of(PREFILL if call == "prefill" else SHAPES, rows, columns):
            for k in ks:
                about = {"suite": "sglang", "call": call, "k": k, "rows": r, "columns": c}
                yield Task(about, functools.partial(_runs, about, device, peers))


def _runs(about: Row, device: str, peers: Peers) -> list[Run]:
    call, k, rows, columns = (about[name] for name in ("call", "k", "rows", "columns"))
    lengths = torch.full((rows,), columns, dtype=torch.int32, device=device)
    table = page_table(1 if call == "prefill" else rows, columns, device)
    if call == "prefill":  # the queries of one request: one table, causal lengths
        lengths += torch.arange(1 - rows, 1, dtype=torch.int32, device=device)
        lengths.clamp_(min=0)
        table = table.expand(rows, -1)
    table = table.contiguous()
    made = scores("normal", rows, columns, torch.float32, device=device)
    logits = {name: deep_gemm_buffer(rows, columns, DTYPES[name], device) for name in DTYPES}
    for buffer in logits.values():
        buffer.copy_(made)
        poison_tail(buffer, lengths)
    del made
    problems = {name: Problem(logits[name], lengths) for name in DTYPES}
    # Each run has its own outputs: the pool slots, and the raw indices where the call has them.
    runs = []

    def add(name: str, dtype: str, make: Any, plugin: bool) -> None:
        out = [torch.full((rows, k), DIRTY, dtype=torch.int32, device=device)]
        raw = torch.full_like(out[0], DIRTY) if call == "paged_raw" else None

        def soil() -> None:
            out[0].fill_(DIRTY)
            if raw is not None:
                raw.fill_(DIRTY)

        def judge() -> Row:
            local = in_row(out[0], table)
            row = verdict(problems[dtype], local, ties=plugin)
            if raw is not None and not torch.equal(raw, local):
                row |= {"exact": False, "why": "slots and raw indices differ"}
            return row

        runs.append(Run(name, make(logits[dtype], out, raw), soil, judge, plugin=plugin))

    def v4(topk: Selection, scores: torch.Tensor, out: Out, raw: torch.Tensor | None) -> Any:
        metadata = torch.zeros(rows + 1, 2, dtype=torch.int32, device=device)

        def run() -> None:
            scope = adapter.current().call
            before = scope.kind, scope.selection
            scope.kind, scope.selection = "v4", topk  # as the hook of forward_c4_indexer sets it
            try:
                wrappers.topk_v2(_none, scores, lengths, table, out[0], PAGE, metadata, raw)
            finally:
                scope.kind, scope.selection = before

        return run

    def dsa(topk: Selection, scores: torch.Tensor, out: Out, raw: None) -> Any:
        metadata = types.SimpleNamespace(real_page_table=table, page_size=PAGE)
        paged = types.SimpleNamespace(name="PAGED")

        def run() -> None:
            with (
                mock.patch.object(wrappers, "_fused", lambda: True),
                mock.patch.object(adapter.Adapter, "intact", lambda self, name: True),
                mock.patch.object(wrappers.policy, "for_dsa", lambda *a: topk),
            ):
                out[0] = wrappers.topk_dsa(_none, None, scores, lengths, k, paged, metadata)

        return run

    backend = backend_for(device)
    for name in ("fp32",) if call == "dsa" else ("bf16", "fp32"):
        topk = Selection(name, backend)
        add(named(topk), name, functools.partial(dsa if call == "dsa" else v4, topk), True)

    def by_engine(peer: Any, scores: torch.Tensor, out: Out, raw: Any) -> Any:
        return lambda: peer(scores, lengths, table, out[0], PAGE, raw)

    for name, peer in peers["sglang_paged"].items():
        add(name, "fp32", functools.partial(by_engine, peer), False)
    return runs


def _none(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("SGLang's own kernel was called")
