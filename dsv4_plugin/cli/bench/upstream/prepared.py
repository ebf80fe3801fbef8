"""Tensors that an engine's call needs beside its arguments, made before a capture.

An engine keeps its workspaces and makes its plans once per step, not once per layer. A benchmark
first calls every kernel eagerly with the tensors that it captures. That eager call makes these
tensors, outside the timed part.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Hashable
from importlib import metadata
from typing import Any, TypeVar

import torch

from dsv4_plugin.cli.checks.topk_cases import PAGE_SIZE

__all__ = [
    "Maker", "Prepared", "capturing", "imported", "lengths_of", "need", "reason", "release",
    "schedule_of", "tried", "zeros_for",
]  # fmt: skip

T = TypeVar("T")
# returns a kernel, or raises with the reason why there is none
Maker = Callable[[], Callable[..., Any]]


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Prepared:
    """Tensors that were made for a key; a capture finds them and makes nothing.

    ``most`` limits how many are held; the least recently used one is dropped first.
    """

    def __init__(self, what: str, most: int = 256) -> None:
        self._what, self._most = what, most
        self._held: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the tensor held for ``key``; an eager call makes it if there is none."""
        if key not in self._held:
            if capturing():
                raise RuntimeError(f"{self._what}: call once eagerly before a capture")
            while len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            self._held[key] = make()
        held = self._held.pop(key)
        self._held[key] = held
        return held

    def anew(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a copy of what ``make`` gives; each eager call makes it again in the same memory.

        Its source may have changed in place since; a capture keeps the content that is there.
        """
        if key in self._held and not capturing():
            self._held[key].copy_(make())
        return self.get(key, lambda: make().clone())


def need(condition: bool, what: str) -> None:
    """Raise with the limit of a kernel if a call is outside of it."""
    if not condition:
        raise ValueError(what)


def imported(name: str) -> Any:
    """Import a module of an engine.

    Raises:
        LookupError: it is not installed, or it cannot be imported; the message says why.
    """
    package = name.partition(".")[0]
    try:
        if not _there(package):
            raise LookupError("it is not installed here")
        return importlib.import_module(name)
    except LookupError:
        raise
    except Exception as error:  # an engine's import can fail in any way
        raise LookupError(f"{name} cannot be imported ({reason(error)})") from error


def tried(name: str, make: Maker) -> dict[str, Callable[..., Any] | str]:
    """Return the kernel that ``make`` gives by name, or the reason why there is none."""
    try:
        return {name: make()}
    except LookupError as error:
        return {name: str(error.args[0])}
    except Exception as error:
        return {name: reason(error)}


def release(package: str, distribution: str | None = None) -> str | None:
    """Return a package's name with its version; None if it is not installed.

    The version is the distribution's. The package is imported for its version only if there is no
    distribution. A package that cannot be imported is named without version; the messages about its
    kernels say what is wrong with it.
    """
    if not _there(package):
        return None
    try:
        return f"{package} {metadata.version(distribution or package)}"
    except metadata.PackageNotFoundError:
        pass
    try:
        return f"{package} {imported(package).__version__}"
    except (LookupError, AttributeError):
        return package


def _there(package: str) -> bool:
    spec = sys.modules.get(package) or importlib.util.find_spec(package)
    place = getattr(spec, "__file__", None) or getattr(spec, "origin", None)
    return place is not None  # a mere folder of that name has none


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def zeros_for(lengths: torch.Tensor, held: Prepared) -> torch.Tensor:
    """Return one zero per row: starts or offsets of rows that begin at their first column."""
    key = "zeros", lengths.shape, lengths.dtype, str(lengths.device)
    return held.get(key, lambda: torch.zeros_like(lengths))


def lengths_of(row_starts: torch.Tensor, row_ends: torch.Tensor, held: Prepared) -> torch.Tensor:
    """Return the windows' lengths."""
    key = len(row_starts), row_starts.data_ptr(), row_ends.data_ptr()
    return held.anew(key, lambda: row_ends - row_starts)


def sms(device: torch.device) -> int:
    """Return the number of multiprocessors; 132 without a GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def schedule_of(module: Any, lengths: torch.Tensor, schedules: Prepared) -> torch.Tensor:
    """Return what DeepGEMM's paged logits need of the lengths, made as the engines make it.

    It is ``get_paged_mqa_logits_metadata`` of the lengths, keys per page and multiprocessors, once
    per step.
    """

    def make() -> torch.Tensor:
        schedule: torch.Tensor = module.get_paged_mqa_logits_metadata(
            lengths, PAGE_SIZE, sms(lengths.device)
        )
        return schedule

    return schedules.anew((tuple(lengths.shape), lengths.data_ptr()), make)
