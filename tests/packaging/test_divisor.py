"""The division of the kernels against the compiler's; compiled, and run without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

from packaging_tools import ROOT


def test_every_quotient_is_the_floor(nvcc: str, tmp_path: Path) -> None:
    program = tmp_path / "divisor"
    source = ROOT / "tests" / "packaging" / "divisor.cu"
    command = [nvcc, "-std=c++17", "-arch=sm_90a", "-I", ROOT / "csrc" / "include", source]
    subprocess.run([*command, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, f"divisor, dividend, quotient: {done.stdout}"
    name, pairs = done.stdout.split()
    assert name == "pairs" and int(pairs) > 1_000_000
