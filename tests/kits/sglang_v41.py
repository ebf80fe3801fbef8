"""Run the index layers of DeepSeek-V4.1 in SGLang: on a CPU for the tests, on a GPU for figures.

It uses :mod:`kits.sglang_engine`, from 0.5.22 on. SGLang's own Python runs: the two factories where
its attention backend has them, ``DeepseekV4AttnBackend._low_ratio_index_topk`` with the inputs
that it makes, ``DeepseekV41Indexer`` (projections, rotation, FP4 rounding), the methods of both
objects, the metadata, the index pool's readers, and its Triton kernels, on a CPU in Triton's
interpreter (``TRITON_INTERPRET=1``). :data:`STANDS_IN` lists what does not run.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import types
from collections.abc import Sequence
from typing import Any

import torch
from kits.engine_parts import Call, spans_of, upstream_rows
from kits.sglang_engine import Engine
from kits.stand_ins import stand_in

__all__ = ["LAYERS", "STANDS_IN", "STANDS_IN_ON_GPU", "V41", "Batch", "Model", "start"]

STANDS_IN_ON_GPU = {
    "the compressor": "random FP4 keys in the index cache",
    "model runner, scheduler, pools": "the tensors and lists that they hand to the backend",
}
STANDS_IN = {
    "SGLang's CUDA kernels of the block maxima and of DeepSelect": "torch, float32 only",
    **STANDS_IN_ON_GPU,
}

TOKENS = 256  # a page of the KV cache
PAGE = 64  # slots a page of the index cache
SLOT = 68  # bytes
K = 512
HEADS, HEAD_DIM, ROPE = 32, 128, 64
# layer -> compress ratio; the fourth publishes candidates, and those after it use them.
LAYERS = {2: 2, 8: 2, 14: 2, 20: 1, 24: 1, 28: 1, 32: 1, 36: 1}
SOURCE = 20


def _right_bfloat16() -> None:
    """Let Triton's interpreter round to bfloat16 as a GPU does, and multiply bfloat16 matrices.

    Without this it keeps bfloat16 as its bits, truncates, and multiplies the bits.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, tl = interpreter.InterpreterBuilder, interpreter.tl
    dot, cast = builder.create_dot, builder.cast_impl

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32):
            return wide(source)
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, to)
        bits = source.data.view("uint32")
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")
        return interpreter.TensorHandle(even, tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _module(name: str) -> Any:
    return importlib.import_module(f"sglang.{name}")


class _BlockMaxima:
    """In place of SGLang's CUDA kernel of the block maxima."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    def amax8_varlen(self, scores, lengths, out, topk) -> None:
        self.calls.append(Call("amax8", scores.dtype, len(scores)))
        out.fill_(float("nan"))
        for row, n in enumerate(lengths.tolist()):
            if n:
                part = torch.nn.functional.pad(scores[row, :n], (0, -n % 8), value=-torch.inf)
                out[row, : -(-n // 8)] = part.view(-1, 8).amax(1)
                out[row, (n - 1) // 8] = torch.inf


def start(device: str) -> V41:
    """Import SGLang; on a GPU without DeepGEMM, which V4.1 does not use on Hopper."""
    missing = []
    if device != "cpu":
        os.environ["SGLANG_ENABLE_JIT_DEEPGEMM"] = "0"
        missing = stand_in(("deep_gemm",))
    engine = Engine(device)
    engine.stood_in += missing
    if device != "cpu":  # no schedule for DeepGEMM's logits
        engine.envs.SGLANG_FP8_PAGED_MQA_LOGITS_TORCH.set(True)
    return V41(engine)


class V41:
    """SGLang with the index layers of DeepSeek-V4.1; ``engine`` has everything else."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.backend: Any = _module("srt.layers.attention.deepseek_v4_backend")
        self.indexers: Any = _module("srt.layers.attention.dsv4.v41_indexer")
        self.dense_blocks: Any = _module("srt.layers.attention.dsv4.v41_indexer.dense_blocks")
        self.full_topk: Any = _module("srt.layers.attention.dsv4.v41_indexer.full_topk")
        self.scoring: Any = _module("srt.layers.attention.dsv4.v41_indexer.scoring")
        self.sparse: Any = _module("srt.layers.attention.dsv4.dsv41_sparse")
        self.metadata: Any = _module("srt.layers.attention.dsv4.metadata")
        self.pool: Any = _module("srt.mem_cache.deepseek_v4_memory_pool")
        self.blocks: Any = _module("kernels.ops.attention.dsv4.candidate_blocks")
        if engine.device == "cpu":
            self._replace_kernels()

    def _replace_kernels(self) -> None:
        calls = self.engine.calls
        _right_bfloat16()
        platform = _module("srt.runtime_context").get_platform()
        object.__getattribute__(platform, "_overrides")["is_sm90"] = True
        properties = torch.cuda.get_device_properties

        def get_device_properties(device: Any = None) -> Any:
            if torch.device(device or "cpu").type == "cpu":
                return types.SimpleNamespace(multi_processor_count=1)
            return properties(device)

        torch.cuda.get_device_properties = get_device_properties
        maxima = _BlockMaxima(calls)
        self.blocks._jit_block_amax_module = lambda *_: maxima
        scan = self.scoring.fp4_index_logits_paged

        def fp4_index_logits_paged(*args: Any) -> torch.Tensor:
            out = scan(*args)
            mask = args[9] if len(args) > 9 else None
            calls.append(Call("scan" if mask is None else "masked scan", out.dtype, len(out)))
            return out

        self.scoring.fp4_index_logits_paged = fp4_index_logits_paged
        if hasattr(self.full_topk, "topk_page_transform"):  # from 0.5.23 on

            def topk_page_transform(
                scores, k, *, page_table, page_size, end, sorted_index, output_idx
            ) -> None:
                calls.append(Call("deep_select", scores.dtype, len(scores)))
                raw = torch.empty(len(scores), k, dtype=torch.int32)
                upstream_rows(scores, spans_of(end, len(scores)), raw, k)
                page = torch.gather(page_table.long(), 1, raw.clamp_min(0).long() // page_size)
                slots = page * page_size + raw % page_size
                output_idx[:, :k] = torch.where(raw < 0, -1, slots)

            self.full_topk.topk_page_transform = topk_page_transform
            self.full_topk.is_deep_select_supported = lambda: True


@dataclasses.dataclass
class Batch:
    """Rows of one forward: ``lengths`` are the tokens of each request, the new ones among them."""

    lengths: list[int]
    new: list[int]
    mode: str  # "decode", "verify" or "prefill"
    positions: torch.Tensor
    requests: torch.Tensor  # int64, of each row
    local: list[int] | None = None  # under context parallelism: rows of each request here
    padding: int = 0  # rows that a graph adds

    @property
    def rows(self) -> int:
        """How many queries there are."""
        return len(self.positions)


class Model:
    """The index layers of one model, with a backend that calls them.

    ``context`` tokens a request at most. ``held`` candidate blocks a row.
    """

    def __init__(
        self, v41: V41, context: int, requests: int, *, held: int = 2048, hidden: int = 256,
        lora: int = 256, seed: int = 0, spread: int = 3, ratios: tuple[int, ...] = (1, 2),
    ) -> None:  # fmt: skip
        self.v41, self.context, self.held = v41, context, held
        self.device = device = torch.device(v41.engine.device)
        self.hidden, self.lora, self.ratios = hidden, lora, ratios
        g = torch.Generator(device=device).manual_seed(seed)
        self.g = g
        pages = -(-context // TOKENS)
        # SGLang's request pool has rows that no request of the batch has.
        order = 1 + torch.randperm((requests + 1) * pages, generator=g, device=device)
        tables = order.view(requests + 1, pages)
        tokens = torch.arange(pages * TOKENS, device=device)
        slots = tables[:, tokens // TOKENS] * TOKENS + tokens % TOKENS
        self.req_to_token = slots[:, :context].to(torch.int32).contiguous()
        self.caches = {
            ratio: self._cache((order.numel() + 1) * TOKENS // ratio // PAGE, spread)
            for ratio in (1, 2)
        }
        self.pool = self._pool()
        self.indexers = {layer: self._indexer(layer) for layer in LAYERS}
        angles = torch.arange(context, device=device)[:, None] / 10_000 ** (
            torch.arange(ROPE // 2, device=device) / (ROPE // 2)
        )
        self.freqs = torch.polar(torch.ones_like(angles), angles)
        self.build()

    def build(self) -> None:
        """Let SGLang's two factories make the objects, as its backend does when it is built."""
        module, cls = self.v41.backend, self.v41.backend.DeepseekV4AttnBackend
        self.attn = object.__new__(cls)
        self.attn.__dict__.update(
            token_to_kv_pool=self.pool, req_to_token=self.req_to_token, page_size=TOKENS,
            mega_attn=True, trtllm_attn=True, tail_forward_metadata=None,
        )  # fmt: skip
        self.attn.prefill_candidates, self.attn.decode_candidates = module.make_candidate_indexer(
            token_to_kv_pool=self.pool, req_to_token=self.req_to_token, page_size=TOKENS,
            candidate_topk_blocks=self.held, candidate_block_size=8,
        )  # fmt: skip
        self.attn.full_topk_indexer = module.make_full_topk_indexer(
            token_to_kv_pool=self.pool, req_to_token=self.req_to_token
        )

    def _cache(self, pages: int, spread: int) -> torch.Tensor:
        cache = torch.empty(pages, PAGE * SLOT, dtype=torch.uint8, device=self.device)
        values, scales = cache[:, : PAGE * 64], cache[:, PAGE * 64 :]
        values.random_(0, 256, generator=self.g)
        scales.random_(127 - spread, 128, generator=self.g)
        return cache

    def _pool(self) -> Any:
        cls, caches = self.v41.pool.DeepSeekV4IndexerPool, self.caches

        def of(ratio: int) -> Any:
            pool = types.SimpleNamespace(
                page_size=PAGE, use_fp4_indexer=True, start_layer=0, size=0,
                index_k_with_scale_buffer=[caches[ratio]],
            )  # fmt: skip
            for name in ("get_index_k_dequant", "get_index_k_fp4", "get_index_k_with_scale_buffer"):
                setattr(pool, name, types.MethodType(getattr(cls, name), pool))
            return pool

        pools = {ratio: of(ratio) for ratio in (1, 2)}
        return types.SimpleNamespace(
            present_ratios=self.ratios,
            get_index_k_page_size=lambda ratio: pools[ratio].page_size,
            get_index_k_with_scale_buffer=lambda layer: pools[
                LAYERS[layer]
            ].get_index_k_with_scale_buffer(0),
            get_low_ratio_index_k_dequant=lambda layer, slots=None: pools[
                LAYERS[layer]
            ].get_index_k_dequant(0, slots),
        )

    def _indexer(self, layer: int) -> Any:
        """Return ``DeepseekV41Indexer`` with random projections."""
        cls = self.v41.sparse.DeepseekV41Indexer
        indexer = object.__new__(cls)
        torch.nn.Module.__init__(indexer)
        q = self._matrix(HEADS * HEAD_DIM, self.lora)
        w = self._matrix(HEADS, self.hidden)
        indexer.__dict__.update(
            n_heads=HEADS, n_local_heads=HEADS, index_head_dim=HEAD_DIM, rope_head_dim=ROPE,
            index_topk=K, is_candidate_source=layer == SOURCE, uses_candidates=layer > SOURCE,
            softmax_scale=HEAD_DIM**-0.5, weights_proj_small_max_m=-1,
            wq_b=lambda x: (x @ q.T, None), weights_proj=lambda x: (x @ w.T, None),
        )  # fmt: skip
        return indexer

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        made = torch.randn(rows, columns, generator=self.g, device=self.device)
        return (made / columns**0.5).bfloat16()

    # --- batches --------------------------------------------------------------------------------

    def batch(
        self, lengths: Sequence[int], new: Sequence[int] | int = 1, mode: str = "decode",
        local: Sequence[Sequence[int]] | None = None, padding: int = 0,
    ) -> Batch:  # fmt: skip
        """Make a batch of requests of so many tokens, of which ``new`` are new.

        ``local``: those of each request's new rows that this rank has.
        """
        counts = [new] * len(lengths) if isinstance(new, int) else list(new)
        at, of = [], []
        for request, (length, n) in enumerate(zip(lengths, counts, strict=True)):
            rows = range(n) if local is None else local[request]
            at += [length - n + row for row in rows]
            of += [1 + request] * len(rows)
        return Batch(
            list(lengths), counts, mode,
            torch.tensor(at + [0] * padding, dtype=torch.int64, device=self.device),
            torch.tensor(of + [0] * padding, dtype=torch.int64, device=self.device),
            None if local is None else [len(rows) for rows in local],
            padding,
        )  # fmt: skip

    def forward(self, batch: Batch, width: int | None = None) -> Forward:
        """Make the metadata of one forward; ``width``: tokens that the page table holds."""
        return Forward(self, batch, width or self.context)

    def keys(self, ratio: int, request: int, count: int) -> torch.Tensor:
        """Return the first keys of a request, float32, by this kit's own arithmetic."""
        slots = self.req_to_token[request, torch.arange(count, device=self.device) * ratio].long()
        slots = slots // ratio
        pages = self.caches[ratio][slots // PAGE]
        column = (slots % PAGE)[:, None]
        packed = pages.gather(1, column * 64 + torch.arange(64, device=self.device))
        scale = pages.gather(1, PAGE * 64 + column * 4 + torch.arange(4, device=self.device))
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=self.device)
        table = torch.cat((table, -table))
        values = table[torch.stack((packed & 15, packed >> 4), 2).flatten(1).long()]
        return values * torch.exp2(scale.float() - 127).repeat_interleave(32, 1)


class Forward:
    """One forward: the backend's metadata, and a call of every layer."""

    def __init__(self, model: Model, batch: Batch, width: int) -> None:
        self.model, self.batch = model, batch
        self.v41 = model.v41
        rows = batch.rows
        self.out = {r: self._buffer(rows) for r in (1, 2)}
        self.raw = {r: self._buffer(rows) if batch.mode == "prefill" else None for r in (1, 2)}
        self.inputs = {
            layer: (
                torch.randn(rows, model.hidden, generator=model.g, device=model.device).bfloat16(),
                torch.randn(rows, model.lora, generator=model.g, device=model.device).bfloat16(),
            )
            for layer in LAYERS
        }
        self.width = width
        # Queries and weights that are made already: (queries, weights) of a layer.
        self.made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.metadata = self._metadata()
        mode = self.v41.engine.mode
        lengths = list(batch.lengths)
        self.forward_batch = types.SimpleNamespace(
            forward_mode={
                "decode": mode.DECODE, "verify": mode.TARGET_VERIFY, "prefill": mode.EXTEND
            }[batch.mode],
            req_pool_indices=1 + torch.arange(len(lengths), device=model.device),
            batch_size=len(lengths),
            seq_lens_cpu=lengths,
            extend_seq_lens=torch.tensor(batch.new, device=model.device),
            extend_seq_lens_cpu=batch.new,
        )  # fmt: skip
        snapshot = getattr(self.v41.scoring, "prefill_k_slots", None)  # from 0.5.23 on
        if batch.mode == "prefill" and snapshot is not None:
            self.metadata.low_ratio_index_plans = {}
            self.metadata.low_ratio_k_slots = {
                ratio: snapshot(
                    req_to_token=model.req_to_token,
                    req_pool_indices=self.forward_batch.req_pool_indices,
                    seq_lens_cpu=lengths,
                    ratio=ratio,
                )
                for ratio in (1, 2)
            }

    def _buffer(self, rows: int) -> torch.Tensor:
        return torch.full((rows, K), 7, dtype=torch.int32, device=self.model.device)

    def _metadata(self) -> Any:
        model, batch = self.model, self.batch
        pages = -(-self.width // TOKENS)
        slots = model.req_to_token[batch.requests, : pages * TOKENS : TOKENS]
        table = (slots // TOKENS).to(torch.int32)
        core = types.SimpleNamespace(
            page_table=table,
            sparse_page_indices=self.out.__getitem__,
            sparse_raw_indices=self.raw.__getitem__,
        )
        found = types.SimpleNamespace(
            candidate_metadata=None, core_metadata=core, late_layer_tail=None,
            low_ratio_k_slots=None, low_ratio_index_plans=None,
        )  # fmt: skip
        if batch.mode != "prefill":
            for ratio in (1, 2):
                setattr(found, f"c{ratio}_indexer_metadata", self._paged(table, ratio))
        return found

    def _paged(self, table: torch.Tensor, ratio: int) -> Any:
        """Return SGLang's metadata of a paged indexer, as its backend makes it."""
        cls = self.v41.metadata.PagedIndexerMetadata
        lengths = ((self.batch.positions + 1) // ratio).clamp(min=1).to(torch.int32)
        more = {}
        fields = {field.name for field in dataclasses.fields(cls)}
        if "rows_per_request" in fields and self.batch.mode == "verify":
            more["rows_per_request"] = self.batch.new[0]
        return cls(
            page_size=TOKENS, compressed_page_size=PAGE,
            page_table=self.v41.metadata.expand_index_page_table(
                table, full_page_size=TOKENS, compress_ratio=ratio, index_page_size=PAGE
            ),
            compressed_seq_lens=lengths, use_topk_v2=True, compress_ratio=ratio, **more,
        )  # fmt: skip

    def run(self, layer: int, copy: bool = True) -> torch.Tensor:
        """Call a layer as its attention does; returns the slots, a copy or not."""
        model, batch, ratio = self.model, self.batch, LAYERS[layer]
        model.attn.forward_metadata = self.metadata
        indexer = model.indexers[layer]
        if layer in self.made:
            indexer.__dict__.update(
                queries=lambda *_, **__: self.made[layer][0],
                head_weights=lambda *_: self.made[layer][1],
            )
        given = types.SimpleNamespace(
            indexer=indexer, layer_id=layer, compress_ratio=ratio, freqs_cis=model.freqs
        )
        x, q_lora = self.inputs[layer]
        local = {} if batch.local is None else {"rows_per_request": batch.local}
        requests = None if batch.local is not None else batch.requests
        model.attn._low_ratio_index_topk(
            given, x, q_lora, requests, batch.positions, self.forward_batch, **local
        )
        return self.out[ratio].clone() if copy else self.out[ratio]

    def prepare(self) -> None:
        """Let SGLang's own code make queries and weights now, and not in the calls."""
        freqs = self.model.freqs[self.batch.positions]
        for layer, indexer in self.model.indexers.items():
            x, q_lora = self.inputs[layer]
            cls = type(indexer)
            self.made[layer] = cls.queries(indexer, q_lora, freqs), cls.head_weights(indexer, x)

    def every(self) -> None:
        """Call every layer in order."""
        for layer in LAYERS:
            self.run(layer, copy=False)

    def all(self) -> dict[int, torch.Tensor]:
        """Call every layer in order; returns the slots of each."""
        return {layer: self.run(layer) for layer in LAYERS}

    def positions_of(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Return which keys of a batch's only request are in these slots, in their order."""
        model, ratio = self.model, LAYERS[layer]
        tokens = model.req_to_token[int(self.batch.requests[0])]
        of_slot = torch.full((tokens.numel() * 3 // ratio + TOKENS,), -1, device=model.device)
        keys = torch.arange(len(tokens) // ratio, device=model.device)
        of_slot[(tokens[::ratio][: len(keys)] // ratio).long()] = keys
        return of_slot[slots.long()]

    def reference(self, layer: int, row: int, count: int) -> torch.Tensor:
        """Return the bfloat16 scores of a row's first keys by the plugin's own reference."""
        from dsv4_plugin import paged_logits

        model, ratio = self.model, LAYERS[layer]
        q, weights = self.made[layer]
        pages = model.req_to_token[self.batch.requests[row]][None, :: PAGE * ratio]
        return paged_logits(
            q[row : row + 1], model.caches[ratio], weights[row : row + 1],
            torch.tensor([count], device=model.device), (pages // (PAGE * ratio)).int(),
            block_size=PAGE, backend="torch",
        )[0, :count]  # fmt: skip

    # --- the truth ------------------------------------------------------------------------------

    def scores(self, layer: int) -> list[torch.Tensor]:
        """Return the bfloat16 scores of every row's keys, in SGLang's rounding, by this kit.

        The dot products are exact in float64; the heads are added up in float64 too.
        """
        model, batch, ratio = self.model, self.batch, LAYERS[layer]
        indexer = model.indexers[layer]
        x, q_lora = self.inputs[layer]
        q = indexer.queries(q_lora, model.freqs[batch.positions]).double()
        weights = indexer.head_weights(x)
        found = []
        for row, n in enumerate(((batch.positions + 1) // ratio).tolist()):
            keys = model.keys(ratio, int(batch.requests[row]), n).double()
            dots = (q[row] @ keys.T).float().bfloat16().relu()
            found.append((dots * weights[row][:, None]).double().sum(0).bfloat16())
        return found
