"""A step's metadata by vLLM's own builder, of requests that a test schedules, on a CPU.

``DeepseekV32IndexerMetadataBuilder.build`` runs: it tells decode rows from prefill rows, plans the
chunks and makes their metadata. Its Triton kernels are replaced by the same formulas in torch.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Sequence
from typing import Any

import torch
from kits.engine_parts import HEAD_DIM, KEY_BYTES, make_cache
from kits.vllm_engine import Engine, Problem

__all__ = ["Planner", "World"]

PLANNER = "vllm.v1.attention.backends.mla.indexer"
BLOCK = 64


class _ChunkKernel:
    """In place of vLLM's kernel that writes where the rows of a chunk begin and end."""

    def __getitem__(self, grid: Any) -> _ChunkKernel:
        return self

    def __call__(
        self, starts, tokens, cu, row_starts, owner, ks, ke, begin, end, *rest: Any, **more: Any
    ) -> None:
        ratio = more["COMPRESS_RATIO"]
        rows = torch.arange(begin, end)
        of = torch.searchsorted(starts, rows, right=True) - 1
        first = tokens[of] - (starts[of + 1] - starts[of])
        ks.copy_(row_starts[of])
        ke.copy_(row_starts[of] + (first + rows - starts[of] + 1) // ratio)


class Planner:
    """vLLM's builder for an indexer whose keys are of ``ratio`` tokens each."""

    def __init__(self, ratio: int = 1, rows: int = 4096) -> None:
        module: Any = importlib.import_module(PLANNER)
        for name in (
            "_build_prefill_chunk_metadata_kernel",
            "_BUILD_PREFILL_CHUNK_METADATA_KERNEL",
        ):
            if hasattr(module, name):
                setattr(module, name, _ChunkKernel())
        module.get_compressed_slot_mapping = lambda *a, out: out
        one = torch.zeros(rows, dtype=torch.int32)
        cls = module.DeepseekV32IndexerMetadataBuilder
        self.builder = cls.__new__(cls)
        vars(self.builder).update(
            dcp_world_size=1, dcp_rank=0, pcp_world_size=1, pcp_rank=0, use_pcp=False,
            cp_kv_cache_interleave_size=1, num_speculative_tokens=0, decode_threshold=1,
            use_flattening=False, supports_varlen=False, compress_ratio=ratio, device=one.device,
            kernel_block_size=None, max_prefill_buffer_size=1 << 20, num_sms=1,
            compressed_slot_mapping_buffer=one.long(), decode_lens_buffer=one.clone(),
            per_req_decode_lens_buffer=one.clone(), expanded_seq_lens_buffer=one.clone(),
            decode_seq_lens_buffer=one.clone(), scheduler_metadata_buffer=one.view(-1, 2),
            kv_cache_spec=types.SimpleNamespace(
                block_size=BLOCK, storage_block_size=BLOCK, num_states=BLOCK
            ),
            vllm_config=types.SimpleNamespace(speculative_config=None),
        )  # fmt: skip
        self.common = importlib.import_module("vllm.v1.attention.backend").CommonAttentionMetadata

    def build(self, tokens: Sequence[int], new: Sequence[int], table: torch.Tensor) -> Any:
        """Return the metadata of requests of so many tokens, of which so many are new."""
        starts = torch.tensor((0, *new), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(tokens, dtype=torch.int32)
        rows = int(starts[-1])
        return self.builder.build(0, self.common(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths, num_reqs=len(new), num_actual_tokens=rows,
            max_query_len=max(new), max_seq_len=max(tokens), block_table_tensor=table,
            slot_mapping=torch.full((rows,), -1, dtype=torch.int64),
        ))  # fmt: skip


class World:
    """A cache of keys, and requests with pages in it; ``step`` is what a scheduler decided."""

    def __init__(self, engine: Engine, ratio: int = 1, *, k: int = 512, pages: int = 256) -> None:
        self.engine, self.planner, self.ratio, self.k = engine, Planner(ratio), ratio, k
        self.cache = make_cache(pages, page_size=BLOCK).view(pages, BLOCK, KEY_BYTES)
        self.pages: dict[str, list[int]] = {}
        self._free = list(range(pages - 1, 0, -1))
        self.buffer = torch.full((1024, k), 7, dtype=torch.int32)

    def request(self, name: str, tokens: int, prefix_of: str = "", prefix: int = 0) -> None:
        """Give a request pages for its tokens; the first ``prefix`` tokens are another's."""
        shared = self.pages[prefix_of][: prefix // self.ratio // BLOCK] if prefix_of else []
        need = -(-tokens // self.ratio // BLOCK) + 1
        self.pages[name] = shared + [self._free.pop() for _ in range(need - len(shared))]

    def step(self, scheduled: Sequence[tuple[str, int, int]], seed: int, heads: int = 4) -> Problem:
        """Return a batch of (request, its tokens before, its new tokens), decodes first."""
        pages = [self.pages[name] for name, _, _ in scheduled]
        table = torch.zeros(len(pages), max(map(len, pages)), dtype=torch.int32)
        for row, of in enumerate(pages):
            table[row, : len(of)] = torch.tensor(of, dtype=torch.int32)
        tokens = [before + new for _, before, new in scheduled]
        new = [count for _, _, count in scheduled]
        g, rows = torch.Generator().manual_seed(seed), sum(new)
        query = torch.randn(rows, heads, HEAD_DIM, generator=g).to(torch.float8_e4m3fn)
        keys = sum(n // self.ratio for n in tokens)
        return Problem(
            self.cache, [], query, torch.rand(rows, heads, generator=g),
            self.planner.build(tokens, new, table), self.buffer, torch.zeros(rows, 16), self.k,
            4096, keys, [0] * rows,
        )  # fmt: skip
