"""CI accepts no skip that is not on the list: skip_policy.py, run on small test files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT
from kits.skip_policy import ALLOWED_SKIPS


def run_pytest(folder: Path, body: str, *args: str, ci: bool) -> tuple[int, str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n")
    (folder / "test_it.py").write_text(f"import pytest\ndef test_ok(): pass\n{body}\n")
    env = {
        **os.environ,
        "DSV4_CI": "1" if ci else "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}/tests",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kits.skip_policy", *args, str(folder)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


BODIES = {
    "in the test": "def test_x(): pytest.skip('some reason')",
    "by a mark": "@pytest.mark.skip(reason='some reason')\ndef test_x(): pass",
    "of the module": "pytest.skip('some reason', allow_module_level=True)",
    "of an import": "pytest.importorskip('no_such_module', reason='some reason')",
}


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_an_unknown_skip_fails_ci_and_only_ci(tmp_path: Path, body: str, workers: str) -> None:
    code, said = run_pytest(tmp_path, body, workers, ci=True)
    assert code == 1, said
    assert "FORBIDDEN SKIP" in said and "some reason" in said
    # A module that skips itself leaves nothing to run: exit code 5 is pytest's own.
    code, said = run_pytest(tmp_path, body, workers, ci=False)
    assert code == (5 if "test_x" not in body else 0), said
    assert "skipped, 1 tests: some reason" in said


def test_an_allowed_skip_passes_ci_and_is_printed(tmp_path: Path) -> None:
    reason = ALLOWED_SKIPS[0]
    code, said = run_pytest(tmp_path, f"def test_x(): pytest.skip({reason!r})", ci=True)
    assert code == 0, said
    assert reason in said and "FORBIDDEN" not in said


@pytest.mark.parametrize("workers", ["-n0", "-n1"])
def test_gpu_tests_are_left_and_counted(tmp_path: Path, workers: str) -> None:
    body = "@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(3))\ndef test_x(i): assert False"
    code, said = run_pytest(tmp_path, body, workers, ci=True)
    assert code == 0, said
    assert "3 tests left for the GPU machine" in said


def test_require_gpu_fails_without_a_device(tmp_path: Path) -> None:
    body = "@pytest.mark.gpu\ndef test_x(): pass"
    code, said = run_pytest(tmp_path, body, "--require-gpu", ci=False)
    assert code != 0
    assert "1 tests need one" in said


def test_the_results_file_counts_the_tests_and_names_what_failed(tmp_path: Path) -> None:
    body = "def test_x(): pass\n\ndef test_y(): assert False"
    file = tmp_path / "suite.json"
    code, _ = run_pytest(tmp_path, body, "--results", str(file), ci=False)
    found = json.loads(file.read_text())
    assert code != 0 and found["tests"] == {"passed": 2, "failed": 1, "error": 0, "skipped": 0}
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_y"]
