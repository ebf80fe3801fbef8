"""Which models are DeepSeek-V4 by their names; all others select on float32 scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dsv4_plugin.engines.vllm import layers


def config(model_type: Any, *architectures: str, text: Any = None) -> SimpleNamespace:
    hf = SimpleNamespace(model_type=model_type, architectures=list(architectures))
    inner = SimpleNamespace(model_type=text, architectures=None)
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf, hf_text_config=inner))


@pytest.mark.parametrize(
    "names",
    [
        ("deepseek_v4",),
        ("deepseek-v4",),
        ("deepseek_v4_mtp",),
        ("DeepSeekV4MTPModel",),
        ("", "DeepseekV4ForCausalLM"),
        (None, "DSparkDeepseekV4ForCausalLM"),
        ("deepseek_v4", "DeepseekV4ForConditionalGeneration"),
    ],
)
def test_v4(names: tuple[Any, ...]) -> None:
    assert layers._family(config(*names)) == "DeepSeek-V4"
    assert layers._family(config("a_vision_model", text=names[-1])) == "DeepSeek-V4"


@pytest.mark.parametrize(
    "names",
    [
        ("deepseek_v41",),
        ("deepseek_v4_1",),
        ("deepseek_v4.1",),
        ("deepseek-v4-1",),
        ("deepseek_v4p1",),
        ("deepseek_v4_1_mtp",),
        ("DeepseekV4_1ForCausalLM",),
        ("deepseek_v4_1", "DeepseekV4ForCausalLM"),  # one of its names says so
        ("deepseek_v4", "DeepseekV41ForCausalLM"),
        ("deepseek_v40",),
        ("deepseek_v32",),
        ("deepseek_v3", "DeepseekV3ForCausalLM"),
        ("glm_moe_dsa",),
        ("",),
        (None,),
    ],
)
def test_not_v4(names: tuple[Any, ...]) -> None:
    assert layers._family(config(*names)) != "DeepSeek-V4"


@pytest.mark.parametrize("nothing", [None, SimpleNamespace(), SimpleNamespace(model_config=None)])
def test_no_model_is_none(nothing: Any) -> None:
    assert layers._family(nothing) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("deepseek_v41",), ("deepseek_v4_1",), ("deepseek_v4.1",), ("deepseek-v4-1",),
        ("DeepseekV41ForCausalLM",), ("deepseek_v4", "DeepseekV41ForCausalLM"),
    ],
)  # fmt: skip
def test_v41(names: tuple[Any, ...]) -> None:
    assert layers._family(config(*names)) == "DeepSeek-V4.1"
