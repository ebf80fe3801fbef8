"""Fixtures, and the rule for skips: what is meant to run here must not be skipped.

Tests marked `gpu` run where a CUDA device is (`make test-gpu`) and are left for it elsewhere. Under
`DSV4_CI=1` any other skip, unless its reason is in ALLOWED_SKIPS, fails the run, and the summary
says how many tests were left for the GPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # oracles.py and other helpers of the tests
GPU = torch.cuda.is_available()
if not GPU:
    # Triton kernels run on CPU tensors; must be said before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
ALLOWED_SKIPS = ("no nvcc",)
_left: list[str] = []
_forbidden: list[str] = []


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No test depends on the DSV4_* variables of the shell that runs it."""
    for name in list(os.environ):
        if name.startswith("DSV4_") and name not in ("DSV4_CI", "DSV4_BUILD_CUDA"):
            monkeypatch.delenv(name)


def pytest_generate_tests(metafunc):
    """`backend` and `device` come together: each implementation where it runs."""
    if {"backend", "device"} <= set(metafunc.fixturenames):
        kinds = getattr(metafunc.module, "BACKENDS", ("torch", "triton"))
        on_cpu = [b for b in kinds if b == "torch" or (b == "triton" and not GPU)]
        cases = [pytest.param(b, "cpu", id=f"{b}-cpu") for b in on_cpu]
        cases += [pytest.param(b, "cuda", id=f"{b}-cuda", marks=pytest.mark.gpu) for b in kinds]
        metafunc.parametrize("backend,device", cases)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "gpu" in report.keywords:
        _left.append(report.nodeid)
    elif not any(allowed in reason for allowed in ALLOWED_SKIPS):
        _forbidden.append(f"{report.nodeid}: {reason}")


def pytest_terminal_summary(terminalreporter):
    if _left:
        terminalreporter.write_line(
            f"{len(_left)} tests left for a machine with a GPU (`make test-gpu` runs them there)"
        )
    if _forbidden and os.environ.get("DSV4_CI") == "1":
        terminalreporter.section("skipped, but meant to run here")
        for line in _forbidden:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session):
    if _forbidden and os.environ.get("DSV4_CI") == "1" and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
