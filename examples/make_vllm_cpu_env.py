#!/usr/bin/env python3
"""Build the environment in which real vLLM code runs on a CPU, for the demo and the vLLM tests.

    python examples/make_vllm_cpu_env.py [--dir .venvs/vllm-cpu] [--versions 0.33.0,0.26.0]

One virtual environment holds torch (CPU) and the few packages that vLLM's indexer and command line
import; `pip install vllm` with its dependencies takes eight minutes and 5.5 GB and then needs a
GPU. Each vLLM release is its own wheel, downloaded by pip, of which the Python files are unpacked
to `releases/<version>` (59 MB); a release is used by putting that folder on PYTHONPATH. The plugin
itself is installed from this checkout, editable, with its entry point.

What exists is kept, so a second run takes a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DIR = ROOT / ".venvs" / "vllm-cpu"
DEFAULT_VERSIONS = ("0.33.0", "0.26.0")

TORCH = "torch==2.13.0"
# What the indexer module and `vllm serve`'s parser import, by running them.
PACKAGES = (
    "aiohttp",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "einops",
    "fastapi>=0.133,<0.137",
    "llguidance",
    "msgspec",
    "numpy",
    "openai",
    "openai-harmony",
    "packaging",
    "partial-json-parser",
    "pillow",
    "prometheus_client",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pytest",
    "pyzmq",
    "regex",
    "requests",
    "transformers",
    "uvloop",
)
# xgrammar would bring triton, 1 GB, of which nothing runs on a CPU.
WITHOUT_DEPENDENCIES = ("apache-tvm-ffi>=0.1.10,<0.2", "xgrammar")


def run(*command: object, **env: str) -> None:
    subprocess.run([str(c) for c in command], check=True, env={**os.environ, **env})


def build_venv(folder: Path) -> Path:
    """Create the environment with its packages unless it is there in this very form."""
    python = folder / "bin" / "python"
    wanted = "\n".join((TORCH, *PACKAGES, *WITHOUT_DEPENDENCIES, sys.version.split()[0]))
    stamp = folder / ".packages"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    print(f"making {folder}: torch for the CPU and {len(PACKAGES)} packages (1.3 GB)", flush=True)
    venv.EnvBuilder(clear=True, with_pip=True).create(folder)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # The CPU build where the index has one; PyPI's own carries the CUDA libraries (2.5 GB more).
    cpu = "https://download.pytorch.org/whl/cpu"
    attempt = subprocess.run(
        [*map(str, pip), "--index-url", cpu, "--timeout", "20", "--retries", "1", TORCH],
        stderr=subprocess.DEVNULL,
    )
    if attempt.returncode:
        run(*pip, TORCH)
    run(*pip, *PACKAGES)
    run(*pip, "--no-deps", *WITHOUT_DEPENDENCIES)
    stamp.write_text(digest)
    return python


def install_plugin(python: Path, folder: Path) -> None:
    """Install the checkout, editable: `vllm.general_plugins` is found by its metadata."""
    stamp = folder / ".plugin"
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print("installing the plugin from this checkout", flush=True)
    run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--editable", ROOT, DSV4_BUILD_CUDA="0",
    )  # fmt: skip
    stamp.write_text(digest)


def unpack_release(python: Path, folder: Path, version: str) -> Path:
    """Download one vLLM wheel and keep its Python files and metadata."""
    target = folder / "releases" / version
    if (target / "vllm" / "__init__.py").is_file():
        return target
    print(f"fetching vLLM {version} (300 MB, of which 59 MB are kept)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        run(
            python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-cache-dir", "--dest", scratch, f"vllm=={version}",
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
            archive.extractall(unpacked, names)
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    return target


def make(folder: Path, versions: list[str]) -> Path:
    """Make what is missing; returns the environment's Python."""
    python = build_venv(folder)
    install_plugin(python, folder)
    for version in versions:
        unpack_release(python, folder, version)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--versions", default=",".join(DEFAULT_VERSIONS))
    arguments = parser.parse_args()
    began = time.monotonic()
    python = make(arguments.dir.absolute(), [v for v in arguments.versions.split(",") if v])
    print(f"{python} with vLLM {arguments.versions} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
