"""The adapter against real vLLM code, one process for each release.

The cases are in ``cases/``. They need an environment of their own (``make_vllm_cpu_env.py``), with
torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` the tests make it if it
is missing. ``DSV4_VLLM_ENV`` names another folder, ``DSV4_VLLM_VERSIONS`` other releases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kits.real_client import check
from kits.release_runner import Releases, versions

CASES = Path(__file__).resolve().parent / "cases"
VERSIONS = versions("DSV4_VLLM_VERSIONS", "0.33.0,0.26.0")
# Between the newest and the oldest: the releases with DeepSeek-V4.1, for its cases alone.
V41_VERSIONS = ["0.32.0", "0.31.0", "0.30.0"]
V41_CASES = ["case_candidates.py"]
# 0.31 is the last release that does not shard the rows of a prefill itself.
ALSO = {"0.30.0": ["case_candidates_shadow.py"], "0.31.0": ["case_shard.py"]}
RELEASES = Releases(
    "vLLM", "vllm", ("releases/{}",),
    ("--versions", ",".join(dict.fromkeys(VERSIONS + V41_VERSIONS))), "VLLM_PLUGINS",
)  # fmt: skip
FEWEST_CASES = 120


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(version: str, tmp_path: Path) -> None:
    RELEASES.run_cases(version, CASES, tmp_path / "report.xml", FEWEST_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("version", V41_VERSIONS)
def test_deepseek_v41_in_release(version: str, tmp_path: Path) -> None:
    files = [*V41_CASES, *ALSO.get(version, [])]
    RELEASES.run_cases(version, CASES, tmp_path / "report.xml", 60, files)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_bench_client(version: str, tmp_path: Path) -> None:
    """``vllm bench serve`` takes what ``dsv4-plugin ab`` gives, and answers what ab reads."""
    script = Path(__file__).with_name("bench_client.py")
    check("vllm", RELEASES.python, script, RELEASES.find(version), tmp_path)
