"""``make check-wheel``'s script without its downloads: what it looks for fails when it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT, check, run

SCRIPT = ROOT / "tests" / "packaging" / "check_wheel.py"


def probe() -> str:
    names: dict[str, object] = {"__name__": "check_wheel"}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), names)  # noqa: S102  # our own text
    return str(names["PROBE"])


def test_a_wheel_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = run([sys.executable, SCRIPT, tmp_path / "x.whl", "torch==2.13.0"], tmp_path)
    assert done.returncode == 2
    assert "x.whl; `make wheel` builds it" in done.stderr


def test_the_probe_passes_on_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    done = check([sys.executable, "-c", probe()], tmp_path, {"PYTHONPATH": str(installed)})
    assert "is exact" in done.stdout


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
