"""The adapter against real vLLM code, one process a release.

The cases are in ``host/``; they need an environment of their own (``make_vllm_cpu_env.py``), with
torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` it is made when it is
missing. ``DSV4_VLLM_ENV`` names another folder, ``DSV4_VLLM_VERSIONS`` other releases.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kits.real_client import check
from kits.release_runner import ROOT, environment, run_cases

CASES = Path(__file__).resolve().parent / "host"
MAKE = ROOT / "examples" / "make_vllm_cpu_env.py"
ENV = Path(os.environ.get("DSV4_VLLM_ENV") or ROOT / ".venvs" / "vllm-cpu")
VERSIONS = (os.environ.get("DSV4_VLLM_VERSIONS") or "0.33.0,0.26.0").split(",")
# Between the newest and the oldest: the releases with DeepSeek-V4.1, for its cases alone.
V41_VERSIONS = ["0.32.0", "0.31.0", "0.30.0"]
V41_CASES = "host_candidates.py"
FEWEST_CASES = 120


@pytest.fixture(scope="session")
def python() -> Path:
    return environment(MAKE, ENV, "--versions", ",".join(dict.fromkeys(VERSIONS + V41_VERSIONS)))


def find(python: Path, version: str) -> Path:
    release = ENV / "releases" / version
    if not (python.is_file() and (release / "vllm" / "__init__.py").is_file()):
        pytest.skip(f"no vLLM {version} in {ENV}: python {MAKE.relative_to(ROOT)} makes it")
    return release


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(python: Path, version: str, tmp_path: Path) -> None:
    release = find(python, version)
    report = tmp_path / "report.xml"
    run_cases(f"vLLM {version}", python, CASES, [release], report, FEWEST_CASES, ["VLLM_PLUGINS"])


@pytest.mark.slow
@pytest.mark.parametrize("version", V41_VERSIONS)
def test_deepseek_v41_in_release(python: Path, version: str, tmp_path: Path) -> None:
    release = find(python, version)
    report = tmp_path / "report.xml"
    run_cases(
        f"vLLM {version}", python, CASES, [release], report, 60, ["VLLM_PLUGINS"], [V41_CASES]
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_bench_client(python: Path, version: str, tmp_path: Path) -> None:
    """``vllm bench serve`` takes what ``dsv4-plugin ab`` gives, and answers what ab reads."""
    script = Path(__file__).with_name("bench_client.py")
    check("vllm", python, script, [find(python, version)], tmp_path)
