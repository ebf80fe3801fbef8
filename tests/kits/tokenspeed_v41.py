"""DeepSeek-V4.1's index layers in TokenSpeed's own code: its backend's ``select_global``, on a CPU.

On a GPU the facade, the registry and the Hopper kernel are TokenSpeed's own. On a CPU the backend,
the facade, the registry and the Hopper kernel's Python around DeepGEMM and its selections run
unchanged. TokenSpeed's Triton kernels and its DeepSelect need a GPU, so torch replaces them. Each
replacement has the results that the kernel's documentation states, and raises if the kernel would
not take the call.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from kits.engine_parts import HEAD_DIM, KEY_BYTES, oracle
from kits.stand_ins import Empty

__all__ = ["BLOCKS", "HEADS", "LAYERS", "PIECE", "K", "OnGpu", "Step", "V41"]

PAGE, K, HEADS, PIECE, BLOCKS = 64, 512, 32, 8, 128
LAYERS = ("plain", "source", "consumer")
OP = "tokenspeed_kernel.ops.attention.dsv41"
RUNTIME = "tokenspeed.runtime.layers.attention"
BACKEND = f"{RUNTIME}.backends.specific.deepseek_v41"
# What the backend's module imports and a selection does not use: models, pools, processes.
UNUSED = (
    "tokenspeed.runtime.configs.model_config",
    "tokenspeed.runtime.distributed",
    "tokenspeed.runtime.utils.env",
    "tokenspeed.runtime.utils.server_args",
    f"{RUNTIME}.kv_cache.base",
    f"{RUNTIME}.kv_cache.deepseek_v41",
    f"{RUNTIME}.registry",
)


class OnGpu(torch.Tensor):
    """A tensor in the CPU's memory that reports a GPU as its device."""

    is_cuda = True


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its real device."""
    return tensor.as_subclass(torch.Tensor)


class V41:
    """The op of an engine of :mod:`kits.tokenspeed_engine`, and the backend that calls it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        if engine.device == "cpu":
            engine.pose(8)
        # By their sub-modules: their __init__ import every op.
        _bare("tokenspeed_kernel", "ops.attention.mla")
        self.facade: Any = importlib.import_module(OP)
        self.triton: Any = importlib.import_module(f"{OP}.triton")
        self.hopper: Any = importlib.import_module(f"{OP}.deep_gemm")
        self._backend: Any = None
        if engine.device == "cpu":
            engine.pose(9)
            self._stand_in()
        else:  # each variant is compiled by the first call that needs it
            self.hopper.row_select.warmup = lambda *args: None

    @property
    def backend(self) -> Any:
        """The module of the attention backend."""
        if self._backend is None:
            for name in UNUSED:
                sys.modules[name] = Empty(name)
            for name in ("backends", "backends.specific"):
                _bare("tokenspeed", f"runtime.layers.attention.{name}")
            self._backend = importlib.import_module(BACKEND)
        return self._backend

    def _stand_in(self) -> None:
        """Replace with torch the parts that need a GPU."""
        for name in (
            "quantize_index_queries", "safe_metadata", "clean_logits", "dense_ranges",
            "candidate_scores", "_finish_topk",
        ):  # fmt: skip
            function = globals()[name.lstrip("_")]
            assert hasattr(self.triton, name)
            setattr(self.triton, name, function)
            setattr(self.hopper, name, function)
        registry = self.engine.registry
        registry._impls["triton_dsv41_selection_table"] = selection_table
        registry._impls["triton_dsv41_global_slots"] = global_slots
        registry.clear_cache()
        self.hopper.platform = self.engine.platform.current_platform()
        self.hopper.row_select = types.SimpleNamespace(
            choose_cluster_size=lambda *args: 1,
            deepselect_topk=deepselect_topk,
            warmup=lambda *args: None,
        )
        self.hopper._warmup_hopper_indexer = lambda *args: None  # it compiles what is not there
        self.install_deep_gemm()

    def install_deep_gemm(self) -> None:
        """Put the stand-in for DeepGEMM where the Hopper kernel has its own."""
        maths, gemm = self.engine.maths, self.engine.deep_gemm

        def dense(
            q: Any, kv: Any, weights: Any, cu_seq_len_k_start: Any, cu_seq_len_k_end: Any,
            clean_logits: bool, max_seqlen_k: int,
        ) -> torch.Tensor:  # fmt: skip
            assert not clean_logits
            return maths._dense(
                (q,), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, max_seqlen_k, torch.float32
            )

        known = {n: getattr(gemm, n) for n in ("fp8_paged_mqa_logits", "get_pdl", "set_pdl",
                 "get_num_sms", "get_paged_mqa_logits_metadata")}  # fmt: skip
        self.hopper.deep_gemm = types.SimpleNamespace(**known, fp8_mqa_logits=dense)


