"""Run vLLM's real sparse indexer on a CPU, for the demo and the tests.

vLLM's own Python runs: ``SparseAttnIndexer``, the custom op ``vllm::sparse_attn_indexer``, its
top-k dispatcher, its workspace. torch replaces the parts that need a GPU; :data:`STANDS_IN` lists
them. The kit finds everything by signature, so it works with every release from 0.26 on.

A replacement of a compiled op takes exactly what the compiled op takes, float32 logits, or it
raises. Columns that a kernel would not write hold NaN, so a wrong read of them becomes visible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from kits.engine_parts import (
    HEAD_DIM,
    KEY_BYTES,
    Call,
    DeepGemm,
    oracle,
    read_keys,
    record_plugin_logits,
    spans_of,
    upstream_rows,
)
from kits.vllm_candidates import Candidates

__all__ = ["STANDS_IN", "Call", "Engine", "Problem", "oracle"]

STANDS_IN = {
    "DeepGEMM's index logits": "the same formula in torch, row stride and unwritten columns alike",
    "vLLM's CUDA top-k (cooperative, persistent, per row)": "torch.topk row by row",
    "vLLM's CUDA gather of the FP8 keys": "a torch loop over requests and pages",
    "vLLM's two Triton functions of candidate blocks": "the same rules in torch",
    "the platform, as the indexer sees it": "says 'CUDA, SM90' (or what a test asks for)",
}

HEADS = 64
BLOCK = 64
PREFIX = "model.layers.0.self_attn.indexer.k_cache"
INDEXER = "vllm.model_executor.layers.sparse_attn_indexer"
_SEES_PLATFORM = (INDEXER, "vllm.model_executor.layers.indexer_topk", "vllm.utils.deep_gemm")


@dataclasses.dataclass
class Problem:
    """A batch: the cache, the queries, vLLM's metadata, and the buffer for the indices."""

    cache: torch.Tensor
    keys: list[torch.Tensor]  # of each prefill request, e4m3 bytes and scale bytes [tokens, 132]
    query: torch.Tensor
    weights: torch.Tensor
    metadata: Any
    buffer: torch.Tensor
    hidden: torch.Tensor
    k: int
    max_model_len: int
    prefill_keys: int
    lengths: list[int]  # columns of each row, decode rows first, as in the buffer


# --- the compiled ops ------------------------------------------------------------------------

_SCHEMAS = {
    "_C::persistent_topk": "(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, "
    "int k, int max_seq_len) -> ()",
    "_C::cooperative_topk": "(Tensor logits, Tensor lengths, Tensor! output, Tensor workspace, "
    "int k, int max_seq_len) -> ()",
    "_C::top_k_per_row_decode": "(Tensor logits, int next_n, Tensor seq_lens, Tensor! indices, "
    "int numRows, int stride0, int stride1, int topK) -> ()",
    "_C::top_k_per_row_prefill": "(Tensor logits, Tensor rowStarts, Tensor rowEnds, "
    "Tensor! indices, int numRows, int stride0, int stride1, int topK) -> ()",
    "_C_cache_ops::cp_gather_indexer_k_quant_cache": "(Tensor kv_cache, Tensor! dst_k, "
    "Tensor! dst_scale, Tensor block_table, Tensor cu_seq_lens) -> ()",
}


