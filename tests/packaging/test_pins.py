"""The hooks and the environment have the same tools; build and run have the same oldest version."""

from __future__ import annotations

import re

from kits.packaging_tools import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text()
HOOKS = (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_hooks_run_the_pinned_tools() -> None:
    repos = {
        "ruff": "ruff-pre-commit",
        "mypy": "mirrors-mypy",
        "clang-format": "mirrors-clang-format",
    }
    for name, repo in repos.items():
        pinned = re.search(rf'"{name}==([\d.]+)"', PYPROJECT)
        hook = re.search(rf"{repo}\s+rev: v([\d.]+)", HOOKS)
        assert pinned and hook, name
        assert pinned[1] == hook[1], name


def test_the_build_uses_the_floor_of_tvm_ffi() -> None:
    built = re.search(r'requires = \[.*"apache-tvm-ffi==([\d.]+)"', PYPROJECT)
    floor = re.search(r'"apache-tvm-ffi>=([\d.]+),<0\.2"', PYPROJECT)
    assert built and floor and built[1] == floor[1]
