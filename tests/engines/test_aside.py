"""Which calls ``auto`` leaves to the engine's own kernel: the rules, on a table of the test's."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

from dsv4_plugin.engines.shared import adapter, aside
from dsv4_plugin.engines.shared import aside_table as table
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.envs import Settings
from dsv4_plugin.state import state

FP32 = Selection("fp32", "cuda")
LEFT = replace(FP32, aside="vllm")
AUTO = Settings(plugin=True)
ENGINE = "vLLM 0.33.0"
CPU = torch.device("cpu")
MEASURED = {  # rows, and up to which length in narrow and in wide buffers
    ("vllm.decode", 2048): ((8, 0, 0), (64, 8192, 0), (128, 65_536, 262_144)),
    ("vllm.prefill", 2048): ((64, 131_072, 0),),
    ("vllm.decode", 512): ((128, 0, 0),),
    ("sglang.dsa", 2048): ((1, 16_384, 0), (2, 0, 0)),
}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LONGEST", MEASURED)
    monkeypatch.setattr(table, "NARROW", 131_072)
    monkeypatch.setattr(
        table, "WIDEST", {"vllm.decode": 262_144, "vllm.prefill": 131_072, "sglang.dsa": 65_536}
    )
    monkeypatch.setattr(table, "SINCE", {"vllm": (0, 33), "sglang": (0, 5, 23)})


@pytest.mark.parametrize(
    "engine,known",
    [
        ("vLLM 0.33.0", "vllm"),
        ("vLLM 0.33", "vllm"),
        ("vLLM 0.34.1.dev7+gabc", "vllm"),
        ("vLLM 1.0", "vllm"),
        ("vLLM v0.33.0+cu129", "vllm"),
        ("vLLM 0.33.0.post1", "vllm"),
        ("vLLM 0.34.0rc1", "vllm"),
        ("vLLM 0.33.0rc1", ""),
        ("vLLM 0.33.0rc2.dev15+gabc", ""),
        ("vLLM 0.33.dev3", ""),
        ("vLLM 0.32.9", ""),
        ("vLLM of unknown version", ""),
        ("SGLang 0.5.23", "sglang"),
        ("SGLang 0.5.24.dev7", "sglang"),
        ("SGLang 0.5.23.dev7+gabc", ""),  # of the commits before 0.5.23
        ("SGLang 0.5.22.post1", ""),
        ("TokenSpeed 0.1.1", ""),
        ("an engine", ""),
    ],
)
def test_only_from_the_release_that_was_measured(engine, known):
    found = aside.engage(FP32, AUTO, engine, CPU)
    assert found == replace(FP32, aside=known)


@pytest.mark.parametrize(("multiprocessors", "known"), [(132, "vllm"), (78, "")])
def test_only_on_a_gpu_like_the_one_that_was_measured(monkeypatch, multiprocessors, known):
    monkeypatch.setattr(table, "SMS", 132)
    properties = types.SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = aside.engage(FP32, AUTO, ENGINE, torch.device("cuda"))
    assert found == replace(FP32, aside=known)


@pytest.mark.parametrize(
    "more",
    [
        {"topk": "fp32"},
        {"topk": "bf16"},
        {"logits": "plugin"},
        {"strict": True},
        {"backend": "cuda"},
    ],
    ids=str,
)
def test_a_wish_keeps_every_call(more):
    assert aside.engage(FP32, replace(AUTO, **more), ENGINE, CPU) == FP32


def test_a_wish_for_the_engines_logits_is_none_for_the_plugins_topk():
    assert aside.engage(FP32, replace(AUTO, logits="engine"), ENGINE, CPU) == LEFT


@pytest.mark.parametrize(
    "other",
    [
        replace(FP32, dtype="bf16"),  # the engine's kernel reads float32
        replace(FP32, logits="plugin"),
        replace(FP32, backend="torch"),
        replace(FP32, slots=True),  # what follows would cost the engine another kernel
        replace(FP32, candidates=True),
        None,
    ],
)
def test_what_the_engines_kernel_does_not_serve_alike_stays(other):
    assert aside.engage(other, AUTO, ENGINE, CPU) == other


@pytest.mark.parametrize(
    "rows,longest,left",
    [
        (1, 1, False),  # fewer rows than were measured
        (7, 4096, False),
        (8, 1, False),
        (64, 0, False),
        (63, 4096, False),  # between 8, where the plugin is faster, and 64
        (64, 4096, True),
        (64, 8192, True),
        (64, 8193, False),
        (100, 8192, True),
        (100, 65_536, False),  # 64 rows of that length are the plugin's
        (128, 65_536, True),
        (128, 65_537, False),  # rows of that length were not measured
        (4096, 65_536, True),  # more rows than were measured
    ],
)
def test_a_call_is_left_where_every_length_and_both_neighbours_say_so(rows, longest, left):
    assert aside.faster(LEFT, "decode", 2048, rows, longest, 131_072) is left
    assert aside.faster(FP32, "decode", 2048, rows, longest, 131_072) is False


@pytest.mark.parametrize(
    "rows,longest,width,left",
    [
        (128, 65_537, 131_073, True),  # a captured graph has wide buffers
        (128, 262_144, 262_144, True),
        (64, 1, 131_073, False),
        (100, 4096, 262_144, False),  # 64 rows in wide buffers are the plugin's
        (128, 4096, 262_145, False),  # wider than what was measured
    ],
)
def test_the_width_of_the_buffer_counts_too(rows, longest, width, left):
    assert aside.faster(LEFT, "decode", 2048, rows, longest, width) is left


def test_what_was_not_measured_stays():
    assert not aside.faster(LEFT, "decode", 1024, 128, 4096, 4096)
    assert not aside.faster(LEFT, "decode", 512, 128, 1, 4096)
    assert not aside.faster(LEFT, "dsa", 2048, 1, 4096, 4096)  # a call of another engine
    assert aside.faster(replace(LEFT, aside="sglang"), "dsa", 2048, 1, 4096, 4096)


def test_the_log_names_the_shapes():
    by = "by rows and the longest row:"
    assert aside.said(LEFT, iter([2048, 2048])) == (
        f"decode {by} from 64 on up to 8192, from 128 on up to 65536 (in wide buffers 262144); "
        f"prefill {by} from 64 on up to 131072"
    )
    assert aside.said(replace(LEFT, aside="sglang"), [2048, 512]) == (
        f"dsa {by} from 1 on up to 16384, from 2 on none"
    )
    assert aside.said(LEFT, [512]) == aside.said(FP32, [2048]) == aside.said(None, [2048]) == ""
    assert aside.shapes("sglang") == {f"dsa {by} from 1 on up to 16384, from 2 on none": (2048,)}
    assert aside.shapes("tokenspeed") == {}


@pytest.mark.parametrize("left", [True, False])
def test_a_call_that_is_left_is_the_engines_and_counted(left):
    ran = []
    adapter.current().decide(Decision(True, selection=LEFT))
    try:
        serve(
            "decode", LEFT, torch.float32, lambda _: ran.append("plugin"),
            lambda: ran.append("engine"), lambda: ran.append("shadow"), 128, left,
        )  # fmt: skip
        assert ran == (["engine"] if left else ["plugin", "shadow"])
        name = "topk.decode.aside" if left else "topk.decode"
        assert state.counters[name] == 1
        assert state.counters["topk.decode.upstream"] == 0
    finally:
        adapter.current().decide(INERT)
        state.reset()


def test_after_a_failure_nothing_is_left_aside():
    """The engine serves all calls then, and they are counted as its own."""
    adapter.current().decide(Decision(True))
    try:
        serve("decode", None, torch.float32, lambda _: None, lambda: None, None, 128, True)
        assert state.counters["topk.decode.upstream"] == 1
        assert state.counters["topk.decode.aside"] == 0
    finally:
        adapter.current().decide(INERT)
        state.reset()
