"""Run SGLang's real indexer: on a CPU for the tests, on a GPU for ``benchmarks.engines.forward``.

SGLang's own Python runs: the plugin loader with the installed entry point, the hook registry,
``C4IndexerBackendMixin.forward_c4_indexer``, its metadata, the Python functions around its top-k
kernels, ``DSATopKBackend.topk_transform``, the parser. On a CPU torch replaces the parts that need
a GPU; :data:`STANDS_IN` lists them. On a GPU SGLang's kernels, DeepGEMM and the gather of prefill
are the real ones (:data:`STANDS_IN_ON_GPU`). The kit finds everything by name, so it works with
every release from 0.5.16 on.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from typing import Any

import torch
from kits.engine_parts import (
    HEAD_DIM,
    Call,
    DeepGemm,
    DeepGemmModule,
    make_cache,
    record_plugin_logits,
    spans_of,
    upstream_rows,
)
from kits.stand_ins import stand_in

__all__ = ["STANDS_IN", "STANDS_IN_ON_GPU", "Engine", "Layer", "Problem", "prepare"]

STANDS_IN = {
    "DeepGEMM (sgl-deep-gemm)": "the same formula in torch, row stride and unwritten columns alike",
    "SGLang's CUDA top-k kernels (v1, v2) and their plan": "torch.topk row by row, float32 only",
    "the queries and weights of the layer": "random ones",
}

STANDS_IN_ON_GPU = {
    "the model": "the projections of one indexer layer with random weights, and a cache of random "
    "keys in place of the compressor",
    "scheduler, memory pools": "the tensors that they hand to the indexer",
}
# Native packages that SGLang's modules import and that nothing here calls.
NATIVE = ("sgl_kernel", "flashinfer", "deep_ep", "xgrammar", "IPython", "pynvml")

INDEXER = "sglang.srt.layers.attention.dsv4.indexer"
PAGE = 64
HEADS = 64
LORA = 1024  # of the query's projection
ROPE = 64


class _Kernel:
    """What SGLang's JIT hands out in place of its top-k modules."""

    def __init__(self, calls: list[Call], name: str) -> None:
        self.calls, self.name = calls, name

    def topk_plan(self, lengths: torch.Tensor, plan: torch.Tensor, *_: Any) -> None:
        plan.zero_()

    def topk_transform(self, scores, lengths, table, out, page_size, *rest: Any) -> None:
        raw_out = rest[1] if self.name == "topk_v2" and len(rest) > 1 else None
        raw_out = rest[0] if self.name == "topk_v1" else raw_out
        self.calls.append(Call(self.name, scores.dtype, scores.shape[0]))
        raw = torch.empty(out.shape, dtype=torch.int32)
        spans = [(0, min(n, scores.shape[1])) for _, n in spans_of(lengths, scores.shape[0])]
        upstream_rows(scores, spans, raw, out.shape[1])
        if table is None:  # V4.1 maps the indices itself
            out.copy_(raw)
            return
        page = torch.gather(table.long(), 1, raw.clamp_min(0).long() // page_size)
        out.copy_(torch.where(raw < 0, -1, page * page_size + raw % page_size))
        if isinstance(raw_out, torch.Tensor):
            raw_out.copy_(raw)

    topk_transform_paged = topk_transform  # as it is called from 0.5.20 on


def prepare() -> None:
    """Make ``import sglang`` work beside a torch for the CPU.

    torchvision's wheel cannot load its library there. Its import needs only the schemas of two ops
    from that library.
    """
    if "torchvision" not in sys.modules and not torch.version.cuda:
        global _library
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_library: Any = None


@dataclasses.dataclass
class Problem:
    """One step of an indexer layer."""

    cache: torch.Tensor
    query: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    k: int
    out: torch.Tensor
    raw: torch.Tensor | None
    prefill: bool  # one request, logits over its gathered keys

    def slots(self, indices: torch.Tensor) -> torch.Tensor:
        """Take indices through the page table, as the attention will."""
        page = torch.gather(self.table.long(), 1, indices.clamp_min(0).long() // PAGE)
        return torch.where(indices < 0, -1, page * PAGE + indices % PAGE).to(torch.int32)


class Engine:
    """SGLang's indexer and the parts of an engine that it needs. One per process.

    ``device`` ``"cpu"``: with torch in place of the kernels, and their calls recorded in ``calls``.
    ``"cuda"``: with the kernels. ``stood_in`` names the packages that are empty modules here.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.calls: list[Call] = []
        self.stood_in: list[str] = []
        if device == "cpu":
            prepare()
            self.maths = DeepGemm(self.calls, has_logits_dtype=True)
            record_plugin_logits(self.calls)
            self.install_deep_gemm()
        else:
            self.stood_in = stand_in(NATIVE)
            self.deep_gemm = importlib.import_module("deep_gemm")
        self.indexer: Any = importlib.import_module(INDEXER)
        self.metadata: Any = importlib.import_module("sglang.srt.layers.attention.dsv4.metadata")
        self.dsa: Any = importlib.import_module("sglang.srt.layers.attention.dsa.dsa_topk_backend")
        self.envs: Any = importlib.import_module("sglang.srt.environ").envs
        self.mode: Any = importlib.import_module(
            "sglang.srt.model_executor.forward_batch_info"
        ).ForwardMode
        if device == "cpu":
            self._replace_kernels()

    def _replace_kernels(self) -> None:
        self.envs.SGLANG_OPT_USE_JIT_INDEXER_METADATA.set(False)  # a CUDA kernel otherwise
        topk = self.topk_module()
        v1, v2 = _Kernel(self.calls, "topk_v1"), _Kernel(self.calls, "topk_v2")
        topk._jit_topk_v1_module = lambda *_: v1
        topk._jit_topk_v2_module = lambda *_: v2

    @property
    def version(self) -> str:
        """The release."""
        return importlib.import_module("importlib.metadata").version("sglang")

    def install_deep_gemm(self, has_logits_dtype: bool = True) -> Any:
        """Put the stand-in where SGLang imports DeepGEMM from."""
        self.deep_gemm = DeepGemmModule(self.maths, has_logits_dtype)
        sys.modules["deep_gemm"] = self.deep_gemm
        return self.deep_gemm

    def topk_module(self) -> Any:
        """Return the module of SGLang's top-k functions."""
        for name in ("sglang.kernels.ops.attention.dsv4.topk", "sglang.jit_kernel.dsv4.topk"):
            try:
                return importlib.import_module(name)
            except ImportError:
                continue
        raise RuntimeError("SGLang's top-k functions are somewhere else")

    def topk_names(self) -> tuple[str, str]:
        """Return what the two top-k functions are called in this release."""
        new = hasattr(self.indexer, "topk_transform_paged_v2")
        base = "topk_transform_paged" if new else "topk_transform_512"
        return base, f"{base}_v2"

    def problem(
        self,
        lengths: tuple[int, ...] = (1536, 700, 512, 3, 0),
        *,
        k: int = 512,
        raw: bool = False,
        pages: int | None = None,
        prefill: bool = False,
        ties: bool = False,
        seed: int = 0,
    ) -> Problem:
        """Make a batch with one row for each length; in prefill they are one request's queries."""
        there = self.device
        g = torch.Generator().manual_seed(seed)
        rows = len(lengths)
        width = pages or max(1, -(-max(lengths) // PAGE))
        total = 1 + (width if prefill else rows * width)
        cache = make_cache(total, page_size=PAGE, seed=seed)
        if ties:  # every key the same, so every score of a row is
            cache.copy_(cache[:1].expand_as(cache))
            cache[:, : PAGE * HEAD_DIM] = cache[:1, :HEAD_DIM].repeat(total, PAGE)
            one = torch.ones(total, PAGE)
            cache[:, PAGE * HEAD_DIM :] = one.view(torch.uint8)
        order = 1 + torch.randperm(total - 1, generator=g)
        table = order[:width].expand(rows, width) if prefill else order.view(rows, width)
        return Problem(
            cache=cache.to(there),
            query=torch.randn(rows, HEADS, HEAD_DIM, generator=g).to(torch.float8_e4m3fn).to(there),
            weights=torch.randn(rows, HEADS, 1, generator=g).to(there),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=there),
            table=table.to(torch.int32).contiguous().to(there),
            k=k,
            out=torch.full((rows, k), 7, dtype=torch.int32, device=there),
            raw=torch.full((rows, k), 7, dtype=torch.int32, device=there) if raw else None,
            prefill=prefill,
        )

    def step(
        self,
        problem: Problem,
        *,
        v2: bool = True,
        backend: Any = None,
        fp4: bool = False,
        twice: bool = False,
    ) -> torch.Tensor:
        """Run SGLang's ``forward_c4_indexer``; returns the buffer it filled."""
        self.envs.SGLANG_OPT_USE_TOPK_V2.set(v2)
        layer = Layer(self, problem, backend)
        for _ in range(2 if twice else 1):
            layer.run(fp4)
        return problem.out

    def dsa_step(
        self,
        logits: torch.Tensor,
        problem: Problem,
        *,
        v2: bool = True,
        backend: str = "sgl-kernel",
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run ``DSATopKBackend.topk_transform`` in its decode-shaped PAGED form."""
        self.envs.SGLANG_OPT_USE_TOPK_V2.set(v2)
        metadata = types.SimpleNamespace(
            real_page_table=problem.table,
            page_size=PAGE,
            page_table_1=None,
            topk_v2_plan=torch.zeros(len(problem.lengths) + 1, 2, dtype=torch.int32),
            token_to_batch_idx=None,
        )
        context: Any = importlib.import_module("sglang.srt.model_executor.forward_context")
        pool = context.get_token_to_kv_pool  # where 0.5.16 reads the page size
        context.get_token_to_kv_pool = lambda: types.SimpleNamespace(page_size=PAGE)
        try:
            return self.dsa.DSATopKBackend(backend).topk_transform(
                logits=logits,
                lengths=problem.lengths,
                topk=problem.k,
                topk_transform_method=self.dsa.TopkTransformMethod.PAGED,
                attn_metadata=metadata,
                **kwargs,
            )
        finally:
            context.get_token_to_kv_pool = pool

    def logits_of(self, name: str | None = None) -> Call:
        """Return the last call that made logits: DeepGEMM's, or the plugin's."""
        return [c for c in self.calls if c.logits is not None and name in (None, c.name)][-1]


class Layer:
    """An attention backend with the mixin under test, and what one forward hands it."""

    def __init__(
        self, engine: Engine, problem: Problem, backend: Any, projected: bool = False
    ) -> None:
        self.engine, self.problem = engine, problem
        rows = len(problem.lengths)
        self.x = torch.zeros(rows, 1, device=engine.device)
        self._v2 = engine.envs.SGLANG_OPT_USE_TOPK_V2.get()
        self._last = int(problem.lengths[-1]) if rows else 0  # known to the scheduler
        self._queries = self._projected() if projected else self._random()
        indexer = engine.indexer

        class Backend(indexer.C4IndexerBackendMixin):  # type: ignore[name-defined]
            def forward_indexer_compressor(self, **kwargs: Any) -> None:
                """Compress nothing: the cache is already full."""

            def _can_use_nonpaged_indexer(self, **kwargs: Any) -> bool:
                return problem.prefill

        self.backend = Backend()
        if backend is not None:
            self.backend.dsa_topk_backend = backend
        self.backend.hisparse_coordinator = None
        self.backend.token_to_kv_pool = types.SimpleNamespace(
            get_index_k_with_scale_buffer=lambda layer_id: problem.cache,
            get_index_k_scale_buffer=self._gathered,
        )
        metadata = self._metadata()
        core = types.SimpleNamespace(
            positions=torch.arange(len(problem.lengths), device=engine.device),
            c4_sparse_page_indices=problem.out,
            c4_sparse_raw_indices=problem.raw,
            page_table=metadata.page_table,
        )
        self.backend.forward_metadata = types.SimpleNamespace(
            indexer_metadata=metadata, core_metadata=core
        )

    def _metadata(self) -> Any:
        cls = self.engine.metadata.PagedIndexerMetadata
        names = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            "page_size": 256,
            "page_table": self.problem.table,
            "compressed_page_size": PAGE,
            "compressed_seq_lens": self.problem.lengths,
            "c4_seq_lens": self.problem.lengths,
            "use_topk_v2": bool(self.engine.envs.SGLANG_OPT_USE_TOPK_V2.get()),
        }
        return cls(**{name: value for name, value in values.items() if name in names})

    def _random(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "compute_weights": lambda x, skip_scale=False: problem.weights,
            "compute_q": lambda *a, **k: (problem.query, problem.weights),
        }

    def _projected(self) -> dict[str, Any]:
        """Queries and weights by ``C4Indexer``'s own functions: projections, then its fused kernel.

        The kernel rotates, applies the Hadamard transform and quantises.
        """
        cls, device = self.engine.indexer.C4Indexer, self.engine.device
        g = torch.Generator(device=device).manual_seed(5)

        def linear(columns: int) -> Any:
            w = torch.randn(LORA, columns, generator=g, device=device).bfloat16() / LORA**0.5
            return lambda x: (x @ w, None)

        rows = len(self.problem.lengths)
        self.x = torch.randn(rows, LORA, generator=g, device=device).bfloat16()
        angles = torch.arange(rows, device=device)[:, None] / 10_000 ** (
            torch.arange(ROPE // 2, device=device) / (ROPE // 2)
        )
        c4 = types.SimpleNamespace(
            use_fp4_indexer=False, n_local_heads=HEADS, head_dim=HEAD_DIM,
            weight_scale=HEAD_DIM**-0.5 * HEADS**-0.5, wq_b=linear(HEADS * HEAD_DIM),
            weights_proj=linear(HEADS), freqs_cis=torch.polar(torch.ones_like(angles), angles),
        )  # fmt: skip
        return {
            name: types.MethodType(getattr(cls, name), c4)
            for name in ("compute_q", "compute_weights")
        }

    def queries(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries and weights, as ``forward_c4_indexer`` gets them."""
        weights = self._queries["compute_weights"](self.x, skip_scale=True)
        q, folded = self._queries["compute_q"](self.x, positions, weights)
        return q, folded

    def _gathered(self, layer_id, seq_len_tensor, page_indices, seq_len_sum, max_seq_len):
        if self.engine.device != "cpu":  # as DeepSeekV4IndexerPool.get_index_k_scale_buffer does
            engine = importlib.import_module("sglang.kernels.ops.kvcache.dsa_index_k_cache")
            pool = types.SimpleNamespace(
                page_size=PAGE, index_page_size=PAGE, index_head_dim=HEAD_DIM, quant_block_size=128
            )
            return engine.GetKAndS.execute(
                pool, self.problem.cache, page_indices=page_indices, seq_len_tensor=seq_len_tensor,
                seq_len_sum=seq_len_sum, max_seq_len=max_seq_len,
            )  # fmt: skip
        pages = self.problem.cache[page_indices[0].long()]
        split = PAGE * HEAD_DIM
        keys = pages[:, :split].reshape(-1, HEAD_DIM)[:seq_len_sum]
        scales = pages[:, split:].reshape(-1, 4)[:seq_len_sum]
        return keys.contiguous(), scales.contiguous()

    def run(self, fp4: bool = False, **more: Any) -> None:
        """Call SGLang's ``forward_c4_indexer`` once; ``more``: of the batch."""
        problem, rows = self.problem, len(self.problem.lengths)
        self.engine.envs.SGLANG_OPT_USE_TOPK_V2.set(self._v2)
        c4 = types.SimpleNamespace(
            use_fp4_indexer=fp4,
            layer_id=0,
            compressor=None,
            index_topk=problem.k,
            weight_scale=1.0,
            **self._queries,
        )
        last = self._last
        mode = self.engine.mode
        batch = types.SimpleNamespace(
            forward_mode=mode.EXTEND if problem.prefill else mode.DECODE,
            batch_size=1,
            seq_lens=torch.tensor([4 * last]),
            seq_lens_cpu=torch.tensor([4 * last]),
            extend_seq_lens=torch.tensor([rows]),
            extend_seq_lens_cpu=[rows],
            extend_start_loc=torch.tensor([0]),
            extend_num_tokens=rows,
        )
        vars(batch).update(more)
        if problem.prefill:
            self.engine.envs.SGLANG_OPT_DSV4_NONPAGED_INDEXER_MIN_QUERY_TOKENS.set(1)
        self.backend.forward_c4_indexer(x=self.x, q_lora=self.x, c4_indexer=c4, forward_batch=batch)
