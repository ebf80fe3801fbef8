"""The content of ``DSV4_LOG=debug`` in every engine; used by ``case_debug.py`` of each."""

from __future__ import annotations

import logging
import os

import pytest

from dsv4_plugin import envs, log
from dsv4_plugin.ops import dispatch as backends

# Each variable set to nothing, to blanks, and to what none of them can be.
ODD_SETTINGS = [(v.name, text) for v in envs.VARIABLES for text in ("", "  ", "yes")]
odd_settings = pytest.mark.parametrize(
    ("variable", "value"), ODD_SETTINGS, ids=[f"{name}={text!r}" for name, text in ODD_SETTINGS]
)
empty_settings = pytest.mark.parametrize(
    "variable", [v.name for v in envs.VARIABLES if v.name != "DSV4_PLUGIN"]
)


def forget() -> None:
    """Allow every line to be logged again, as in a new process."""
    log._said.clear()
    backends._load.cache_clear()  # the first use of an op is said when its form is loaded


def told(caplog) -> list[str]:
    """Return the lines of the plugin at DEBUG so far."""
    plugin = [r for r in caplog.records if r.name == "dsv4_plugin"]
    return [r.getMessage() for r in plugin if r.levelno == logging.DEBUG]


def check_warned(caplog, variable: str, value: str) -> None:
    """A wrong value without effect is one WARNING; an empty value gives no line."""
    loud = [r for r in caplog.records if r.name == "dsv4_plugin" and r.levelno >= logging.WARNING]
    assert [r.levelno for r in loud] == [logging.WARNING] * bool(value.strip())
    assert all(r.getMessage().startswith(f"{variable} is {value!r}") for r in loud)


def check_logits(text: str) -> None:
    """The first choice of ``auto`` on a CPU with the plugin's torch code; no second one is asked.

    The device, and the implementation of the top-k.
    """
    assert "DSV4_LOGITS=auto, bf16 logits by plugin: yes" in text
    assert "bf16 logits by engine" not in text  # not asked for needlessly
    assert "device cpu: no GPU" in text
    assert "topk on cpu (bfloat16, k 512): torch, as torch was asked for (not cuda: " in text


def check_no_plugin_logits(text: str, can_bf16: bool) -> None:
    """Why the plugin does not write the logits, and after it whether the engine can."""
    by_plugin = text.index("bf16 logits by plugin: no: plugin's logits by torch: the library")
    by_engine = f"bf16 logits by engine: {'yes' if can_bf16 else 'no: deep_gemm.'}"
    assert by_plugin < text.index(by_engine)


def check_process(lines: list[str], engine: str) -> None:
    """The process, the versions, the library, and every setting with its source."""
    text = "\n".join(lines)
    assert f"process {os.getpid()} (parent {os.getppid()})" in text and f" in {engine}: " in text
    assert "versions: dsv4-plugin" in text and "torch 2." in text
    assert "library: " in text and "_C.so" in text
    assert "setting DSV4_LOG = debug (the environment)" in lines
    assert "setting DSV4_STRICT = 0 (the default)" in lines
    for variable in envs.VARIABLES:
        assert f"setting {variable.name} = " in text
    assert len(lines) == len(set(lines))
