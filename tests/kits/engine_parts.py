"""Shared by the kits that run an engine on a CPU: an oracle, and torch in place of DeepGEMM.

A replacement takes exactly what the real kernel takes, or it raises. Columns that a kernel would
not write hold NaN, so a wrong read of them becomes visible.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = [
    "HEAD_DIM",
    "KEY_BYTES",
    "Call",
    "DeepGemm",
    "DeepGemmModule",
    "oracle",
    "read_keys",
    "record_plugin_logits",
    "spans_of",
    "upstream_rows",
    "without_plugin_logits",
]

HEAD_DIM = 128
KEY_BYTES = HEAD_DIM + 4


def oracle(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return the top-k of one row by the contract: exact, lowest index among equals.

    Sorted columns, int32, padded with -1. A stable sort and nothing else, on purpose: it shares no
    code with what it judges.
    """
    order = torch.sort(scores.to(torch.float64), descending=True, stable=True).indices
    out = torch.full((k,), -1, dtype=torch.int32)
    chosen = order[:k].sort().values
    out[: chosen.numel()] = chosen.to(torch.int32)
    return out


def canonical(indices: torch.Tensor) -> torch.Tensor:
    """Sort every row's indices, with -1 last: the order is unspecified."""
    last = torch.iinfo(torch.int32).max
    ordered = indices.masked_fill(indices < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def make_cache(pages: int, *, page_size: int = 64, pad: int = 0, seed: int = 0) -> torch.Tensor:
    """Make a page-planar FP8 indexer cache ``[pages, page_size · 132]`` of plausible keys.

    With ``pad`` it is a strided view: pages that are ``pad`` bytes longer, as in an arena.
    """
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(pages, page_size * HEAD_DIM, generator=g).to(torch.float8_e4m3fn)
    scales = torch.rand(pages, page_size, generator=g) + 0.5
    content = torch.cat((keys.view(torch.uint8), scales.view(torch.uint8)), dim=1)
    arena = torch.full((pages, content.shape[1] + pad), 0xFF, dtype=torch.uint8)
    arena[:, : content.shape[1]] = content
    return arena[:, : content.shape[1]]


@dataclasses.dataclass
class Call:
    """One call of a replacement: its name, and the facts about its arguments that tests need."""

    name: str
    dtype: torch.dtype | None = None
    rows: int = 0
    logits: torch.Tensor | None = None
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    by_plugin: bool = False  # logits by this package, not by an engine's stand-in


def record_plugin_logits(calls: list[Call]) -> None:
    """Let the logits ops of this package note their results too, as DeepGEMM's stand-in does."""
    from dsv4_plugin.ops import logits

    paged = getattr(logits.paged_logits, "__wrapped__", logits.paged_logits)
    ragged = getattr(logits.ragged_logits, "__wrapped__", logits.ragged_logits)

    @functools.wraps(paged)
    def paged_logits(q: Any, cache: Any, weights: Any, lengths: Any, *args: Any, **kwargs: Any):
        out = paged(q, cache, weights, lengths, *args, **kwargs)
        spans = [(0, min(n, out.shape[1])) for _, n in spans_of(lengths, out.shape[0])]
        calls.append(
            Call("paged_logits", out.dtype, out.shape[0], out.clone(), spans, by_plugin=True)
        )
        return out

    @functools.wraps(ragged)
    def ragged_logits(q, k, k_scale, weights, row_starts, row_ends, **kwargs):
        out = ragged(q, k, k_scale, weights, row_starts, row_ends, **kwargs)
        windows = zip(row_starts.tolist(), row_ends.tolist(), strict=True)
        spans = [(0, max(0, end - begin)) for begin, end in windows]
        calls.append(
            Call("dense_logits", out.dtype, out.shape[0], out.clone(), spans, by_plugin=True)
        )
        return out

    logits.paged_logits, logits.ragged_logits = paged_logits, ragged_logits


def without_plugin_logits(unmet: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Return a ``backends.unmet`` to which our logits kernels are not there, though all else is."""
    missing = ["the library is not there"]

    def without(call: Any, backend: str) -> list[str]:
        return missing if call.op.endswith("logits") else unmet(call, backend)

    return without


def upstream_rows(
    logits: torch.Tensor, spans: Sequence[tuple[int, int]], out: torch.Tensor, k: int
) -> None:
    """Select as an engine's float32 kernel does: the largest, with ties in no defined order."""
    if logits.dtype != torch.float32:
        raise TypeError(f"the engines' top-k kernels read float32 logits, got {logits.dtype}")
    for row, (start, end) in enumerate(spans):
        count = max(0, end - start)
        out[row] = -1
        if count:
            best = logits[row, start:end].topk(min(k, count)).indices
            out[row, : best.numel()] = best.to(torch.int32)


def spans_of(lengths: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """Return the columns of each row, from lengths of one a row or one a request."""
    flat = [int(n) for n in lengths.reshape(-1)]
    if len(flat) != rows:  # one a request: row j of next_n sees that many columns fewer
        next_n = rows // len(flat)
        flat = [max(0, n - next_n + 1 + j) for n in flat for j in range(next_n)]
    return [(0, n) for n in flat]


def read_keys(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return ``[tokens, 132]`` bytes: the e4m3 values of each key, then its scale."""
    block = cache.shape[1]
    parts = []
    for page in pages[: (tokens + block - 1) // block].tolist():
        flat = cache[page].reshape(-1)
        values = flat[: block * HEAD_DIM].view(block, HEAD_DIM)
        parts.append(torch.cat((values, flat[block * HEAD_DIM :].view(block, 4)), dim=1))
    return torch.cat(parts)[:tokens] if parts else cache.new_empty(0, KEY_BYTES)


def score(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Score one query ``[heads, 128]`` against ``[tokens, 132]`` bytes of keys, in float32."""
    values = keys[:, :HEAD_DIM].contiguous().view(torch.float8_e4m3fn).float()
    scale = keys[:, HEAD_DIM:].contiguous().view(torch.float32).reshape(-1)
    return weights.float() @ torch.relu(query.float() @ values.T) * scale


class DeepGemm:
    """The two logits functions, with the signature of the release at hand.

    ``native`` is a dtype that they always write (bfloat16 on SM100 from 0.33).
    """

    def __init__(self, calls: list[Call], has_logits_dtype: bool) -> None:
        self.calls = calls
        self.native: torch.dtype | None = None
        self.fail_on_bf16 = False
        if has_logits_dtype:

            def paged(
                q, kv_cache, weights, lens, table, schedule, width,
                clean_logits=False, logits_dtype=torch.float32, indices=None,
            ):  # fmt: skip
                return self._paged(q, kv_cache, weights, lens, table, width, logits_dtype)

            def dense(
                q, kv, weights, ks, ke, clean_logits=True, max_seqlen_k=0,
                logits_dtype=torch.float32,
            ):  # fmt: skip
                return self._dense(q, kv, weights, ks, ke, max_seqlen_k, logits_dtype)

        else:

            def paged(  # type: ignore[misc]
                q, kv_cache, weights, lens, table, schedule, width, indices=None
            ):
                return self._paged(q, kv_cache, weights, lens, table, width, torch.float32)

            def dense(q, kv, weights, ks, ke, max_seqlen_k):  # type: ignore[misc]
                return self._dense(q, kv, weights, ks, ke, max_seqlen_k, torch.float32)

        self.paged, self.dense = paged, dense

    def _new(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bfloat16 and self.fail_on_bf16:
            raise RuntimeError("a DeepGEMM that cannot compile its bfloat16 kernel")
        dtype = self.native or dtype
        align = 1024 // dtype.itemsize  # rows start at multiples of 1024 bytes
        padded = (width + align - 1) // align * align
        return torch.full((rows, padded), float("nan"), dtype=dtype)[:, :width]

    def _record(self, name: str, out: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
        self.calls.append(Call(name, out.dtype, out.shape[0], out.clone(), spans))
        return out

    def _paged(self, q, kv_cache, weights, lens, table, width, dtype):
        query, batch, next_n = q[0], q[0].shape[0], q[0].shape[1]
        out = self._new(batch * next_n, width, dtype)
        spans = spans_of(lens, out.shape[0])
        for b in range(batch):
            keys = read_keys(kv_cache.squeeze(-2), table[b], int(lens[b].max()))
            for j in range(next_n):
                row = b * next_n + j
                n = spans[row][1]
                if n:
                    out[row, :n] = score(query[b, j], keys[:n], weights[row]).to(out.dtype)
        return self._record("paged_logits", out, spans)

    def _dense(self, q, kv, weights, ks, ke, max_seqlen_k, dtype):
        query = q[0]
        scales = kv[1].reshape(-1, 1).contiguous().view(torch.uint8)
        keys = torch.cat((kv[0].view(torch.uint8), scales), dim=1)
        out, spans = self._new(query.shape[0], max_seqlen_k or keys.shape[0], dtype), []
        for row, (begin, end) in enumerate(zip(ks.tolist(), ke.tolist(), strict=True)):
            shift = begin if max_seqlen_k else 0  # the later form starts every row at column 0
            span = (begin - shift, end - shift)
            out[row, span[0] : span[1]] = score(query[row], keys[begin:end], weights[row])
            spans.append(span)
        return self._record("dense_logits", out, spans)


class DeepGemmModule(types.ModuleType):
    """A ``deep_gemm`` with the functions the engines call, and those the adapters ask."""

    def __init__(self, maths: DeepGemm, has_logits_dtype: bool) -> None:
        super().__init__("deep_gemm")
        self.__spec__ = importlib.machinery.ModuleSpec("deep_gemm", None)
        self.__file__ = "<stand-in>"

        def paged(q, kv_cache, weights, lens, table, schedule, width, clean_logits=False):
            if clean_logits or q.dtype != torch.float8_e4m3fn:
                raise TypeError("expected e4m3 queries and clean_logits False")
            return maths._paged((q,), kv_cache, weights, lens, table, width, torch.float32)

        def dense(q, kv, weights, ks, ke, clean_logits=True, max_seqlen_k=0):
            return maths._dense((q,), kv, weights, ks, ke, max_seqlen_k, torch.float32)

        # Not plain references: the hook registry rewrites every module global that is a target.
        self.fp8_paged_mqa_logits = paged
        self.fp8_mqa_logits = dense
        self.get_num_sms = lambda: 132
        self.get_pdl = lambda: True
        self.set_pdl = lambda value: None
        self.get_paged_mqa_logits_metadata = lambda lens, page, sms, indices=None: torch.zeros(
            sms + 1, 2, dtype=torch.int32
        )
        if has_logits_dtype:
            self.fp8_fp4_paged_mqa_logits = maths.paged
            self.fp8_fp4_mqa_logits = maths.dense
