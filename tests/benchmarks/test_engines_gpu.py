"""The adapters' own functions on tensors as the engines make them, in a CUDA graph.

The tests need no engine: they call the functions that run inside an engine (``calls``,
``kernels``), with torch in place of DeepGEMM. The torch reference through the same page table is
the oracle. Everything also runs on a CPU, with the torch backend and without a graph. So the logic
is tested before it runs on a GPU.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kits.engine_parts import make_cache
from kits.engine_tensors import PAGE, deep_gemm_buffer, in_row, page_table
from kits.inputs import poison_tail
from kits.oracles import check_selection, read_one_by_one
from kits.replay import captured

import dsv4_plugin as ops
from dsv4_plugin import paged_logits
from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.engines.sglang import wrappers
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection
from dsv4_plugin.engines.tokenspeed import kernels
from dsv4_plugin.engines.vllm import wrappers as vllm_calls
from dsv4_plugin.state import state

BACKENDS = ("torch", "cuda")
K = 512
WIDTHS = {"cpu": 2_112, "cuda": 40_000}  # columns of the logits; on a GPU past every path boundary
names = pytest.mark.parametrize("name", ["bf16", "fp32"])
whose = pytest.mark.parametrize("who", ["engine", "plugin"])  # logits by DeepGEMM, or by us
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _active() -> Iterator[None]:
    """The adapters behave as in a process that switched the plugin on, strictly."""
    adapter.current().decide(Decision(True, strict=True))
    yield
    adapter.current().decide(INERT)
    state.reset()
    sys.modules.pop("deep_gemm", None)


def plane_of(pages: int, pad: int, device: str) -> torch.Tensor:
    """A cache that stays a strided view of its arena on the device."""
    content = make_cache(pages)
    arena = torch.full((pages, content.shape[1] + pad), 0xFF, dtype=torch.uint8, device=device)
    arena[:, : content.shape[1]] = content.to(device)
    return arena[:, : content.shape[1]]


def lengths_of(step: int, width: int, device: str) -> torch.Tensor:
    """Lengths of one step: empty, short, around k, around path boundaries, and long rows."""
    some = [0, 1, 3, K - 1 + step % 3, 600 + step, width // 2 + step, width - 70 + step, width]
    return torch.tensor(some, dtype=torch.int32, device=device)


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the engine's own kernel was called")


# --- SGLang ----------------------------------------------------------------------------------


@pytest.fixture
def in_forward() -> Iterator[Callable[[Selection], None]]:
    """What ``forward_c4_indexer``'s hook has decided for the calls below it."""

    def enter(topk: Selection) -> None:
        scope = adapter.current().call
        scope.kind, scope.selection = "v4", topk

    yield enter
    scope = adapter.current().call
    scope.kind, scope.selection = None, None


@names
@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("raw", [False, True], ids=["slots", "slots and raw"])
def test_sglang_paged(backend, device, name, form, raw, in_forward):
    width, rows = WIDTHS[device], 8
    in_forward(Selection(name, backend))
    logits = deep_gemm_buffer(rows, width, DTYPES[name], device)
    table = page_table(rows, width, device)
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    out = torch.full((rows, K), 7, dtype=torch.int32, device=device)
    indices = torch.full((rows, K), 7, dtype=torch.int32, device=device) if raw else None
    arguments = (unreachable, logits, lengths, table, out, PAGE)
    if form == "v1":
        again, _ = captured(lambda: wrappers.topk_v1(*arguments, indices), device)
    else:
        metadata = torch.zeros(rows + 1, 2, dtype=torch.int32, device=device)
        again, _ = captured(lambda: wrappers.topk_v2(*arguments, metadata, indices), device)
    for step in range(3):
        lengths.copy_(lengths_of(step, width, device))
        kind = ("relu_sum", "normal", "two_values")[step]
        logits.copy_(scores(kind, rows, width, DTYPES[name], seed=step, device=device))
        poison_tail(logits, lengths)
        short = lengths <= K
        logits[short] = float("nan")  # uninitialised for rows that need no scores
        out.fill_(-7)
        again()
        got = in_row(out, table)
        check_selection(logits.float().nan_to_num(0.0), lengths, K, got)
        assert torch.equal(got[short], torch.arange(K, device=device).int().where(
            torch.arange(K, device=device) < lengths[short, None], torch.tensor(-1).int().to(device)
        ))  # fmt: skip
        if indices is not None:
            assert torch.equal(indices, got)
    assert not state.counters["topk.paged.upstream"]


