"""Shadow mode (``DSV4_SHADOW=1``): compare the engine's selection with the plugin's.

The plugin has already served its selection, and the shadow does not change it. The engine's
selection goes to a scratch buffer. :class:`.shadow_report.Field` lists what is counted. A failure
here is logged once and ends the shadow, never the call.

**Under CUDA graphs** Python runs at capture only. So a replay consists of tensor operations of
fixed shapes: both selections, the comparison, and the copy of the counters to pinned host memory.
The counters and their mirror are allocated outside of any capture (:func:`prepare`). They live as
long as the process, because a graph may write to them at any time. Scratch memory that is allocated
during a capture comes from the graph's pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from dsv4_plugin import envs, log, processes
from dsv4_plugin.engines.shared import shadow_report
from dsv4_plugin.engines.shared.shadow_report import MILLION, SUMS, Field, Kept, kept
from dsv4_plugin.errors import SettingError
from dsv4_plugin.state import state

__all__ = ["compare", "forget", "on", "parts", "prepare", "unavailable", "watch"]

_ENTRIES = 1 << 20  # compared at a time: some 50 MiB of sorted indices
_SCRATCH_BYTES = 64 << 20  # of widened scores at a time, if a call can be divided by rows


def _distinct(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort every row; the mask has the first of each index that is not padding."""
    ordered = index.contiguous().sort(dim=1).values
    first = ordered >= 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return ordered, first


def compare(
    counters: torch.Tensor,
    plugin: torch.Tensor,
    engine: torch.Tensor,
    scores: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Add to ``counters`` how far two selections agree as sets; no host sync, fixed shapes.

    Args:
        counters: int64 ``[len(Field)]``.
        plugin: ``[rows, k]`` integer positions in any order; a negative number is no position.
        engine: the same; an index may come twice.
        scores: ``[rows, columns]`` on which both selected, or None: differences stay unexplained.
        lengths: ``[rows]`` columns in each row; needed with ``scores``. Columns past them count
            as lower scores.
        starts: ``[rows]`` first column of each row; None means zero.
    """
    rows, k = plugin.shape
    step = max(1, _ENTRIES // max(k, 1))
    for low in range(0, rows if k else 0, step):
        part = slice(low, low + step)
        mine, in_mine = _distinct(plugin[part])
        other, in_other = _distinct(engine[part].to(plugin.dtype))
        at = torch.searchsorted(mine, other).clamp_(max=k - 1)
        both = in_other & (mine.gather(1, at) == other)
        common = both.sum(1)
        count = in_mine.sum(1)
        entries = torch.maximum(count, in_other.sum(1))
        live = entries > 0
        sums = [live.sum(), (live & (common == entries)).sum(), entries.sum(), common.sum()]
        if scores is None or lengths is None:
            sums += [torch.zeros_like(sums[0])] * 3
        else:
            offset = None if starts is None else starts[part, None]
            n = lengths[part, None]
            value = _scores_at(scores[part], other, offset)
            last = _scores_at(scores[part], mine, offset).masked_fill_(~in_mine, torch.inf)
            bound = last.amin(1, keepdim=True)
            extra, inside = in_other & ~both, other < n
            tied, higher = inside & (value == bound), inside & (value > bound)
            sums += [(extra & tied).sum(), (extra & ~tied & ~higher).sum(), (extra & higher).sum()]
        counters[:SUMS].add_(torch.stack(sums))
        lost = (entries - common) * MILLION
        share = torch.div(lost + entries - 1, entries.clamp(min=1), rounding_mode="floor")
        torch.maximum(counters[SUMS:], share.amax().reshape(1), out=counters[SUMS:])


def _scores_at(
    scores: torch.Tensor, index: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    at = index.long() if offset is None else index.long() + offset.long()
    return scores.gather(1, at.clamp_(0, max(scores.shape[1] - 1, 0))).float()


# ---- Counters that live as long as the process --------------------------------------------------


_parents: list[dict[tuple[str, torch.device], Kept]] = []  # of a forked child
_lock = processes.lock()
_wanted = False
_off = False
_captured = False  # a capture has run since the counters were last set to zero


def on() -> bool:
    """Whether the shadow was asked for when the plugin decided, and has not failed."""
    return _wanted and not _off


def _asked() -> bool:
    try:
        return bool(envs.value("shadow"))
    except SettingError:  # an error elsewhere
        return False


def prepare(device: torch.device, *seams: str) -> None:
    """Check whether the shadow is switched on, and allocate the counters of ``seams``.

    The plugin calls it when it decides, outside of a capture if possible.
    """
    global _wanted
    _wanted = _asked()
    if not on():
        return
    try:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        for seam in seams:
            _counters(seam, device)
    except Exception as error:
        _end(error)


def _counters(seam: str, device: torch.device) -> Kept | None:
    """Return the counters; None if they would have to be allocated during a capture."""
    state.reports["shadow"] = shadow_report.report
    key = seam, device
    if key in kept:
        return kept[key]
    if _capturing(device):
        log.once(
            logging.WARNING,
            f"dsv4 shadow: {seam} was first called while a CUDA graph was captured; this graph "
            "is not watched",
        )
        return None
    with _lock:
        if key not in kept:
            counters = torch.zeros(len(Field), dtype=torch.int64, device=device)
            mirror = counters
            if device.type == "cuda":
                # While an engine builds its model, the GPU is torch's default device.
                mirror = torch.zeros(len(Field), dtype=torch.int64, device="cpu", pin_memory=True)
            kept[key] = Kept(counters, mirror, counters.new_zeros(()))
        shadow_report.start(_end)
    return kept[key]


def _begin_in_child() -> None:
    """Count from zero in a forked child, which has no thread that logs.

    The child neither reads nor frees what the parent allocated, because it cannot reach the
    parent's GPU memory.
    """
    _parents.append(dict(kept))
    kept.clear()
    shadow_report.begin_in_child()


processes.in_child(_begin_in_child)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Set the counters to zero; keep the memory, because a graph may still write to it."""
    global _wanted, _off, _captured
    _wanted = _off = _captured = False
    shadow_report.said.clear()
    try:
        for one in kept.values():
            one.counters.zero_()
            one.mirror.zero_()
    except Exception as error:  # the device is lost; unregister() must go on
        _end(error)


def _end(error: Exception) -> None:
    global _off
    _off = True
    log.once(
        logging.ERROR,
        f"dsv4 shadow: failed and was switched off ({type(error).__name__}: {error}); what is "
        "served does not change",
    )


def unavailable(seam: str, why: str) -> None:
    """Log once that a seam cannot be watched, if the shadow is switched on."""
    if _asked():
        log.once(logging.WARNING, f"dsv4 shadow: not available for {seam}: {why}")


def parts(scores: torch.Tensor) -> list[slice]:
    """Divide a call by rows so that its widened scores stay small; one part if nothing widens."""
    rows = scores.shape[0]
    step = rows
    if scores.dtype != torch.float32:
        step = _SCRATCH_BYTES // (4 * max(scores.stride(0), scores.shape[1], 1))
    step = max(1, step)
    return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]


