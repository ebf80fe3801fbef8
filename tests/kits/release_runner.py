"""Run the cases of one folder inside one release of an engine, in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def versions(variable: str, default: str) -> list[str]:
    """Return the releases that an environment variable names, or the default."""
    return (os.environ.get(variable) or default).split(",")


@dataclasses.dataclass(frozen=True)
class Releases:
    """The releases of one engine, and the Python environment that they share.

    ``paths`` are the folders of a release in it, ``arguments`` those of its maker in ``examples/``.
    ``DSV4_ENGINES_ENV`` or ``DSV4_VLLM_ENV`` names another environment. Variables that begin with
    ``drop`` do not reach a release.
    """

    engine: str
    environment: str  # "engines" or "vllm"
    paths: tuple[str, ...]
    arguments: tuple[str, ...]
    drop: str

    @property
    def folder(self) -> Path:
        """The environment."""
        given = os.environ.get(f"DSV4_{self.environment.upper()}_ENV")
        return Path(given or ROOT / ".venvs" / f"{self.environment}-cpu")

    @functools.cached_property
    def python(self) -> Path:
        """The Python of the environment; under CI the environment is made if it is missing."""
        if os.environ.get("DSV4_CI") == "1":
            command = [sys.executable, ROOT / self.maker, "--dir", self.folder, *self.arguments]
            subprocess.run([str(part) for part in command], check=True)
        return self.folder / "bin" / "python"

    @property
    def maker(self) -> str:
        """The script that makes the environment."""
        return f"tests/environments/make_{self.environment}_cpu_env.py"

    def find(self, version: str) -> list[Path]:
        """Return the folders of a release; skip the test if they are missing."""
        found = [self.folder / path.format(version) for path in self.paths]
        if not (self.python.is_file() and all(path.is_dir() for path in found)):
            pytest.skip(
                f"no {self.engine} {version} in {self.folder}: python {self.maker} makes it"
            )
        return found

    def run_cases(
        self,
        version: str,
        cases: Path,
        report: Path,
        fewest: int,
        files: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Run ``case_*.py`` of ``cases``, or these ``files`` of it; every case must pass.

        ``more``: variables that the run gets.
        """
        label, paths = f"{self.engine} {version}", self.find(version)
        files = files or sorted(path.name for path in cases.glob("case_*.py"))
        # -c and --confcutdir: the settings and hooks of this run are not the release's.
        run = subprocess.run(
            [
                self.python, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.",
                "--confcutdir=.", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short",
                *files,
            ],
            cwd=cases,
            env={**_environ(paths, self.drop), **(more or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, f"{label}:\n{run.stdout[-20_000:]}"
        (suite,) = ET.parse(report).getroot().iter("testsuite")
        counts = {k: int(suite.get(k, "0")) for k in ("tests", "skipped", "failures", "errors")}
        print(f"{label}: {counts['tests']} cases in {suite.get('time')} s")
        assert counts["tests"] >= fewest
        assert counts["skipped"] == counts["failures"] == counts["errors"] == 0

    def run_driver(
        self,
        version: str,
        file: Path,
        budget: float | None = None,
        options: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run ``benchmarks.engines --part forward`` dry inside a release; return its results.

        With a ``budget`` it may be incomplete. ``options``: more of the command's. ``more``:
        variables that it gets.
        """
        paths = self.find(version)
        run = subprocess.run(
            [
                self.python, "-m", "benchmarks.engines", "--part", "forward",
                "--engine", self.engine.lower(), "--device", "cpu",
                "--json", file, "--site", *paths, *options,
                *([] if budget is None else ["--budget", str(budget)]),
            ],
            env={**_environ([], self.drop), **(more or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-20_000:]
        found: dict[str, Any] = json.loads(file.read_text())
        assert budget is not None or found["complete"]
        assert found["complete"] is not bool(found["not_run"]) and not found["failed"]
        assert found["stands_in"] and all(row["right"] for row in found["results"])
        return found


def _environ(paths: Sequence[Path], drop: str) -> dict[str, str]:
    dropped = ("DSV4_", "PYTEST_", "COV_", "TRITON_", drop)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    # The checkout: the cases judge this tree even if the environment was made from another one.
    keep["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests")))
    keep["CUDA_VISIBLE_DEVICES"] = ""
    keep["OMP_NUM_THREADS"] = "1"  # two releases run at a time
    return keep