def test_sglang_dsa(backend, device, monkeypatch):
    width, rows = WIDTHS[device], 8
    monkeypatch.setattr(wrappers, "_fused", lambda: True)
    monkeypatch.setattr(adapter.Adapter, "intact", lambda self, name: True)
    monkeypatch.setattr(wrappers.policy, "for_dsa", lambda *a: Selection("fp32", backend))
    logits = deep_gemm_buffer(rows, width, torch.float32, device)
    table = page_table(rows, width, device)
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    metadata = types.SimpleNamespace(real_page_table=table, page_size=PAGE)
    paged = types.SimpleNamespace(name="PAGED")
    result: list[torch.Tensor] = []

    def run() -> None:
        result.append(
            wrappers.topk_dsa(
                unreachable, None, logits, lengths, K, paged, metadata, row_starts=None
            )
        )

    again, _ = captured(run, device)
    for step in range(2):
        lengths.copy_(lengths_of(step, width, device))
        lengths[0] = -4 * step  # an idle companion row
        logits.copy_(scores("normal", rows, width, torch.float32, seed=step, device=device))
        logits[:, :3] = float("inf")  # the first and local tokens, as SGLang marks them
        poison_tail(logits, lengths)
        again()
        check_selection(logits, lengths, K, in_row(result[-1], table))


# --- vLLM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("next_n", [1, 2])
def test_vllm_own_decode(backend, device, name, next_n, monkeypatch):
    """Logits and top-k through vLLM's patched names, with a schedule that the plugin leaves."""
    monkeypatch.setattr(adapter.Adapter, "intact", lambda self, name: True)
    adapter.current().decide(Decision(True, True, Selection(name, backend, False, "plugin")))
    batch, pages = 4, WIDTHS[device] // PAGE // 8
    width = pages * PAGE
    plane = plane_of(1 + batch * pages, 576 - (PAGE * 132) % 576, device)
    cache = plane.as_strided((len(plane), PAGE, 1, 132), (plane.stride(0), 132, 132, 1))
    table = (1 + torch.randperm(batch * pages)).view(batch, pages).int().to(device)
    q = torch.zeros(batch, next_n, 64, 128, dtype=torch.float8_e4m3fn, device=device)
    weights = torch.rand(batch * next_n, 64, device=device)
    lengths = torch.zeros(batch, next_n, dtype=torch.int32, device=device)
    out = torch.empty(batch * next_n, K, dtype=torch.int32, device=device)
    made: list[torch.Tensor] = []

    def run() -> None:
        logits = vllm_calls.paged_logits(
            unreachable, (q, None), cache, weights, lengths, table, None, max_model_len=width + 100
        )
        made.append(logits)
        vllm_calls.decode_topk(logits, lengths, next_n, out, K, unreachable)

    again, _ = captured(run, device)
    for step in range(3):
        lengths.copy_(lengths_of(step, width, device)[-batch * next_n :].view(batch, next_n))
        lengths.clamp_(max=width)
        q.copy_(torch.randn(q.shape).to(torch.float8_e4m3fn))
        out.fill_(-7)
        again()
        logits, flat = made[-1], lengths.reshape(-1)
        assert (logits.shape, logits.dtype) == ((batch * next_n, width + 100), DTYPES[name])
        check_selection(logits.float().nan_to_num(-1e30), flat, K, out)
        want = paged_logits(q, plane, weights, lengths, table, dtype=torch.float32, backend="torch")
        for row, n in enumerate(flat.tolist()):
            a, b = logits[row, :n].float(), want[row, :n]
            assert n == 0 or bool(((a - b).abs() <= 2**-7 * b.abs() + 1e-3 * b.max()).all())


