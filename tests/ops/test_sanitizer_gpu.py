"""compute-sanitizer on a case for each path of the kernels: none of its tools finds an error.

The cases are in sanitizer_driver.py. Some run with a fault made on purpose, which the tools must
find. So a clean report means that the tools did check the kernels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT
from kits.sanitizer_driver import CASES

pytestmark = pytest.mark.gpu

FOUND = 99  # the exit code for errors that a tool found
DRIVER = ROOT / "tests" / "kits" / "sanitizer_driver.py"
# "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
CLEAN = re.compile(r"(ERROR SUMMARY: 0 error|RACECHECK SUMMARY: 0 hazard)s?\b")
OPTIONS = {
    # The probe for the largest cluster asks for one that the device may not have.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    # An answer that is copied to the host must have been written, every slot of it.
    "initcheck": ["--check-api-memory-access", "yes"],
    "synccheck": [],
}


def sanitizer() -> str:
    """The path of compute-sanitizer: on PATH, in the toolkit, or as a package of pip."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("compute-sanitizer")]
    found += [shutil.which("compute-sanitizer", path=f"{home}/bin") for home in homes if home]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        found += map(str, sorted(Path(folder).glob("*/bin/compute-sanitizer")))
    for path in found:
        if path:
            return path
    pytest.skip("no compute-sanitizer on PATH, in the CUDA toolkit or among the packages of pip")


def run(tool: str, *arguments: str) -> tuple[int, str]:
    """Run the driver under a tool; returns the exit code and all that was printed."""
    command = [
        sanitizer(), "--tool", tool, *OPTIONS[tool],
        "--kernel-name", "kernel_substring=dsv4",  # the namespace: none of torch's kernels
        "--target-processes", "application-only", "--launch-timeout", "120",
        "--error-exitcode", str(FOUND), "--print-limit", "20", "--show-backtrace", "no",
        sys.executable, str(DRIVER), *arguments,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("tool", OPTIONS)
def test_the_tool_finds_nothing(tool: str) -> None:
    code, said = run(tool)
    assert f"{len(CASES)} cases done" in said, f"the driver did not finish:\n{said[-4000:]}"
    assert code == 0 and CLEAN.search(said), f"{tool} found errors:\n{said[-8000:]}"


@pytest.mark.parametrize("case", ["one CTA", "paged, one long row"])
@pytest.mark.parametrize(
    "tool,plant", [("memcheck", "outside"), ("initcheck", "uninitialised")], ids=lambda x: str(x)
)
def test_the_tool_finds_a_planted_mistake(tool: str, plant: str, case: str) -> None:
    code, said = run(tool, "--plant", plant, "--only", case)
    assert code == FOUND, f"{tool} did not see a planted mistake (exit {code}):\n{said[-4000:]}"
    assert not CLEAN.search(said), said[-4000:]
