#!/usr/bin/env python3
"""Build the environment in which real vLLM code runs on a CPU, for the demo and the vLLM tests.

    python tests/environments/make_vllm_cpu_env.py [--versions 0.33.0,0.26.0] [--dir FOLDER]

`pip install vllm` with its dependencies takes eight minutes and 5.5 GB. Here a release is 59 MB of
Python files in `releases/<version>`, beside an environment of 1.3 GB. The plugin itself is
installed from this checkout, editable, with its entry points.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cpu_env import ROOT, build_venv, install_plugin, locked, unpack

DEFAULT_DIR = ROOT / ".venvs" / "vllm-cpu"
DEFAULT_VERSIONS = ("0.33.0", "0.26.0")

# What the indexer module and the parser of `vllm serve` import when they run.
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
# xgrammar would bring triton, 1 GB that does not run on a CPU.
WITHOUT_DEPENDENCIES = ("apache-tvm-ffi>=0.1.10,<0.2", "xgrammar")


def make(folder: Path, versions: list[str]) -> Path:
    """Make what is missing; return the environment's Python."""
    python = build_venv(folder, PACKAGES, WITHOUT_DEPENDENCIES, "1.3 GB")
    install_plugin(python, folder)
    for version in versions:
        unpack(python, folder / "releases" / version, f"vllm=={version}", "vllm/__init__.py")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--versions", default=",".join(DEFAULT_VERSIONS))
    arguments = parser.parse_args()
    began = time.monotonic()
    folder = arguments.dir.absolute()
    with locked(folder):
        python = make(folder, [v for v in arguments.versions.split(",") if v])
    print(f"{python} with vLLM {arguments.versions} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
