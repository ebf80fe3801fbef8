"""The writer of an engine's index logits: the decision, and the forms that the plugin takes."""

from __future__ import annotations

import pytest
import torch
from kits.logits_cases import paged as draw

from dsv4_plugin.engines.shared import logits
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.envs import Settings
from dsv4_plugin.state import state

TOPK = Selection("bf16", "torch", False, "plugin")


def decide(setting: str, dtype: str, by_engine: list[str], by_plugin: list[str]):
    asked = []

    def reasons(who: str, why: list[str]):
        return lambda: (asked.append(who), why)[1]

    who, why = logits.choose(
        Settings(logits=setting), dtype, reasons("engine", by_engine), reasons("plugin", by_plugin)
    )
    return who, why, asked


@pytest.mark.parametrize("dtype", logits.AUTO)
def test_auto_takes_the_first_of_the_table(dtype):
    first, second = logits.AUTO[dtype]
    no = {first: [f"{first} cannot"], second: [f"{second} cannot"]}
    assert decide("auto", dtype, [], []) == (first, [], [first])  # the other is not even asked
    reasons = {first: no[first], second: []}
    assert decide("auto", dtype, reasons["engine"], reasons["plugin"])[:2] == (second, [])
    who, why, asked = decide("auto", dtype, no["engine"], no["plugin"])
    assert why == [*no[first], *no[second]] and asked == [first, second]


@pytest.mark.parametrize(
    "dtype,first", [("bf16", "plugin"), ("fp16", "plugin"), ("fp32", "engine")]
)
def test_the_table_itself(dtype, first):
    assert logits.AUTO[dtype] == (first, "engine" if first == "plugin" else "plugin")


@pytest.mark.parametrize("wish,other", [("engine", "plugin"), ("plugin", "engine")])
def test_a_wish_is_that_or_its_reasons(wish, other):
    assert decide(wish, "bf16", [], []) == (wish, [], [wish])
    no = {wish: ["no kernel", "no GPU"], other: []}
    assert decide(wish, "bf16", no["engine"], no["plugin"])[1:] == (["no kernel", "no GPU"], [wish])


def test_everything_that_is_unmet_is_named():
    text = "; ".join(logits.unmet("bf16", "cuda", torch.device("cpu")))
    assert "plugin's logits by cuda: the tensors are on cpu, not on a CUDA device" in text
    assert logits.unmet("fp16", "torch", torch.device("cpu")) == []
    assert "has no triton implementation" in "; ".join(
        logits.unmet("bf16", "triton", torch.device("cpu"))
    )


CASE = draw([64, 10])
Q, CACHE, WEIGHTS, LENGTHS, TABLE = CASE.arguments
CACHE = CACHE.view(-1, 64, 132)


@pytest.mark.parametrize(
    "change",
    [
        {"q": Q[:, 0]},
        {"q": Q.view(torch.uint8)},
        {"q": (Q, None)},
        {"q": Q.transpose(2, 3).contiguous().transpose(2, 3)},
        {"cache": CACHE.view(torch.int8)},
        {"cache": CACHE[:, :, :68]},
        {"weights": WEIGHTS.bfloat16()},
        {"weights": WEIGHTS[:1]},
        {"weights": WEIGHTS.t().contiguous().t()},
        {"lengths": LENGTHS.float()},
        {"lengths": [64, 10]},
        {"table": TABLE.long()},
        {"table": TABLE[:1]},
        {"table": TABLE.repeat(1, 2).t().contiguous().t()},
        {"table": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_forms_of_a_paged_call(change):
    arguments = {"q": Q, "cache": CACHE, "weights": WEIGHTS, "lengths": LENGTHS, "table": TABLE}
    assert logits.paged(TOPK, *arguments.values(), 64) is not None
    assert logits.paged(TOPK, *(arguments | change).values(), 64) is None


KEYS = (Q[0, 0, :9].contiguous(), torch.ones(9))
BOUND = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        {"q": Q},
        {"keys": KEYS[0]},
        {"keys": (KEYS[0].view(torch.int8), KEYS[1])},
        {"keys": (KEYS[0][:, :64], KEYS[1])},
        {"keys": (KEYS[0], KEYS[1].int())},
        {"keys": (KEYS[0], KEYS[1][:5])},
        {"keys": (KEYS[0].repeat(2, 1)[::2], KEYS[1])},
        {"keys": (KEYS[0], KEYS[1].repeat(2)[::2])},
        {"weights": WEIGHTS.half()},
        {"starts": BOUND.float()},
        {"starts": BOUND.repeat(2)[::2]},
        {"starts": BOUND[:1]},
        {"ends": BOUND[:, None]},
        {"ends": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_forms_of_a_dense_call(change):
    arguments = {
        "q": Q[:, 0], "keys": KEYS, "weights": WEIGHTS, "starts": BOUND, "ends": BOUND + 9,
    }  # fmt: skip
    out = logits.dense(TOPK, *arguments.values(), 0)
    assert out is not None and out.shape == (2, 9) and out.dtype == torch.bfloat16
    assert logits.dense(TOPK, *arguments.values(), 70).shape == (2, 70)
    assert logits.dense(TOPK, *(arguments | change).values(), 0) is None
    state.reset()


@pytest.mark.parametrize(
    ("columns", "one_request"), [(0, False), (8, False), (9, True), (64, True)]
)
def test_a_row_with_all_keys_is_of_the_only_request(monkeypatch, columns, one_request):
    """An engine that says how long its longest row is, maybe rounded up to a page."""
    told, ragged = [], logits.ops.ragged_logits
    monkeypatch.setattr(
        logits.ops, "ragged_logits",
        lambda *given, **more: told.append(more["one_request"]) or ragged(*given, **more),
    )  # fmt: skip
    assert logits.dense(TOPK, Q[:, 0], KEYS, WEIGHTS, BOUND, BOUND + 9, columns) is not None
    assert told == [one_request]
    state.reset()
