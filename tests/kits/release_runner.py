"""Run the cases of one folder inside one release of an engine, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(maker: Path, folder: Path, *arguments: str) -> Path:
    """Return the Python of an environment, made first where CI asks for it."""
    if os.environ.get("DSV4_CI") == "1":
        command = [sys.executable, maker, "--dir", folder, *arguments]
        subprocess.run([str(part) for part in command], check=True)
    return folder / "bin" / "python"


def run_cases(
    label: str, python: Path, cases: Path, paths: Sequence[Path], report: Path, fewest: int,
    drop: Sequence[str] = (), files: Sequence[str] = (),
) -> None:  # fmt: skip
    """Run ``host_*.py`` of ``cases``, or these ``files`` of it; every case must pass.

    ``paths`` come first on the path.
    """
    files = files or sorted(path.name for path in cases.glob("host_*.py"))
    # -c and --confcutdir: the settings and hooks of this run are not the release's.
    run = subprocess.run(
        [
            python, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "--confcutdir=.",
            "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short", *files,
        ],
        cwd=cases,
        env=_environ(paths, drop),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, f"{label}:\n{run.stdout[-20_000:]}"
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    print(f"{label}: {counts['tests']} cases in {suite.get('time')} s")
    assert counts["tests"] >= fewest
    assert counts["skipped"] == counts["failures"] == counts["errors"] == 0


def run_driver(
    engine: str,
    python: Path,
    paths: Sequence[Path],
    file: Path,
    drop: Sequence[str] = (),
    budget: float | None = None,
) -> dict[str, Any]:
    """Run ``benchmarks.engines --part forward`` dry inside one release; returns what it found.

    With a ``budget`` it may be incomplete.
    """
    run = subprocess.run(
        [
            python, "-m", "benchmarks.engines", "--part", "forward", "--engine", engine,
            "--device", "cpu",
            "--json", file, "--site", *paths,
            *([] if budget is None else ["--budget", str(budget)]),
        ],
        env=_environ([], drop),
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


def _environ(paths: Sequence[Path], drop: Sequence[str]) -> dict[str, str]:
    own = ("DSV4_", "PYTEST_", "COV_", "TRITON_", *drop)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    # The checkout: the cases judge this tree even if the environment was made from another one.
    keep["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT, ROOT / "tests")))
    keep["CUDA_VISIBLE_DEVICES"] = ""
    keep["OMP_NUM_THREADS"] = "2"
    return keep