def _bare(package: str, name: str) -> None:
    """Let the modules of a package be imported without its ``__init__``."""
    found = sys.modules.get(package) or importlib.import_module(package)
    module = types.ModuleType(f"{package}.{name}")
    module.__path__ = [str(Path(next(iter(found.__path__))).joinpath(*name.split(".")))]
    sys.modules.setdefault(module.__name__, module)


# --- torch in place of Triton ----------------------------------------------------------------


def quantize_index_queries(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = plain(q).float()
    scale = wide.abs().amax(dim=-1).clamp_min(1e-6) * (1 / 448)
    values = (wide / scale.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values, weights.float() * scale


def safe_metadata(table, lengths, pages, capacity, page_size):
    inside = (table >= 0) & (table < pages)
    room = min(capacity, table.shape[1] * page_size)
    return table.where(inside, 0).int().contiguous(), lengths.clamp(0, room).int()


def clean_logits(values, lengths, table, pages, capacity, page_size):
    assert values.dtype == torch.float32 and values.shape[1] >= capacity
    column = torch.arange(capacity)
    page = table[:, column // page_size]
    kept = (column < lengths[:, None]) & (page >= 0) & (page < pages)
    return values[:, :capacity].where(kept, -torch.inf)


def dense_ranges(lengths, capacity):
    ends = lengths.clamp(0, capacity).int()
    return torch.zeros_like(ends), ends


def candidate_scores(logits, candidates):
    row = (candidates[:, :, None] * PIECE + torch.arange(PIECE)).flatten(1)
    live = (candidates >= 0).repeat_interleave(PIECE, 1) & (row < logits.shape[1])
    return logits.gather(1, row.where(live, 0).long()).where(live, -torch.inf)


def finish_topk(scores, ids, output, lengths, candidates=None):
    for r, (best, of) in enumerate(zip(scores, ids, strict=True)):
        found = of[best > -torch.inf].long()
        if candidates is not None:
            found = candidates[r, found // PIECE] * PIECE + found % PIECE
        output[r] = -1
        output[r, : len(found)] = found.sort().values.int()
        lengths[r] = len(found)


def deepselect_topk(scores, ends, topk, *, capacity, cluster_size):
    assert scores.dtype == torch.float32 and scores.stride(0) % 4 == 0 and topk <= capacity
    values = torch.full((len(scores), topk), -torch.inf)
    indices = torch.full((len(scores), topk), -1, dtype=torch.int32)
    for r, n in enumerate(ends.tolist()):
        best = scores[r, : max(0, n)].topk(min(topk, max(0, n)))
        values[r, : len(best.values)] = best.values
        indices[r, : len(best.values)] = best.indices.int()
    return indices, values


def selection_table(positions, requests, table, ratio):
    pages = table[requests.clamp(0, len(table) - 1)]
    live = (requests >= 0)[:, None] & (pages > 0)
    return pages.where(live, -1).int(), ((positions + 1) // ratio).clamp_min(0).int()


def global_slots(rows, positions, requests, table, ratio, pages):
    page = table[requests.clamp_min(0)].gather(1, rows.clamp_min(0).long() // PAGE)
    return (page * PAGE + rows % PAGE).where((rows >= 0) & (page > 0), -1).int()


# --- one step of the three layers ------------------------------------------------------------


class Step:
    """Three layers over one step of requests, and their oracle.

    ``requests`` are (keys before, rows) of each request. A plain layer of ratio 2 has a cache of
    its own; the source and the consumer share one of ratio 1. Scores are sums of small integers:
    every implementation has the same bits, and many scores tie.
    """

    def __init__(
        self, v41: V41, requests: Any, prefill: bool = False, blocks: int = BLOCKS, pad: int = 192
    ) -> None:
        g = torch.Generator().manual_seed(5)
        self.v41, self.prefill, self.blocks, self.requests = v41, prefill, blocks, requests
        rows = [(r, p + i) for r, (p, n) in enumerate(requests) for i in range(n)]
        self.request = torch.tensor([r for r, _ in rows], dtype=torch.int64)
        self.position = torch.tensor([p for _, p in rows], dtype=torch.int64)
        longest = max(p + n for p, n in requests)
        self.table, self.cache = {}, {}
        for ratio in (1, 2):
            width = -(-max(1, longest // ratio) // PAGE) + 1
            pages = 1 + len(requests) * width
            order = 1 + torch.randperm(pages - 1, generator=g)
            self.table[ratio] = order.view(len(requests), width).int()
            content = torch.full((pages, PAGE * KEY_BYTES + pad), 0xFF, dtype=torch.uint8)
            keys = torch.randint(-1, 3, (pages, PAGE * HEAD_DIM), generator=g).float()
            content[:, : PAGE * HEAD_DIM] = keys.to(torch.float8_e4m3fn).view(torch.uint8)
            scale = torch.randint(0, 2, (pages, PAGE), generator=g).float().add(1).div(2)
            content[:, PAGE * HEAD_DIM : PAGE * KEY_BYTES] = scale.view(torch.uint8)
            shape = (pages, PAGE, KEY_BYTES)
            self.cache[ratio] = content.as_strided(shape, (content.stride(0), KEY_BYTES, 1))
        # A largest value of 7 makes every query's scale a power of two.
        self.q, self.weights = [], []
        for _ in LAYERS:
            q = torch.randint(0, 2, (len(rows), HEADS, HEAD_DIM), generator=g)
            q[:, :, 0] = 7
            self.q.append(q.bfloat16().as_subclass(OnGpu))
            self.weights.append(torch.randint(-2, 3, (len(rows), HEADS), generator=g).bfloat16())
        self._scores: dict[str, list[torch.Tensor]] = {}
        self.ratio = dict(zip(LAYERS, (2, 1, 1), strict=True))

    def run(self) -> dict[str, torch.Tensor]:
        """Run the layers in turn; returns rows and lengths of each, and the candidates."""
        module = self.v41.backend
        groups = {1: module.V41_GLOBAL_R1_GROUP_ID, 2: module.V41_GLOBAL_R2_GROUP_ID}
        b = object.__new__(module.DeepseekV41AttentionBackend)
        b.spec = types.SimpleNamespace(
            max_query_tokens=1 << 20, kv_owners=(0, 1, 1), index_sources=(0, 1, 2),
            compress_ratios=(2, 1, 1), candidate_source=1, index_topk=K,
            candidate_topk=self.blocks, candidate_block_size=PIECE,
        )  # fmt: skip
        b.context_len, b.device = 1 << 20, torch.device("cpu")
        b.cache_pool = types.SimpleNamespace(
            index_k=lambda owner: self.cache[b.spec.compress_ratios[owner]],
            arena=types.SimpleNamespace(
                cache_group_page_counts={groups[r]: len(c) for r, c in self.cache.items()}
            ),
        )
        base = importlib.import_module(f"{RUNTIME}.backends.base")
        b._sparse_topk = base.SparseTopKShare()
        fields = dict.fromkeys(module.V41Metadata.__dataclass_fields__)
        fields |= {
            "block_tables": {groups[r]: t for r, t in self.table.items()},
            "positions": self.position, "request_indices": self.request,
        }  # fmt: skip
        metadata = module.V41Metadata(**fields)
        b.forward_prefill_metadata = b.forward_decode_metadata = b._decoder_view = None
        if self.prefill:
            b.forward_prefill_metadata, mode = metadata, module.ForwardMode.EXTEND
            spans, at = [], 0
            for r, (prefix, count) in enumerate(self.requests):
                spans.append(module.V41PrefillSpan(r, at, prefix, count, 0))
                at += count
            b._prefill_spans = tuple(spans)
        else:
            b.forward_decode_metadata, mode = metadata, module.ForwardMode.DECODE
        found = {}
        for at, layer in enumerate(LAYERS):
            _, lengths = b.select_global(
                at, self.q[at], self.weights[at], self.position, self.request, mode, None
            )
            record = b.sparse_topk.prefill if self.prefill else b.sparse_topk.decode
            found[layer], found[f"{layer} lengths"] = record.logical_rows, lengths
            if layer == "source":
                found["blocks"] = record.candidates.block_ids
                found["block lengths"] = record.candidates.lengths
        return found

    def scores(self, layer: str) -> list[torch.Tensor]:
        """Return the scores of every row's keys, exact in float32."""
        if layer not in self._scores:
            self._scores[layer] = self._score(layer)
        return self._scores[layer]

    def _score(self, layer: str) -> list[torch.Tensor]:
        ratio, at, found = self.ratio[layer], LAYERS.index(layer), []
        for row, (r, p) in enumerate(zip(self.request, self.position, strict=True)):
            n = (int(p) + 1) // ratio
            pages = self.cache[ratio][self.table[ratio][r].long()].flatten(1)
            values = pages[:, : PAGE * HEAD_DIM].reshape(-1, HEAD_DIM)[:n]
            scale = pages[:, PAGE * HEAD_DIM :].contiguous().view(torch.float32).flatten()[:n]
            keys = values.view(torch.float8_e4m3fn).float()
            dots = torch.relu(plain(self.q[at][row]).float() @ keys.T)
            found.append(self.weights[at][row].float() @ dots * scale)
        return found

    def expected(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return what :meth:`run` has to give, by stable sorts."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in (*LAYERS, "blocks")}
        width = min(self.blocks, self._columns() // PIECE)
        for row in zip(*map(self.scores, LAYERS), strict=True):
            scores = {layer: s.to(dtype) for layer, s in zip(LAYERS, row, strict=True)}
            for layer in ("plain", "source"):
                found[layer].append(oracle(scores[layer], K))
            mine = scores["source"].float()
            best = torch.nn.functional.pad(mine, (0, -len(mine) % PIECE), value=-torch.inf)
            best = best.view(-1, PIECE).amax(dim=1)
            best[-1:] = torch.inf
            blocks = oracle(best, width)
            found["blocks"].append(blocks)
            kept = blocks[blocks >= 0].long()
            keys = (kept[:, None] * PIECE + torch.arange(PIECE)).flatten()
            keys = keys[keys < len(mine)]
            columns = oracle(scores["consumer"][keys], K)
            chosen = torch.full_like(columns, -1)
            chosen[columns >= 0] = keys[columns[columns >= 0].long()].int()
            found["consumer"].append(chosen)
        whole = {name: torch.stack(rows) for name, rows in found.items()}
        for name in LAYERS:
            whole[f"{name} lengths"] = (whole[name] >= 0).sum(1).int()
        whole["block lengths"] = (whole["blocks"] >= 0).sum(1).int()
        return whole

    def _columns(self) -> int:
        """Return the keys that the source's page table has room for, as the backend cuts it."""
        pages = self.table[1].shape[1]
        if self.prefill:
            pages = min(pages, max(1, -(-max(p + n for p, n in self.requests) // PAGE)))
        return min(pages, len(self.cache[1]) - 1) * PAGE
