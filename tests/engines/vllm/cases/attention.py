"""vLLM's own C4A decode attention on a CPU, up to the call of FlashMLA.

``DeepseekV4FlashMLAAttention._forward_decode`` and ``compute_global_topk_indices_and_lens`` are the
release's own. Triton does not run on a CPU, so torch replaces the Triton kernel in the latter. The
replacement of FlashMLA records its arguments.
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

import torch

FLASHMLA = "vllm.models.deepseek_v4.nvidia.flashmla"
TO_SLOTS = "compute_global_topk_indices_and_lens"
PAGE = 64  # keys of the indexer's page


def to_slots(out: Any, lens: Any, indices: Any, owner: Any, table: Any, size: int, valid: Any):
    """What the Triton kernel does."""
    rows = len(indices)
    here = indices >= 0
    page = indices.clamp_min(0).long()
    number = table[owner[:rows].long()[:, None], page // size]
    out.copy_(torch.where(here, number * size + page % size, -1))
    lens.copy_(here.sum(1).int() * valid[:rows])


class Attention:
    """The decode part of one layer."""

    def __init__(self, monkeypatch: Any) -> None:
        self.module: Any = importlib.import_module(FLASHMLA)
        self.transforms = 0
        self.seen: dict[str, Any] = {}
        utils = importlib.import_module("vllm.models.deepseek_v4.common.ops.cache_utils")
        if hasattr(utils, "_COMPUTE_GLOBAL_TOPK_INDICES_AND_LENS_KERNEL"):
            name, stand_in = "_COMPUTE_GLOBAL_TOPK_INDICES_AND_LENS_KERNEL", self._late
        else:
            name, stand_in = "_compute_global_topk_indices_and_lens_kernel", self
        monkeypatch.setattr(utils, name, stand_in)
        monkeypatch.setattr(self.module, "flash_mla_with_kvcache", self._flash_mla)

    def _late(self, *args: Any) -> None:
        self.transforms += 1
        to_slots(*args)

    def __getitem__(self, grid: Any) -> Any:  # kernel[grid](…), before 0.33
        def launch(out, _so, lens, indices, _si, _k, owner, table, _st, size, valid, **_):
            self._late(out, lens, indices, owner, table, size, valid)

        return launch

    def _flash_mla(self, **kwargs: Any) -> tuple[None, None]:
        self.seen = kwargs
        return None, None

    @property
    def original(self) -> Any:
        """vLLM's own function."""
        return inspect.unwrap(vars(self.module)[TO_SLOTS])

    def arguments(self, problem: Any, next_n: int = 1, **changed: Any) -> dict[str, Any]:
        """The arguments that the attention passes after the indexer of ``problem`` has run."""
        table = problem.metadata.decode.block_table
        rows = len(table) * next_n
        return {
            "topk_indices": problem.buffer[:rows],
            "token_to_req_indices": (torch.arange(len(problem.lengths)) // next_n).int(),
            "block_table": table,
            "block_size": PAGE,
            "is_valid_token": torch.ones(rows, dtype=torch.bool),
            **changed,
        }

    def decode(self, problem: Any, next_n: int = 1, **changed: Any) -> tuple[Any, Any]:
        """Run vLLM's ``_forward_decode``; returns the slots and counts that FlashMLA gets."""
        given = self.arguments(problem, next_n, **changed)
        rows = len(given["topk_indices"])
        swa = types.SimpleNamespace(
            num_decodes=len(given["block_table"]),
            num_decode_tokens=rows,
            is_valid_token=given["is_valid_token"],
            token_to_req_indices=given["token_to_req_indices"],
            decode_swa_indices=torch.zeros(rows, 1, 128, dtype=torch.int32),
            decode_swa_lens=torch.ones(rows, dtype=torch.int32),
            tile_sched_c4a=object(),
        )
        sparse = types.SimpleNamespace(
            block_size=4 * given["block_size"], block_table=given["block_table"]
        )
        layer = types.SimpleNamespace(
            compress_ratio=4,
            topk_indices_buffer=problem.buffer,
            scale=1.0,
            attn_sink=None,
            swa_cache_layer=types.SimpleNamespace(kv_cache=torch.zeros(1, 64, 584)),
        )
        cls = self.module.DeepseekV4FlashMLAAttention
        cls._forward_decode(
            layer,
            q=torch.zeros(rows, 1, 512),
            kv_cache=torch.zeros(1, PAGE, 584),
            swa_metadata=swa,
            attn_metadata=sparse,
            swa_only=False,
            output=torch.zeros(rows, 1, 512),
        )
        return self.seen["extra_indices_in_kvcache"][:, 0], self.seen["extra_topk_length"]
