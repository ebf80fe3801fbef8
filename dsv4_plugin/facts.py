"""What the plugin logs about a process: its settings, versions, library and GPU.

Nothing here raises. All lines but one need ``DSV4_LOG=debug``; the exception is the warning that
the compiled library is missing. The adapters call these functions when they are installed and when
they decide something. Each line is logged once.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import dsv4_plugin
from dsv4_plugin import envs, log

if TYPE_CHECKING:
    import torch

__all__ = ["device", "library", "process"]

PACKAGES = ("torch", "triton", "apache-tvm-ffi", "vllm", "sglang", "tokenspeed")
LIBRARY = Path(__file__).resolve().with_name("_C.so")


def process(engine: str) -> None:
    """Log what this process is, and every setting with its origin; imports no torch."""
    if not log.tells_everything():
        return
    try:
        # The program alone: its arguments may hold a key of the API.
        log.debug(
            f"process {os.getpid()} (parent {os.getppid()}) on {platform.node()} in {engine}: "
            f"{sys.argv[0]}"
        )
        log.debug(f"versions: dsv4-plugin {dsv4_plugin.__version__}, {_versions()}")
        log.debug(f"library: {_library()}")
        for name, (value, source) in envs.origins().items():
            log.debug(f"setting {name} = {value} ({source})")
        for name, like in envs.unknown().items():
            log.debug(f"nothing reads {name}" + (f"; did you mean {like}?" if like else ""))
    except Exception as error:  # a log line must not end a server
        log.once(logging.DEBUG, f"this process cannot be described ({error})")


@functools.cache
def _versions() -> str:
    from importlib import metadata

    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


@functools.cache
def _library() -> str:
    """Describe the library file by its size and hash, because it has no version of its own."""
    import hashlib

    if not LIBRARY.is_file():
        return f"{LIBRARY} is missing"
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    return f"{LIBRARY}, {LIBRARY.stat().st_size} bytes, sha256 {digest[:16]}"


def library(capability: tuple[int, int]) -> None:
    """Warn once if the compiled library is missing and it supports the GPU's capability."""
    from dsv4_plugin.kernels import cuda

    missing = cuda.missing()
    if missing and capability in cuda.CAPABILITIES:
        log.once(logging.WARNING, f"the plugin runs without its compiled kernels: {missing}")


def device(device: torch.device) -> None:
    """Log which GPU a decision is about, and whether the library loads in this process.

    A missing library on a GPU that it supports is a warning; the rest is logged at DEBUG. The
    engine has already put tensors on the device, so this call initialises nothing and does not wait
    for the GPU.
    """
    try:
        import torch

        from dsv4_plugin.kernels import cuda

        if device.type == "cuda" and cuda.missing() and torch.cuda.is_initialized():
            library(torch.cuda.get_device_capability(device))
    except Exception as error:  # a log line must not end a server
        log.once(logging.DEBUG, f"device {device} cannot be asked ({error})")
    if not log.tells_everything():
        return
    try:
        import torch

        from dsv4_plugin.kernels import cuda

        log.debug(f"library: {cuda.missing() or f'{LIBRARY.name} is loaded'}")
        if device.type != "cuda":
            log.debug(f"device {device}: no GPU")
        elif torch.cuda.is_initialized():
            gpu = torch.cuda.get_device_properties(device)
            log.debug(
                f"device {device}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
                f"{gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.1f} GiB; torch is "
                f"built for CUDA {torch.version.cuda}"
            )
    except Exception as error:
        log.once(logging.DEBUG, f"device {device} cannot be described ({error})")