@pytest.mark.parametrize("compressed", [False, True], ids=["0.26", "0.33"])
def test_vllm_own_prefill(backend, device, compressed, monkeypatch):
    monkeypatch.setattr(adapter.Adapter, "intact", lambda self, name: True)
    adapter.current().decide(Decision(True, True, Selection("bf16", backend, False, "plugin")))
    rows, keys = 40, 2000
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 64, 128, generator=g).to(torch.float8_e4m3fn).to(device)
    k = torch.randn(keys, 128, generator=g).to(torch.float8_e4m3fn).to(device)
    scale, weights = torch.rand(keys, device=device), torch.rand(rows, 64, device=device)
    starts = torch.tensor([0] * 20 + [700] * 20, dtype=torch.int32, device=device)
    ends = starts + torch.arange(rows, dtype=torch.int32, device=device) * 33
    width = {"max_seqlen_k": 1300} if compressed else {"clean_logits": False}
    logits = vllm_calls.dense_logits(
        unreachable, (q, None), (k, scale), weights, starts, ends, **width
    )
    out = torch.empty(rows, K, dtype=torch.int32, device=device)
    begin, end = (starts * 0, ends - starts) if compressed else (starts, ends)
    vllm_calls.prefill_topk(
        unreachable, logits, begin, end, out, rows, logits.stride(0), logits.stride(1), K
    )
    check_selection(logits.float().nan_to_num(-1e30), ends - starts, K, out)


# --- TokenSpeed ------------------------------------------------------------------------------


