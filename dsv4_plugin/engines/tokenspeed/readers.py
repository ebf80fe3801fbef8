"""Replace the per-token loops that read the indexer cache.

Why: ``read_deepseek_v4_indexer_fp8_cache`` walks ``slot_mapping.tolist()`` with several GPU ops a
token and synchronises, so it cannot be captured. TokenSpeed's runtime itself has not called it
since May 2026 (#242); it lives on as the oracle of its tests and for who calls it from outside.
Its MXFP4 sibling, where a release has one, reads row 0 of an empty cache for padding.
May go when TokenSpeed's own are vectorised, or gone.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin import envs, log, ops
from dsv4_plugin.engines.shared import plan
from dsv4_plugin.engines.shared.patches import Ledger
from dsv4_plugin.engines.tokenspeed import probe
from dsv4_plugin.errors import SettingError, UnmetError
from dsv4_plugin.state import Seam, state

__all__ = ["install", "look", "uninstall"]

_ledger = Ledger()
_PARAMETERS = ("cache_2d", "slot_mapping", "block_size")
_READ = {"read.fp8": ops.read_indexer_cache, "read.mxfp4": ops.read_indexer_cache_mxfp4}
_ROW_BYTES = {"read.fp8": 128 + 4, "read.mxfp4": 64 + 4}  # a key of 128 values


def look() -> None:
    """Put the readers among the seams that ``status()`` shows."""
    from dsv4_plugin.engines.tokenspeed import registration

    state.host = state.host or registration.host()
    for name, site in probe.look().items():
        if name in probe.READERS:
            why = site.why or f"{probe.OPS} was not imported yet"
            state.found(Seam(name, site.where, why))


def install(module: Any) -> None:
    """Replace the readers in TokenSpeed's module, each if it is what it is taken for."""
    try:
        off = envs.value("indexer_read") == "off"
    except SettingError:  # raised again, as an error, at the first call
        off = False
    for name, attribute in probe.READERS.items():
        seam = state.seams.setdefault(name, Seam(name))
        original = vars(module).get(attribute)
        if original is None:
            continue  # said already: it is gone
        got = tuple(inspect.signature(original).parameters)
        seam.where = f"{probe.OPS}.{attribute}"
        if off:
            seam.why = "DSV4_INDEXER_READ=off"
        elif got != _PARAMETERS:
            seam.why = f"it takes ({', '.join(got)}), not ({', '.join(_PARAMETERS)})"
            log.once(logging.INFO, f"{state.host}: {attribute} stays upstream's, {seam.why}")
        else:
            _ledger.replace(module, attribute, _reader(name, original), seam.where)
            seam.why = None
        log.debug(f"{state.host}: seam {name}: {seam.why or 'engaged'}")


def _reader(name: str, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def read(
        cache_2d: torch.Tensor, slot_mapping: torch.Tensor, block_size: int = 64
    ) -> torch.Tensor:
        if plan.is_off("read") or not _fits(name, cache_2d, slot_mapping, block_size):
            state.count(f"{name}.upstream")
            return original(cache_2d, slot_mapping, block_size)
        wish = envs.value("indexer_read")
        try:
            out = _READ[name](
                cache_2d,
                slot_mapping.reshape(-1),
                block_size=block_size,
                backend=None if wish == "auto" else wish,
            )
        except (IndexError, UnmetError):  # a slot past the cache; a wish that cannot be met
            raise
        except Exception as error:
            if envs.value("strict"):
                raise
            plan.switch_off("read", error)
            state.count(f"{name}.upstream")
            return original(cache_2d, slot_mapping, block_size)
        state.count(name)
        log.once(logging.INFO, f"dsv4 active in {state.host}: {state.seams[name].where}")
        return out

    return read


def _fits(name: str, cache: Any, slots: Any, block_size: Any) -> bool:
    """Whether the call is one that ours answers as the original does; errors are the original's."""
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


def uninstall() -> None:
    """Put the readers back; one that somebody else replaced since stays theirs."""
    _ledger.restore()
    for name in probe.READERS:
        state.seams.pop(name, None)