def watch(
    seam: str,
    plugin: torch.Tensor,
    engine: Callable[[torch.Tensor], torch.Tensor | None],
    scores: torch.Tensor | Callable[[], torch.Tensor] | None = None,
    lengths: Callable[[], torch.Tensor] | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Run the engine's selection and count how far it agrees with ``plugin``; never raises.

    ``engine(scratch)`` fills ``scratch`` (int32, the shape of ``plugin``, filled with -1), or
    returns a tensor that it allocated itself. The other arguments are those of :func:`compare`;
    ``scores`` may be a function that computes them.

    The counters return to zero with the first call outside of a capture after a captured call,
    because an engine warms up and captures on meaningless scores. They also return to zero if they
    do not hold what the plugin wrote, because an engine that sleeps may free the memory.
    """
    global _captured
    if not on():
        return
    try:
        found = _counters(seam, plugin.device)
        if found is None:
            return
        if _capturing(plugin.device):
            _captured = True
        elif _captured:
            _captured = False
            for other in kept.values():
                other.counters.zero_()
        scratch = torch.full(plugin.shape, -1, dtype=torch.int32, device=plugin.device)
        other_set = engine(scratch)
        found.check()
        compare(
            found.counters,
            plugin,
            scratch if other_set is None else other_set,
            scores() if callable(scores) else scores,
            None if lengths is None else lengths(),
            starts,
        )
        found.close()
    except Exception as error:
        _end(error)
