"""Shared by all tests: the skip policy, hypothesis' profiles, the devices of the backends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from kits.skip_policy import has_cuda, pytest_addoption, pytest_configure  # noqa: F401  # hooks

# Timing on a busy two-core machine says nothing; in CI the same examples come every time.
hypothesis_settings.register_profile("default", deadline=None)
hypothesis_settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis_settings.load_profile("ci" if os.environ.get("DSV4_CI") == "1" else "default")

if not has_cuda():
    # Triton kernels run on CPU tensors; to be said before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The files that take the most time, in this order: with one worker for each file (`make test`) the
# others fill up what these leave.
LONGEST = (
    "engines/sglang/test_releases.py",
    "engines/vllm/test_releases.py",
    "packaging/test_library.py",
    "fuzz/test_fuzz.py",
    "engines/tokenspeed/test_releases.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first."""
    root = Path(__file__).parent
    first = {root / name: place for place, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in first), "a file of LONGEST is gone"
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture(autouse=True)
def _no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the plugin's variables in the shell that runs it."""
    from dsv4_plugin.envs import VARIABLES

    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` and ``device`` come together: each implementation where it runs.

    The CUDA kernels run on a GPU only, the Triton kernels on a CPU only through the interpreter.
    """
    if {"backend", "device"} <= set(metafunc.fixturenames):
        kinds = getattr(metafunc.module, "BACKENDS", ("torch", "triton"))
        on_cpu = [b for b in kinds if b == "torch" or (b == "triton" and not has_cuda())]
        cases = [pytest.param(b, "cpu", id=f"{b}-cpu") for b in on_cpu]
        cases += [pytest.param(b, "cuda", id=f"{b}-cuda", marks=pytest.mark.gpu) for b in kinds]
        metafunc.parametrize("backend,device", cases)


@pytest.fixture
def peers_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The ``PEERS`` of a test module as the file that ``bench --peers`` takes."""
    file = tmp_path / "peers.py"
    file.write_text(request.module.PEERS)
    return file
