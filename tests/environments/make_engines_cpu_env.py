#!/usr/bin/env python3
"""Build the environment in which real SGLang and TokenSpeed code runs on a CPU, for their tests.

    python tests/environments/make_engines_cpu_env.py [--dir .venvs/engines-cpu]
        [--sglang 0.5.23,0.5.22,0.5.20,0.5.19,0.5.16] [--tokenspeed 0.1.1]

One environment for both engines (torch, triton and some thirty packages, 2.3 GB), and the Python
files of each release (some 60 MB) in `sglang/<version>` and `tokenspeed/<version>`. The plugin
itself is installed from this checkout, editable, with its entry points. It needs Python 3.11 or
later, because SGLang 0.5.22 does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cpu_env import ROOT, build_venv, install_plugin, locked, unpack

DEFAULT_DIR = ROOT / ".venvs" / "engines-cpu"
SGLANG = ("0.5.23", "0.5.22", "0.5.20", "0.5.19", "0.5.16")
# The import of the indexer looks for the sources of its kernels and reads configuration.
SGLANG_FILES = (".py", ".json", ".cu", ".cuh", ".h", ".hpp", ".cpp")
# Release of the runtime -> the kernel package that it was released with.
TOKENSPEED = {"0.1.1": "0.1.4"}

# What the indexers, the command-line parsers and the plugin loaders import when they run.
PACKAGES = (
    "aiohttp",
    "dill",
    "einops",
    "ipython",
    "loguru",
    "msgspec",
    "numpy",
    "openai==2.6.1",
    "orjson",
    "packaging",
    "partial_json_parser",
    "pillow",
    "psutil",
    "pybase64",
    "pydantic",
    "pytest",
    "pyzmq",
    "requests",
    "sentencepiece",
    "starlette",
    "tqdm",
    "transformers==5.12.1",
)
# With their dependencies these would bring another torch, or gigabytes of code that no CPU runs.
WITHOUT_DEPENDENCIES = (
    "apache-tvm-ffi>=0.1.10,<0.2",
    "compressed-tensors==0.18.0",
    "gguf",
    "torchvision==0.28.0",
    "triton==3.7.1",
    "xgrammar==0.2.1",
)


def make(folder: Path, sglang: list[str], tokenspeed: list[str]) -> Path:
    """Make what is missing; return the environment's Python."""
    python = build_venv(folder, PACKAGES, WITHOUT_DEPENDENCIES, "2.3 GB")
    install_plugin(python, folder)
    for version in sglang:
        target = folder / "sglang" / version
        unpack(python, target, f"sglang=={version}", "sglang/__init__.py", SGLANG_FILES)
    for version in tokenspeed:
        target = folder / "tokenspeed" / version
        unpack(python, target / "runtime", f"tokenspeed=={version}", "tokenspeed/__init__.py")
        unpack(
            python, target / "kernel", f"tokenspeed-kernel=={TOKENSPEED[version]}",
            "tokenspeed_kernel/__init__.py",
        )  # fmt: skip
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--sglang", default=",".join(SGLANG))
    parser.add_argument("--tokenspeed", default=",".join(TOKENSPEED))
    arguments = parser.parse_args()
    began = time.monotonic()
    wanted = [
        [v for v in text.split(",") if v] for text in (arguments.sglang, arguments.tokenspeed)
    ]
    folder = arguments.dir.absolute()
    with locked(folder):
        python = make(folder, *wanted)
    print(
        f"{python} with SGLang {arguments.sglang} and TokenSpeed {arguments.tokenspeed} after "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
