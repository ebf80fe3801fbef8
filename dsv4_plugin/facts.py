"""What ``DSV4_LOG=debug`` says of a process: its settings, versions, library and GPU.

Nothing here raises. But for the warning of a missing library nothing runs unless that level is in
force. The adapters call it where they
are installed and where something is decided; what was said once is not said again.
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
    """Say what this process is, and every setting with where it came from; imports no torch."""
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
            log.debug(f"{name} is read by nobody" + (f"; did you mean {like}?" if like else ""))
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
    """Name the file by what is in it: it has no version of its own but the package's."""
    import hashlib

    if not LIBRARY.is_file():
        return f"{LIBRARY} is not there"
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    return f"{LIBRARY}, {LIBRARY.stat().st_size} bytes, sha256 {digest[:16]}"


def library(capability: tuple[int, int]) -> None:
    """Warn once where the compiled library is missing on a GPU of a capability that it is for."""
    from dsv4_plugin.kernels import cuda

    missing = cuda.missing()
    if missing and capability in cuda.CAPABILITIES:
        log.once(logging.WARNING, f"the plugin runs without its compiled kernels: {missing}")


def device(device: torch.device) -> None:
    """Say what GPU a decision is about, and whether the library loads in this process.

    A library that is missing on a GPU that it is for is a warning; the rest is said at DEBUG. The
    engine has put tensors there already: nothing is initialised, nothing waits for the GPU.
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
