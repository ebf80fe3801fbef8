"""``make check-wheel``'s script without its downloads: it fails for each fault that it covers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from kits.packaging_tools import ROOT, check, run

SCRIPT = ROOT / "tests" / "packaging" / "check_wheel.py"


def script() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "check_wheel", "__file__": str(SCRIPT)}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), names)  # noqa: S102  # our own text
    return names


def probe() -> str:
    return str(script()["PROBE"])


def test_a_wheel_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = run([sys.executable, SCRIPT, tmp_path / "x.whl", "torch==2.13.0"], tmp_path)
    assert done.returncode == 2
    assert "x.whl; `make wheel` builds it" in done.stderr


def test_the_probe_passes_on_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    done = check([sys.executable, "-c", probe()], tmp_path, {"PYTHONPATH": str(installed)})
    assert "is exact" in done.stdout


def test_the_fuzzer_tries_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    script()["link_tools"](tmp_path)
    environment = {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    done = check([sys.executable, "-m", "tests.fuzz", "--cases", "3"], tmp_path, environment)
    assert "0 failures; " in done.stdout
    # A package with a fault, in the place of the installed one, is the one that is tried.
    (tmp_path / "wrong" / "dsv4_plugin").mkdir(parents=True)
    (tmp_path / "wrong" / "dsv4_plugin" / "__init__.py").write_text("raise OSError('this one')\n")
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "3"]
    done = run(command, tmp_path, {"PYTHONPATH": str(tmp_path / "wrong")})
    assert done.returncode and "this one" in done.stderr


@pytest.mark.parametrize(
    ("argument", "damage", "said"),
    [
        ("library", "", "is not in this installation"),  # the wheel has no kernels
        ("", "sort(descending=False", "AssertionError: "),  # another oracle
    ],
)
def test_the_probe_fails_where_it_should(
    argument: str, damage: str, said: str, installed: Path, tmp_path: Path
) -> None:
    code = probe()
    if damage:
        assert "sort(descending=True" in code
        code = code.replace("sort(descending=True", damage)
    command = [sys.executable, "-c", code, *filter(None, [argument])]
    done = run(command, tmp_path, {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert said in done.stderr
