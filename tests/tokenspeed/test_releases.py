"""The adapter against real TokenSpeed code, one process a release.

The cases are in ``host/``; they need an environment of their own (``make_hosts_cpu_env.py``), with
torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` it is made when it is
missing. ``DSV4_HOSTS_ENV`` names another folder, ``DSV4_TOKENSPEED_VERSIONS`` other releases.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from release_runner import ROOT, environment, run_cases

CASES = Path(__file__).resolve().parent / "host"
MAKE = ROOT / "examples" / "make_hosts_cpu_env.py"
ENV = Path(os.environ.get("DSV4_HOSTS_ENV", ROOT / ".venvs" / "hosts-cpu"))
VERSIONS = os.environ.get("DSV4_TOKENSPEED_VERSIONS", "0.1.1").split(",")
FEWEST_CASES = 129


@pytest.fixture(scope="session")
def python() -> Path:
    return environment(MAKE, ENV, "--sglang", "", "--tokenspeed", ",".join(VERSIONS))


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(python: Path, version: str, tmp_path: Path) -> None:
    release = ENV / "tokenspeed" / version
    kernel, runtime = release / "kernel", release / "runtime"
    if not (python.is_file() and (kernel / "tokenspeed_kernel" / "__init__.py").is_file()):
        pytest.skip(f"no TokenSpeed {version} in {ENV}: python {MAKE.relative_to(ROOT)} makes it")
    report = tmp_path / "report.xml"
    run_cases(
        f"TokenSpeed {version}", python, CASES, [runtime, kernel], report, FEWEST_CASES,
        ["TOKENSPEED_"],
    )  # fmt: skip
