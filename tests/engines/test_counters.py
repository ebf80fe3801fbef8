"""The adapters' counters: calls with rows, by the side that served them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dsv4_plugin.engines.sglang import deep_gemm
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.seam import Found
from dsv4_plugin.engines.tokenspeed import readers
from dsv4_plugin.engines.vllm import install
from dsv4_plugin.engines.vllm import wrappers as vllm
from dsv4_plugin.engines.vllm.context import LogitsTag, tag_logits
from dsv4_plugin.ops.logits import new_logits
from dsv4_plugin.state import Seam, state

K, PAGE, DIM, HEADS = 512, 64, 128, 8
PLUGIN = Selection("fp32", "torch", logits="plugin")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    state.reset()
    monkeypatch.setattr(adapter.Adapter, "intact", lambda self, name: True)
    yield
    adapter.current().call.selection = None
    adapter.current().decide(INERT)
    state.reset()


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


def lengths(rows: int) -> torch.Tensor:
    return torch.full((rows,), PAGE, dtype=torch.int32)


def indices(rows: int) -> torch.Tensor:
    return torch.empty(rows, K, dtype=torch.int32)


def queries(rows: int, *more: int) -> torch.Tensor:
    return torch.zeros(rows, *more, HEADS, DIM).to(torch.float8_e4m3fn)


def keys(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, DIM).to(torch.float8_e4m3fn), torch.ones(rows)


def scores(rows: int) -> torch.Tensor:
    logits = torch.randn(rows, PAGE)
    return tag_logits(logits, LogitsTag())


def pages() -> torch.Tensor:
    return torch.zeros(1, PAGE, DIM + 4, dtype=torch.uint8)


def decode(rows: int) -> None:
    vllm.decode_topk(scores(rows), lengths(rows), 1, indices(rows), K, nothing)


def shim(rows: int) -> None:
    op = install.TopkOp(Found(torch.ops._C, "no_such_op", nothing))
    op(scores(rows), lengths(rows), indices(rows), None, K, PAGE, what=1)


def prefill(rows: int) -> None:
    logits, ends = scores(rows), lengths(rows)
    strides = logits.stride()
    vllm.prefill_topk(nothing, logits, ends * 0, ends, indices(rows), rows, *strides, K)


def dense(form: Callable[..., Any]) -> Callable[[int], None]:
    def call(rows: int) -> None:
        form(rows, torch.ones(rows, HEADS), torch.zeros_like(lengths(rows)), lengths(rows))

    return call


def vllm_dense(rows: int, weights: Any, starts: Any, ends: Any) -> None:
    vllm.dense_logits(made, (queries(rows), None), keys(9), weights, starts, ends)


def vllm_paged(rows: int, weights: Any, starts: Any, ends: Any) -> None:
    table = torch.zeros(rows, 1, dtype=torch.int32)
    q = (queries(rows, 1), None)
    vllm.paged_logits(made, q, pages()[:, :, None], weights, ends[:, None], table, None, PAGE)


def sglang_dense(rows: int, weights: Any, starts: Any, ends: Any) -> None:
    adapter.current().call.selection = adapter.current().decision.selection
    of = deep_gemm._wrapper(made, None, deep_gemm._plugin_dense)
    of(queries(rows), keys(9), weights, starts, ends, clean_logits=False, max_seqlen_k=PAGE)


def made(q: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an engine's logits."""
    rows = q[0].shape[0] if isinstance(q, tuple) else q.shape[0]
    return new_logits(rows, PAGE, torch.float32, torch.device("cpu"))


def gather(rows: int) -> None:
    cu = torch.tensor([0, rows], dtype=torch.int32)
    into = torch.empty(rows, DIM).to(torch.float8_e4m3fn), torch.empty(rows, 4, dtype=torch.uint8)
    vllm.gather(nothing, pages(), *into, torch.zeros(1, 1, dtype=torch.int32), cu)


def taken(rows: int) -> None:
    vllm.take_slots(nothing, indices(rows), None, None, PAGE, None)


def read(rows: int) -> None:
    state.seams["read.fp8"] = Seam("read.fp8", "somewhere")
    into = readers._reader("read.fp8", lambda cache_2d, slot_mapping, block_size=64: None)
    into(torch.zeros(1, PAGE * (DIM + 4), dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64))


def served(rows: int) -> None:
    serve("any", adapter.current().decision.selection, torch.float32, nothing, nothing, rows=rows)


CALLS: dict[str, tuple[Callable[[int], None], str]] = {
    "decode": (decode, "topk.decode"),
    "decode by an op": (shim, "topk.decode"),
    "prefill": (prefill, "topk.prefill"),
    "decode logits": (dense(vllm_paged), "logits"),
    "prefill logits": (dense(vllm_dense), "logits"),
    "SGLang's logits": (dense(sglang_dense), "logits"),
    "gather": (gather, "gather"),
    "slots": (taken, "topk.slots"),
    "reader": (read, "read.fp8"),
    "any top-k": (served, "topk.any"),
}
calls = pytest.mark.parametrize(("call", "name"), CALLS.values(), ids=CALLS)


@calls
@pytest.mark.parametrize("strict", [False, True])
def test_a_call_without_rows_is_nobodys(
    call: Callable[[int], None], name: str, strict: bool
) -> None:
    """The call is served, counts for neither side, and switches nothing off."""
    for selection in (PLUGIN, Selection("fp32", "torch"), None):
        decision = Decision(True, strict, selection, "torch" if selection else None)
        adapter.current().decide(decision)
        call(0)
        assert not state.counters and not state.failures


@calls
def test_the_same_call_with_rows_counts(call: Callable[[int], None], name: str) -> None:
    for selection in (PLUGIN, None):
        decision = Decision(True, False, selection, "torch" if selection else None)
        adapter.current().decide(decision)
        state.reset()
        call(2)
        who = {key for key in state.counters if key.startswith(name)}
        assert who or (selection is None and name == "logits"), state.counters
        assert not state.failures
