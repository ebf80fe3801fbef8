"""The division of the kernels against the compiler's, compiled and run without a GPU."""

from __future__ import annotations

from pathlib import Path

from kits.packaging_tools import compiled, run


def test_every_quotient_is_the_floor(nvcc: str, tmp_path: Path) -> None:
    done = run([compiled(nvcc, "divisor", tmp_path)], tmp_path)
    assert done.returncode == 0, f"divisor, dividend, quotient: {done.stdout}"
    name, pairs = done.stdout.split()
    assert name == "pairs" and int(pairs) > 1_000_000
