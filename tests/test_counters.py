"""What the adapters count: calls that had rows, by who served them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dsv4_plugin.integrations import plan
from dsv4_plugin.integrations.plan import Plan, Topk
from dsv4_plugin.integrations.serve import serve
from dsv4_plugin.integrations.sglang import calls as sglang
from dsv4_plugin.integrations.tokenspeed import readers
from dsv4_plugin.integrations.vllm import calls as vllm
from dsv4_plugin.integrations.vllm import seams, slots
from dsv4_plugin.logits import new_logits
from dsv4_plugin.state import Seam, state

K, PAGE, DIM, HEADS = 512, 64, 128, 8
OURS = Topk("fp32", "torch", logits="own")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    state.reset()
    monkeypatch.setattr(seams, "intact", lambda name: True)
    yield
    sglang._scope.topk = None
    plan.decide(plan.INERT)
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
    setattr(logits, vllm._TAG, True)
    return logits


def pages() -> torch.Tensor:
    return torch.zeros(1, PAGE, DIM + 4, dtype=torch.uint8)


def decode(rows: int) -> None:
    vllm.decode_topk(scores(rows), lengths(rows), 1, indices(rows), K, nothing)


def shim(rows: int) -> None:
    op = seams._OpShim("no_such_op")
    op.resolved = nothing
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
    sglang._scope.topk = plan.current().topk
    of = sglang.logits(made, None, sglang.own_dense)
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
    slots.taken(nothing, indices(rows), None, None, PAGE, None)


def read(rows: int) -> None:
    state.seams["read.fp8"] = Seam("read.fp8", "somewhere")
    into = readers._reader("read.fp8", lambda cache_2d, slot_mapping, block_size=64: None)
    into(torch.zeros(1, PAGE * (DIM + 4), dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64))


def served(rows: int) -> None:
    serve("any", plan.current().topk, torch.float32, nothing, nothing, rows=rows)


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
    """It is served, counts for neither side, and switches nothing off."""
    for topk in (OURS, Topk("fp32", "torch"), None):
        plan.decide(Plan(True, strict=strict, topk=topk, gather="torch" if topk else None))
        call(0)
        assert not state.counters and not state.failures


@calls
def test_the_same_call_with_rows_counts(call: Callable[[int], None], name: str) -> None:
    for topk in (OURS, None):
        plan.decide(Plan(True, topk=topk, gather="torch" if topk else None))
        state.reset()
        call(2)
        who = {key for key in state.counters if key.startswith(name)}
        assert who or (topk is None and name == "logits"), state.counters
        assert not state.failures
