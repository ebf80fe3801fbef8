"""The adapter against real vLLM code, one process a release.

The cases are in ``host/``; they need an environment of their own (``make_vllm_cpu_env.py``), with
torch for the CPU and the Python files of each release. Under ``DSV4_CI=1`` it is made when it is
missing. ``DSV4_VLLM_ENV`` names another folder, ``DSV4_VLLM_VERSIONS`` other releases.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).resolve().parent / "host"
MAKE = ROOT / "examples" / "make_vllm_cpu_env.py"
ENV = Path(os.environ.get("DSV4_VLLM_ENV", ROOT / ".venvs" / "vllm-cpu"))
VERSIONS = os.environ.get("DSV4_VLLM_VERSIONS", "0.33.0,0.26.0").split(",")
FEWEST_CASES = 120


@pytest.fixture(scope="session")
def environment() -> Path:
    """Return the environment's Python, made first where CI asks for it."""
    if os.environ.get("DSV4_CI") == "1":
        command = [sys.executable, MAKE, "--dir", ENV, "--versions", ",".join(VERSIONS)]
        subprocess.run([str(part) for part in command], check=True)
    return ENV / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_release(environment: Path, version: str, tmp_path: Path) -> None:
    release = ENV / "releases" / version
    if not (environment.is_file() and (release / "vllm" / "__init__.py").is_file()):
        pytest.skip(f"no vLLM {version} in {ENV}: python {MAKE.relative_to(ROOT)} makes it")
    report = tmp_path / "report.xml"
    files = sorted(path.name for path in CASES.glob("host_*.py"))
    # -c and --confcutdir: the settings and hooks of this run are not the release's.
    run = subprocess.run(
        [
            environment, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "--confcutdir=.",
            "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short", *files,
        ],
        cwd=CASES,
        env=_environ(release),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, f"vLLM {version}:\n{run.stdout[-20_000:]}"
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    print(f"vLLM {version}: {counts['tests']} cases in {suite.get('time')} s")
    assert counts["tests"] >= FEWEST_CASES
    assert counts["skipped"] == counts["failures"] == counts["errors"] == 0


def _environ(release: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "PYTEST_", "COV_"))}
    keep.pop("VLLM_PLUGINS", None)
    # The checkout: the cases judge this tree even if the environment was made from another one.
    keep["PYTHONPATH"] = os.pathsep.join((str(release), str(ROOT)))
    keep["CUDA_VISIBLE_DEVICES"] = ""
    keep["OMP_NUM_THREADS"] = "2"
    return keep