def torch_deep_gemm() -> types.ModuleType:
    """DeepGEMM's two logits functions in torch ops that a graph can capture."""
    module = types.ModuleType("deep_gemm")

    def keys_of(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = pages.flatten(-3)
        split = PAGE * 128
        values = flat[..., :split].unflatten(-1, (PAGE, 128)).contiguous()
        scale = flat[..., split:].contiguous().view(torch.float32)
        return values.view(torch.float8_e4m3fn).float().flatten(-3, -2), scale.flatten(-2)

    def paged(
        q, kv_cache, weights, lens, table, plan, width, clean_logits=False,
        logits_dtype=torch.float32,
    ):  # fmt: skip
        assert q[1] is None and q[0].dtype == torch.float8_e4m3fn and not clean_logits
        keys, scale = keys_of(kv_cache[table.long()])
        score = torch.relu(torch.einsum("rhd,rkd->rhk", q[0].squeeze(1).float(), keys))
        score = torch.einsum("rhk,rh->rk", score, weights) * scale
        out = deep_gemm_buffer(len(weights), width, logits_dtype, weights.device.type)
        out.copy_(score[:, :width])
        past = torch.arange(width, device=out.device)[None, :] >= lens.reshape(-1, 1)
        return out.masked_fill_(past, float("nan"))  # what the kernel would not write

    def dense(
        q, kv, weights, ks, ke, clean_logits=True, max_seqlen_k=0, logits_dtype=torch.float32
    ):
        assert q[1] is None and max_seqlen_k == 0 and not clean_logits
        score = torch.relu(torch.einsum("rhd,kd->rhk", q[0].float(), kv[0].float()))
        score = torch.einsum("rhk,rh->rk", score, weights) * kv[1]
        at = torch.arange(score.shape[1], device=score.device)[None, :]
        outside = (at < ks[:, None]) | (at >= ke[:, None])
        return score.to(logits_dtype).masked_fill(outside, float("nan"))

    module.fp8_fp4_paged_mqa_logits = paged  # type: ignore[attr-defined]
    module.fp8_fp4_mqa_logits = dense  # type: ignore[attr-defined]
    module.get_num_sms = lambda: 132  # type: ignore[attr-defined]
    module.get_paged_mqa_logits_metadata = (  # type: ignore[attr-defined]
        lambda lens, page, sms: lens.new_zeros(sms + 1, 2)
    )
    return module


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The logits that our top-k got, in the order of the calls."""
    sys.modules["deep_gemm"] = torch_deep_gemm()
    logits: list[torch.Tensor] = []
    real = ops.topk

    def watched(scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits.append(scores)
        return real(scores, *args, **kwargs)

    monkeypatch.setattr(ops, "topk", watched)
    return logits


@names
@whose
@pytest.mark.parametrize("layout", ["logical_offsets", "global_slots"])
@pytest.mark.parametrize("pad", [0, 1024], ids=["dense", "arena"])
def test_tokenspeed_decode(backend, device, name, who, layout, pad, seen):
    rows, pages = 8, WIDTHS[device] // PAGE // 8
    width = pages * PAGE
    plane = plane_of(1 + rows * pages, pad, device)
    table = (1 + torch.randperm(rows * pages)).view(rows, pages).int().to(device)
    q = torch.randn(rows, 64, 128).bfloat16().to(device)
    weights = torch.randn(rows, 96, device=device)[:, 32:]  # a view of a fused projection
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    out = torch.empty(rows, K, dtype=torch.int32, device=device)
    lens = torch.empty(rows, dtype=torch.int32, device=device)

    def run() -> None:
        kernels.dsa_decode(
            Selection(name, backend, name == "bf16", who), q, weights, lengths, table,
            page_size=PAGE, topk=K, softmax_scale=0.1, index_k_cache=plane, topk_layout=layout,
            out=out, lens_out=lens,
        )  # fmt: skip

    again, _ = captured(run, device)
    for step in range(3):
        lengths.copy_(lengths_of(step, width, device).clamp_max(width))
        q.copy_(torch.randn(rows, 64, 128).bfloat16())
        out.fill_(-7)
        again()
        got = in_row(out, table) if layout == "global_slots" else out
        assert seen[-1].dtype == DTYPES[name]
        check_selection(seen[-1].float().nan_to_num(-1e30), lengths, K, got)
        assert torch.equal(lens, lengths.clamp(0, K))


@names
@whose
def test_tokenspeed_prefill(backend, device, name, who, seen):
    """Two requests whose keys lie anywhere in an arena; blocks of queries below a byte limit."""
    keys, queries = (WIDTHS[device] // 8, 900), (6, 4)
    plane = plane_of(2 + sum(keys) // PAGE, 1024, device)
    g = torch.Generator().manual_seed(3)
    slots = torch.randperm(plane.shape[0] * PAGE, generator=g)[: sum(keys)].to(device)
    starts = torch.tensor([0] * 6 + [keys[0]] * 4, device=device)
    ends = torch.tensor(
        [keys[0] - 5 + j for j in range(6)] + [keys[0] + n for n in (0, 3, 512, 900)],
        device=device,
    )
    q = torch.randn(sum(queries), 64, 128, generator=g).bfloat16().to(device)
    weights = torch.randn(sum(queries), 64, generator=g).to(device)
    limit = 4 * sum(keys) * DTYPES[name].itemsize
    out, lens = kernels.dsa_prefill(
        Selection(name, backend, name == "bf16", who), q, weights, slots, starts, ends, topk=K,
        softmax_scale=0.1, index_k_cache=plane, page_size=PAGE, max_logits_bytes=limit,
    )  # fmt: skip
    assert [len(part) for part in seen] == [4, 4, 2]
    lengths = (ends - starts).int()
    assert torch.equal(lens, lengths.clamp_max(K))
    logits = torch.cat([part.float() for part in seen]).nan_to_num(-1e30)
    for row, (a, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        local = torch.where(out[row] < 0, -1, out[row] - a)[None]
        begin = 0 if who == "plugin" else a  # DeepGEMM's columns are those of all keys
        window = logits[row : row + 1, begin : begin + max(n, 1)]
        check_selection(window, lengths[row, None], K, local)


def test_tokenspeed_gather_by_slot(backend, device):
    plane = plane_of(40, 1024, device)
    slots = torch.randperm(40 * PAGE)[:1000]
    values, scales = kernels.gather_slots(plane, slots.to(device), PAGE)
    got = values.float() * scales[:, None]
    assert torch.equal(got.cpu(), read_one_by_one(plane.cpu(), slots))


def test_tokenspeed_reader_with_slots_on_the_cpu(device, backend):
    """The loop took any device; and padding alone, and a cache without pages, are zeros."""
    plane = plane_of(40, 1024, device)
    slots = torch.tensor([-1, 0, 5, 40 * PAGE - 1, -7, 64])
    got = ops.read_indexer_cache(plane, slots, backend=backend)
    assert got.device.type == device
    assert torch.equal(got.cpu(), read_one_by_one(plane.cpu(), slots))
    padding = torch.full((5,), -1, device=device)
    assert not ops.read_indexer_cache(plane, padding, backend=backend).any()
    assert not ops.read_indexer_cache(plane[:0], padding, backend=backend).any()


def test_tokenspeed_reader_in_a_graph(device, backend):
    """What replaces TokenSpeed's loop can be captured, where the loop cannot."""
    plane = plane_of(40, 1024, device)
    slots = torch.zeros(300, dtype=torch.int64, device=device)
    result: list[torch.Tensor] = []
    again, _ = captured(
        lambda: result.append(ops.read_indexer_cache(plane, slots, backend=backend)), device
    )
    for seed in range(2):
        new = torch.randint(-2, 40 * PAGE, (300,), generator=torch.Generator().manual_seed(seed))
        slots.copy_(new)
        again()
        assert torch.equal(result[-1].cpu(), read_one_by_one(plane.cpu(), new))
