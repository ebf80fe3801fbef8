"""The process facts in ``DSV4_LOG=debug``; ``case_debug.py`` tests its seams and decisions."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kits.own_process import run_alone

from dsv4_plugin import envs, facts, log
from dsv4_plugin.kernels import cuda

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(envs, "_put", set())
    level = log.logger.level
    envs.override(None)
    yield
    envs.override(None)
    log.logger.setLevel(level)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A Hopper GPU that torch has initialised already."""
    asked = types.SimpleNamespace(initialized=True, times=0)
    properties = types.SimpleNamespace(
        name="NVIDIA H20", major=9, minor=0, multi_processor_count=78, total_memory=96 * 2**30
    )

    def ask(device: torch.device) -> types.SimpleNamespace:
        asked.times += 1
        return properties

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: asked.initialized)
    monkeypatch.setattr(torch.cuda, "get_device_properties", ask)
    return asked


def test_the_gpu_and_its_sms(gpu: types.SimpleNamespace, lines: Callable[[], list[str]]) -> None:
    facts.device(GPU)
    assert "device cuda:0: NVIDIA H20, compute capability 9.0, 78 SMs, 96.0 GiB; " in "\n".join(
        lines()
    )
    assert "library: " in "\n".join(lines())


def test_a_gpu_is_never_initialised(
    gpu: types.SimpleNamespace, lines: Callable[[], list[str]]
) -> None:
    gpu.initialized = False
    facts.device(GPU)
    assert gpu.times == 0 and "cuda:0" not in "\n".join(lines())


@pytest.mark.parametrize(
    ("major", "missing", "warned"),
    [
        (9, "it was built without nvcc", True),
        (8, "it was built without nvcc", False),
        (9, None, False),
    ],
)
def test_a_missing_library_on_a_gpu_that_it_is_for_is_a_warning(
    major: int,
    missing: str | None,
    warned: bool,
    gpu: types.SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there at DSV4_LOG=warning too, once, and before any other line of a decision."""
    caplog.set_level(logging.WARNING, logger="dsv4_plugin")
    monkeypatch.setattr(cuda, "missing", lambda: missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for _ in range(3):
        facts.device(GPU)
    facts.device(torch.device("cpu"))
    said = [(r.levelno, r.getMessage()) for r in caplog.records]
    want = "the plugin runs without its compiled kernels: it was built without nvcc"
    assert said == [(logging.WARNING, want)] * warned


def test_a_missing_library_names_the_command_that_repairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_C.so")
    cuda._module.cache_clear()
    try:
        assert "DSV4_BUILD_CUDA=1 pip install --force-reinstall --no-deps ." in str(cuda.missing())
    finally:
        cuda._module.cache_clear()


def test_a_machine_that_cannot_be_described_ends_nothing(
    gpu: types.SimpleNamespace, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: 1 / 0)
    monkeypatch.setattr(envs, "origins", lambda: 1 / 0)
    facts.device(GPU)
    facts.process("vLLM")
    assert "device cuda:0 cannot be described (division by zero)" in "\n".join(lines())
    assert "this process cannot be described (division by zero)" in "\n".join(lines())


def test_the_arguments_of_the_process_are_not_told(
    lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/vllm", "serve", "MODEL", "--api-key", "secret"])
    facts.process("vLLM")
    assert any(line.endswith(" in vLLM: /bin/vllm") for line in lines())
    assert "secret" not in "\n".join(lines())


def test_nothing_is_looked_at_below_debug(
    gpu: types.SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: None)
    caplog.set_level(logging.INFO, logger="dsv4_plugin")
    facts.device(GPU)
    facts.process("vLLM")
    assert gpu.times == 0 and caplog.records == []


def test_a_thing_is_said_once_and_not_lost_to_a_level(
    caplog: pytest.LogCaptureFixture, lines: Callable[[], list[str]]
) -> None:
    log.logger.setLevel(logging.INFO)
    log.debug("a thing")
    log.logger.setLevel(logging.DEBUG)
    log.debug("a thing")
    log.debug("a thing")
    assert lines() == ["a thing"]


def test_where_each_setting_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    monkeypatch.setenv("DSV4_LOGITS", "ours")
    monkeypatch.delenv("DSV4_BACKEND", raising=False)
    envs.override({"topk": "fp32", "strict": True})
    envs.put("indexer_read", "off")
    found = envs.origins()
    assert found["DSV4_TOPK"] == ("fp32", "additional_config['dsv4']")
    assert found["DSV4_STRICT"] == ("1", "additional_config['dsv4']")
    assert found["DSV4_LOGITS"] == ("ours", "the environment, where it is wrong")
    assert found["DSV4_BACKEND"] == ("auto", "the default")
    assert found["DSV4_INDEXER_READ"] == ("off", "the command line")
    assert list(found) == [v.name for v in envs.VARIABLES]


def test_the_kill_switch_is_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    envs.override({"plugin": True})
    assert envs.origins()["DSV4_PLUGIN"] == ("0", "the environment")


ALONE = """
import torch, dsv4_plugin
for _ in range(3):
    dsv4_plugin.topk(torch.randn(2, 600), torch.tensor([600, 3], dtype=torch.int32), 512)
"""


def test_ops_that_are_called_outside_of_an_engine_tell_who_serves(tmp_path: Path) -> None:
    said = run_alone(ALONE, tmp_path, DSV4_LOG="debug").splitlines()
    (line,) = [line for line in said if "topk on cpu" in line]
    assert "[dsv4 pid " in line and "(float32, k 512): torch (not cuda: " in line
    assert "topk on cpu" not in run_alone(ALONE, tmp_path, DSV4_LOG="info")