class _Ops:
    """The compiled ops, on the CPU key of the dispatcher, recording their calls."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.libraries: dict[str, torch.library.Library] = {}
        for name, schema in _SCHEMAS.items():
            space, _, op = name.partition("::")
            library = self.libraries.get(space) or torch.library.Library(space, "FRAGMENT")
            self.libraries[space] = library
            library.define(op + schema)
            library.impl(op, getattr(self, op), "CPU")

    def _decode(self, name: str, logits: Any, lengths: Any, out: Any, k: int) -> None:
        self.calls.append(Call(name, logits.dtype, logits.shape[0]))
        upstream_rows(logits, spans_of(lengths, logits.shape[0]), out, k)

    def persistent_topk(self, logits, lengths, output, workspace, k, max_seq_len):
        self._decode("persistent_topk", logits, lengths, output, k)

    def cooperative_topk(self, logits, lengths, output, workspace, k, max_seq_len):
        self._decode("cooperative_topk", logits, lengths, output, k)

    def top_k_per_row_decode(self, logits, next_n, seq_lens, indices, rows, s0, s1, k):
        self._decode("top_k_per_row_decode", logits, seq_lens, indices, k)

    def top_k_per_row_prefill(self, logits, starts, ends, indices, rows, s0, s1, k):
        self.calls.append(Call("top_k_per_row_prefill", logits.dtype, rows))
        spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
        upstream_rows(logits, spans, indices, k)

    def cp_gather_indexer_k_quant_cache(self, kv_cache, dst_k, dst_scale, table, cu):
        self.calls.append(Call("cp_gather_indexer_k_quant_cache", rows=int(cu[-1])))
        for request, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            rows = read_keys(kv_cache, table[request], end - begin)
            dst_k[begin:end].view(torch.uint8).copy_(rows[:, :HEAD_DIM])
            dst_scale[begin:end].copy_(rows[:, HEAD_DIM:])


# --- the engine around the indexer -----------------------------------------------------------


class _Platform:
    """The platform vLLM found, except that it answers as a CUDA device would."""

    def __init__(self, real: Any, capability: int) -> None:
        self._real, self._capability = real, capability

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    device_type = "cpu"

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def is_cpu(self) -> bool:
        return False

    def has_device_capability(self, capability: Any, device_id: int = 0) -> bool:
        if isinstance(capability, tuple):
            capability = capability[0] * 10 + capability[1]
        return self._capability >= capability

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        return self._capability // 10 == capability // 10


def _dataclass(cls: Any, **values: Any) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def _arguments(function: Any, **values: Any) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


class Engine:
    """vLLM's indexer and the little of an engine that it needs. One per process."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ops = _Ops(self.calls)
        self.indexer: Any = importlib.import_module(INDEXER)
        deep_gemm: Any = importlib.import_module("vllm.utils.deep_gemm")
        takes = "clean_logits" in inspect.signature(deep_gemm.fp8_fp4_mqa_logits).parameters
        self.deep_gemm_module = deep_gemm
        self.deep_gemm = DeepGemm(self.calls, takes)
        self.install_deep_gemm()
        if hasattr(self.indexer, "_select_candidate_blocks"):  # from 0.30 on
            vars(self.indexer).update(Candidates(self.calls).by_name)
        record_plugin_logits(self.calls)
        vars(self.indexer)["has_deep_gemm"] = lambda: True
        if not torch.accelerator.is_available():
            torch.accelerator.empty_cache = lambda: None  # the workspace asks for it as it grows
        workspace = importlib.import_module("vllm.v1.worker.workspace")
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(torch.device("cpu"))

    @property
    def version(self) -> str:
        """The release."""
        return importlib.import_module("vllm").__version__

    def install_deep_gemm(self) -> None:
        """Put the stand-in where vLLM keeps what it resolved from the DeepGEMM package."""
        self.deep_gemm_module._fp8_fp4_paged_mqa_logits_impl = self.deep_gemm.paged
        self.deep_gemm_module._fp8_fp4_mqa_logits_impl = self.deep_gemm.dense

    @contextlib.contextmanager
    def gpu(self, capability: int = 90) -> Iterator[None]:
        """Let the indexer see a CUDA device of this capability."""
        undo = []
        for name in _SEES_PLATFORM:
            with contextlib.suppress(ImportError):
                module: Any = importlib.import_module(name)
                if hasattr(module, "current_platform"):
                    undo.append((module, module.current_platform))
                    module.current_platform = _Platform(module.current_platform, capability)
        self._forget_platform(module for module, _ in undo)
        try:
            yield
        finally:
            for module, platform in undo:
                module.current_platform = platform
            self._forget_platform(module for module, _ in undo)

    @staticmethod
    def _forget_platform(modules: Any) -> None:
        for module in modules:
            for name in ("get_indexer_topk", "mqa_logits_use_mx_scales"):
                clear = getattr(getattr(module, name, None), "cache_clear", None)
                if clear is not None:
                    clear()

    @contextlib.contextmanager
    def config(
        self,
        model_type: str | None = "deepseek_v4",
        additional_config: dict[str, Any] | None = None,
        **parallel: Any,
    ) -> Iterator[Any]:
        """Set the configuration under which layers are built."""
        module = importlib.import_module("vllm.config")
        device = module.DeviceConfig(device="cpu")
        config = module.VllmConfig(device_config=device, additional_config=additional_config or {})
        for name, value in parallel.items():
            setattr(config.parallel_config, name, value)
        if model_type == "deepseek_v41":  # vLLM never compiles it
            config.compilation_config.mode = type(config.compilation_config.mode).NONE
        if model_type is not None:
            hf = types.SimpleNamespace(model_type=model_type, architectures=[])
            model = types.SimpleNamespace(hf_config=hf, hf_text_config=hf)
            object.__setattr__(config, "model_config", model)
        with module.set_current_vllm_config(config):
            yield config

    def layer(self, problem: Problem, **overrides: Any) -> Any:
        """Build a real ``SparseAttnIndexer`` over the problem's cache."""
        cls = self.indexer.SparseAttnIndexer
        values: dict[str, Any] = {
            "k_cache": types.SimpleNamespace(prefix=PREFIX, kv_cache=problem.cache),
            "quant_block_size": 128,
            "scale_fmt": "ue8m0",
            "topk_tokens": problem.k,
            "head_dim": HEAD_DIM,
            "max_model_len": problem.max_model_len,
            "max_total_seq_len": max(problem.prefill_keys, 1),
            "topk_indices_buffer": problem.buffer,
            "skip_k_cache_insert": True,
        }
        values.update(overrides)
        return cls(**_arguments(cls.__init__, **values))

    @contextlib.contextmanager
    def forward(self, problem: Problem) -> Iterator[None]:
        """Set the metadata of one forward pass."""
        module = importlib.import_module("vllm.forward_context")
        context = _dataclass(
            module.ForwardContext,
            no_compile_layers={},
            attn_metadata={PREFIX: problem.metadata},
            slot_mapping={},
        )
        with module.override_forward_context(context):
            yield

    def step(self, layer: Any, problem: Problem) -> torch.Tensor:
        """Run the layer's forward; returns the indices it selected, ``[rows, k]``."""
        problem.buffer.fill_(7)
        with self.forward(problem):
            layer(problem.hidden, problem.query, None, problem.weights)
        return problem.buffer[: len(problem.lengths), : problem.k].clone()

    def step_direct(self, layer: Any, problem: Problem) -> torch.Tensor:
        """Run the way V3.2 takes: the Python function itself, past the layer and the op."""
        utils = importlib.import_module("vllm.utils.torch_utils")
        encode = getattr(utils, "_encode_layer_name", lambda name: name)
        function = self.indexer.sparse_attn_indexer
        values = _arguments(
            function,
            hidden_states=problem.hidden,
            k_cache_prefix=encode(PREFIX),
            kv_cache=problem.cache,
            q_quant=problem.query,
            q_scale=None,
            k=None,
            weights=problem.weights,
            quant_block_size=128,
            scale_fmt="ue8m0",
            topk_tokens=problem.k,
            head_dim=HEAD_DIM,
            max_model_len=problem.max_model_len,
            total_seq_lens=max(problem.prefill_keys, 1),
            topk_indices_buffer=problem.buffer,
            skip_k_cache_insert=True,
            use_pcp=False,
            pcp_shard_decode_requests=False,
            dense_mha_metadata_layer_name=encode(""),
        )
        problem.buffer.fill_(7)
        with self.forward(problem):
            function(**values)
        return problem.buffer[: len(problem.lengths), : problem.k].clone()

    def expected(self, k: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the oracle's answer on the logits of the last step, in the buffer's row order.

        ``dtype`` rounds the scores first; None takes them as the logits function wrote them.
        """
        rows = []
        for name in ("paged_logits", "dense_logits"):  # decode rows come first in the buffer
            for call in self.calls:
                if call.name == name and call.logits is not None:
                    for row, (begin, end) in zip(call.logits, call.spans, strict=True):
                        scores = row[begin:end]
                        rows.append(oracle(scores if dtype is None else scores.to(dtype), k))
        return torch.stack(rows)

    def problem(
        self,
        decode: Sequence[int] = (),
        prefill: Sequence[tuple[int, int]] = (),
        *,
        k: int = 512,
        next_n: int = 1,
        one_length_a_request: bool = False,
        heads: int = HEADS,
        max_model_len: int = 4096,
        page_size: int = BLOCK,
        page_padding: int = 0,
        wider_buffer: int = 0,
        quantum: float | None = None,
        seed: int = 0,
    ) -> Problem:
        """Make a random batch in vLLM's own metadata classes.

        Args:
            decode: context length of every decode request, each with ``next_n`` query tokens.
            prefill: context length and query tokens of every prefill request, as one chunk.
            k: index_topk.
            next_n: query tokens of a decode request.
            one_length_a_request: hand over ``[batch, 1]`` lengths although ``next_n > 1``.
            heads: index heads.
            max_model_len: columns of the decode logits.
            page_size: keys a page.
            page_padding: bytes between pages.
            wider_buffer: columns of the index buffer past ``k``.
            quantum: round keys to multiples of this, which makes scores tie.
            seed: of the generator.
        """
        metadata = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
        g = torch.Generator().manual_seed(seed)
        requests = [(n, next_n) for n in decode] + list(prefill)
        need = [(n + page_size - 1) // page_size for n, _ in requests]
        # vLLM aligns pages to the main cache's; a page is longer than its content then.
        arena = torch.zeros(sum(need) + 1, page_size * KEY_BYTES + page_padding, dtype=torch.uint8)
        shape, strides = (arena.shape[0], page_size, KEY_BYTES), (arena.stride(0), KEY_BYTES, 1)
        cache = arena.as_strided(shape, strides)
        numbers = (torch.randperm(sum(need), generator=g) + 1).tolist()
        table = torch.zeros(len(requests), max(need), dtype=torch.int32)
        for row, pages in enumerate(need):
            for column in range(pages):
                table[row, column] = page = numbers.pop()
                keys = torch.randn(page_size, HEAD_DIM, generator=g)
                if quantum is not None:
                    keys = (keys / quantum).round() * quantum
                    scale = torch.ones(page_size, 1)
                else:
                    peak = keys.abs().amax(1, keepdim=True)
                    scale = torch.exp2(torch.ceil(torch.log2(peak / 448)))
                values = (keys / scale).to(torch.float8_e4m3fn).view(torch.uint8)
                arena[page, : page_size * HEAD_DIM] = values.reshape(-1)
                content = slice(page_size * HEAD_DIM, page_size * KEY_BYTES)
                arena[page, content] = scale.view(torch.uint8).reshape(-1)
        keys_of = [read_keys(cache, table[len(decode) + i], n) for i, (n, _) in enumerate(prefill)]
        tokens = sum(n for _, n in requests)
        query = torch.randn(tokens, heads, HEAD_DIM, generator=g).to(torch.float8_e4m3fn)
        weights = torch.rand(tokens, heads, generator=g)
        if quantum is not None:
            query = torch.randint(0, 2, query.shape, generator=g).float().to(torch.float8_e4m3fn)
            weights = torch.ones_like(weights)
        ends = [n - m + 1 + j for n, m in requests for j in range(m)]

        decoding = None
        if decode:
            last = torch.tensor(decode, dtype=torch.int32)[:, None]
            lens = (last - next_n + 1 + torch.arange(next_n, dtype=torch.int32)).clamp_min(0)
            decoding = _dataclass(
                metadata.DeepSeekV32IndexerDecodeMetadata,
                block_table=table[: len(decode)],
                seq_lens=(last if one_length_a_request else lens).contiguous(),
                decode_lens=torch.full((len(decode),), next_n, dtype=torch.int32),
                requires_padding=False,
                schedule_metadata=torch.zeros(133, 2, dtype=torch.int32),
            )
        prefilling = None
        total = sum(n for n, _ in prefill)
        first = len(decode) * next_n
        if prefill:
            lens_of = torch.tensor([n for n, _ in prefill])
            cu = torch.cat((torch.zeros(1, dtype=torch.long), lens_of.cumsum(0))).int()
            owner = [i for i, (_, m) in enumerate(prefill) for _ in range(m)]
            begin = cu[torch.tensor(owner)].contiguous()
            chunk = _dataclass(
                metadata.DeepseekV32IndexerPrefillChunkMetadata,
                block_table=table[len(decode) :],
                cu_seqlen_ks=begin,
                cu_seqlen_ke=begin + torch.tensor(ends[first:], dtype=torch.int32),
                cu_seq_lens=cu,
                token_to_seq=torch.repeat_interleave(torch.arange(len(prefill)), lens_of).int(),
                total_seq_lens=total,
                max_seqlen_k=max(ends[first:]),
                token_start=first,
                token_end=tokens,
                num_reqs=len(prefill),
                local_cu_seq_lens=cu,
                local_total_seq_lens=total,
                max_local_total_seq_lens=total,
            )
            prefilling = _dataclass(metadata.DeepseekV32IndexerPrefillMetadata, chunks=[chunk])
        whole = _dataclass(
            metadata.DeepseekV32IndexerMetadata,
            seq_lens=torch.tensor([n for n, _ in requests], dtype=torch.int32),
            max_seq_len=max(n for n, _ in requests),
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int64),
            num_decodes=len(decode),
            num_decode_tokens=first,
            num_prefills=len(prefill),
            num_prefill_tokens=tokens - first,
            decode=decoding,
            prefill=prefilling,
            query_start_loc=None,
            num_reqs=len(requests),
            max_query_len=max(n for _, n in requests),
            num_actual_tokens=tokens,
            head_dim=HEAD_DIM,
        )
        buffer = torch.full((tokens + 3, k + wider_buffer), 7, dtype=torch.int32)
        hidden = torch.zeros(tokens, 16)
        return Problem(
            cache, keys_of, query, weights, whole, buffer, hidden, k, max_model_len, total, ends
        )
