"""Replace the readers of the indexer cache, which loop over their slots.

TokenSpeed's runtime has not called the FP8 reader since May 2026 (#242). TokenSpeed's tests use it
as their oracle, and code outside of TokenSpeed may call it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

import dsv4_plugin as ops
from dsv4_plugin import envs, log
from dsv4_plugin.engines.shared import seam
from dsv4_plugin.engines.shared.source import Missing
from dsv4_plugin.engines.shared.tensors import rows_of
from dsv4_plugin.engines.tokenspeed import adapter, probe
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.state import Seam, state

__all__ = ["install", "look"]

_READ = {"read.fp8": ops.read_indexer_cache, "read.mxfp4": ops.read_indexer_cache_mxfp4}
_ROW_BYTES = {"read.fp8": 128 + 4, "read.mxfp4": 64 + 4}  # a key of 128 values


def look() -> None:
    """Put the readers among the seams that ``status()`` shows."""
    now = adapter.ensure()
    for name, record in probe.READERS.items():
        site = seam.in_source(record)
        now.found(name, site.where, site.why or f"{probe.OPS} was not imported yet")


def install(module: Any) -> None:
    """Replace each reader in TokenSpeed's module that has the expected form."""
    now = adapter.ensure()
    try:
        off = envs.value("indexer_read") == "off"
    except SettingError:  # raised again, as an error, at the first call
        off = False
    for name, record in probe.READERS.items():
        (place,) = record.forms[0]
        shown = state.seams.setdefault(name, Seam(name))
        if vars(module).get(place.attribute) is None:
            continue  # already logged: the reader is gone
        shown.where = str(place)
        try:
            found = place.in_process(module)
        except Missing as error:
            shown.why = str(error)
            log.once(logging.INFO, f"{now.engine}: the engine's own code stays, {error}")
        else:
            shown.why = "DSV4_INDEXER_READ=off" if off else None
            if not off:
                wrapper = _reader(name, found.original)
                now.ledger.replace(found.owner, found.name, wrapper, str(place))
        log.debug(f"{now.engine}: seam {name}: {shown.why or 'engaged'}")


def _reader(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def read(
        cache_2d: torch.Tensor, slot_mapping: torch.Tensor, block_size: int = 64
    ) -> torch.Tensor:
        now = adapter.current()
        if now is None or "read" in now.off or not _fits(name, cache_2d, slot_mapping, block_size):
            state.count(f"{name}.upstream", rows_of(slot_mapping))
            return original(cache_2d, slot_mapping, block_size)
        mode = envs.value("indexer_read")
        try:
            out = _READ[name](
                cache_2d,
                slot_mapping.reshape(-1),
                block_size=block_size,
                backend=None if mode == "auto" else mode,
            )
        # A slot past the cache; a setting that is unmet, or wrong.
        except (IndexError, SettingError, UnmetError):
            raise
        except Exception as error:
            if envs.value("strict"):
                raise
            now.switch_off("read", error)
            state.count(f"{name}.upstream", rows_of(slot_mapping))
            return original(cache_2d, slot_mapping, block_size)
        state.count(name, rows_of(slot_mapping))
        log.once(logging.INFO, f"dsv4 active in {now.engine}: {state.seams[name].where}")
        return out

    return read


def _fits(name: str, cache: Any, slots: Any, block_size: Any) -> bool:
    """Whether the plugin answers this call as the original does; the original raises its errors."""
    return (
        isinstance(cache, torch.Tensor)
        and isinstance(slots, torch.Tensor)
        and isinstance(block_size, int)
        and cache.dtype == torch.uint8
        and cache.dim() == 2
        and cache.stride(1) == 1
        and not slots.dtype.is_floating_point
        and slots.dtype != torch.bool
        and block_size > 0
        and cache.shape[1] == block_size * _ROW_BYTES[name]
    )
