"""Shadow mode (``DSV4_SHADOW=1``): the engine's selection beside ours, compared on the device.

Ours has been served by then and stays as it is; the engine's goes to a scratch buffer. What is
counted is in :class:`Field`. A failure here is logged once and ends the shadow, never the call.

**Under CUDA graphs** Python runs at capture only, so everything that a replay has to do is tensor
operations of fixed shapes: both selections, the comparison, and the copy of the counters to pinned
host memory. The counters and their mirror are allocated outside of any capture (:func:`prepare`)
and live as long as the process, since a graph may write to them at any time. Scratch that is
allocated while capturing comes from the graph's pool.

**Reading** costs no CUDA call: the thread that logs, and ``dsv4_plugin.status()``, look at the
pinned mirror, which each call brings up to date in the order of its stream. A thread that copied
from the device itself could end a capture in progress: under ``cudaStreamCaptureModeGlobal``,
torch's default, calls like ``cudaMalloc`` or ``cudaEventQuery`` are forbidden to every thread.
"""

from __future__ import annotations

import atexit
import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv4_plugin import envs, log
from dsv4_plugin.errors import SettingError
from dsv4_plugin.state import state

__all__ = [
    "EVERY_S",
    "Field",
    "compare",
    "forget",
    "line",
    "on",
    "parts",
    "prepare",
    "report",
    "unavailable",
    "watch",
]

EVERY_S = 60.0  # between two lines in the log
_ENTRIES = 1 << 20  # compared at a time: some 50 MiB of sorted indices
_SCRATCH_BYTES = 64 << 20  # of widened scores at a time, where a call can be cut by rows


class Field(enum.IntEnum):
    """What the counters of a seam hold, int64 each; rows in which neither chose are left out.

    An entry is a chosen position; a row has as many as the longer of the two sets. ``AGREE`` are
    in both. The others are told apart by the score of the engine's position where the caller
    hands over the scores: as large as our last (``TIED``: both answers are right), smaller
    (``LOWER``: the engine's is not exact) or larger (``HIGHER``: ours is not exact). What is left
    are positions that the engine wrote twice or not at all.
    """

    ROWS = 0
    EQUAL = 1  # rows whose sets are the same
    ENTRIES = 2
    AGREE = 3
    TIED = 4
    LOWER = 5
    HIGHER = 6
    WORST = 7  # the largest share of a row's entries that does not agree, in millionths, rounded up


_SUMS = int(Field.WORST)
_MILLION = 1_000_000


def _distinct(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort every row; the mask has the first of each index that is not padding."""
    ordered = index.contiguous().sort(dim=1).values
    first = ordered >= 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return ordered, first


def compare(
    counters: torch.Tensor,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    scores: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Add to ``counters`` how far two selections agree as sets; no host sync, fixed shapes.

    Args:
        counters: int64 ``[len(Field)]``.
        ours: ``[rows, k]`` integer positions in any order; below zero is none.
        theirs: the same; an index may come twice.
        scores: ``[rows, columns]`` that both selected on, or None: differences stay unexplained.
        lengths: ``[rows]`` columns in each row; needed with ``scores``. What lies past them counts
            as a lower score.
        starts: ``[rows]`` where each row's columns begin; None: at zero.
    """
    rows, k = ours.shape
    step = max(1, _ENTRIES // max(k, 1))
    for low in range(0, rows if k else 0, step):
        part = slice(low, low + step)
        mine, in_mine = _distinct(ours[part])
        other, in_other = _distinct(theirs[part].to(ours.dtype))
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
        counters[:_SUMS].add_(torch.stack(sums))
        lost = (entries - common) * _MILLION
        share = torch.div(lost + entries - 1, entries.clamp(min=1), rounding_mode="floor")
        torch.maximum(counters[_SUMS:], share.amax().reshape(1), out=counters[_SUMS:])


def _scores_at(
    scores: torch.Tensor, index: torch.Tensor, offset: torch.Tensor | None
) -> torch.Tensor:
    at = index.long() if offset is None else index.long() + offset.long()
    return scores.gather(1, at.clamp_(0, max(scores.shape[1] - 1, 0))).float()


# ---- Counters that live as long as the process --------------------------------------------------


@dataclass
class _Kept:
    """The counters of one seam on one device. ``mirror``: pinned host memory, or the counters."""

    counters: torch.Tensor
    mirror: torch.Tensor


_kept: dict[tuple[str, torch.device], _Kept] = {}
_lock = threading.Lock()
_wanted = False
_off = False
_captured = False  # a capture has run since the counters last began at zero
_thread: threading.Thread | None = None


def on() -> bool:
    """Whether the shadow was asked for when the plugin decided, and has not failed."""
    return _wanted and not _off


def _asked() -> bool:
    try:
        return bool(envs.value("shadow"))
    except SettingError:  # an error elsewhere
        return False


def prepare(device: torch.device, *seams: str) -> None:
    """Look whether the shadow is asked for, and allocate the counters of ``seams``.

    To be called when the plugin decides what it does, outside of a capture if that can be.
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


def _counters(seam: str, device: torch.device) -> _Kept | None:
    """Return the counters; None where they would have to be made during a capture."""
    state.reports["shadow"] = report
    key = seam, device
    if key in _kept:
        return _kept[key]
    if _capturing(device):
        log.once(
            logging.WARNING,
            f"dsv4 shadow: {seam} was first called while a CUDA graph was captured; this graph "
            "is not watched",
        )
        return None
    with _lock:
        if key not in _kept:
            counters = torch.zeros(len(Field), dtype=torch.int64, device=device)
            mirror = counters
            if device.type == "cuda":
                # An engine that builds its model has made the GPU the default.
                mirror = torch.zeros(len(Field), dtype=torch.int64, device="cpu", pin_memory=True)
            _kept[key] = _Kept(counters, mirror)
        _start()
    return _kept[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Begin anew; the memory stays, as a graph may still write to it."""
    global _wanted, _off, _captured
    _wanted = _off = _captured = False
    _said.clear()
    try:
        for kept in _kept.values():
            kept.counters.zero_()
            kept.mirror.zero_()
    except Exception as error:  # a device that is lost; taking the patches back must go on
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
    """Say once that a seam cannot be watched, if that was asked for."""
    if _asked():
        log.once(logging.WARNING, f"dsv4 shadow: not available for {seam}: {why}")


def parts(scores: torch.Tensor) -> list[slice]:
    """Cut a call by rows so that its widened scores stay small; one part where nothing widens."""
    rows = scores.shape[0]
    step = rows
    if scores.dtype != torch.float32:
        step = max(1, _SCRATCH_BYTES // (4 * max(scores.stride(0), scores.shape[1], 1)))
    return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]


def watch(
    seam: str,
    ours: torch.Tensor,
    theirs: Callable[[torch.Tensor], torch.Tensor | None],
    scores: torch.Tensor | None = None,
    lengths: Callable[[], torch.Tensor] | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Run the engine's selection and count how far it agrees with ``ours``; never raises.

    ``theirs(scratch)`` fills ``scratch`` (int32, the shape of ``ours``, filled with -1), or returns
    what it allocated itself. The rest is as :func:`compare` takes it.

    Counting begins anew with the first call that is not captured after one that was: an engine
    warms up and captures on scores that mean nothing.
    """
    global _captured
    if not on():
        return
    try:
        kept = _counters(seam, ours.device)
        if kept is None:
            return
        if _capturing(ours.device):
            _captured = True
        elif _captured:
            _captured = False
            for other in _kept.values():
                other.counters.zero_()
        scratch = torch.full(ours.shape, -1, dtype=torch.int32, device=ours.device)
        other_set = theirs(scratch)
        compare(
            kept.counters,
            ours,
            scratch if other_set is None else other_set,
            scores,
            None if lengths is None else lengths(),
            starts,
        )
        if kept.mirror is not kept.counters:
            kept.mirror.copy_(kept.counters, non_blocking=True)
    except Exception as error:
        _end(error)


# ---- Reports ------------------------------------------------------------------------------------

_said: dict[str, list[int]] = {}


def _read(kept: _Kept) -> list[int]:
    """Read the mirror until two looks agree: the device may be writing it."""
    values = kept.mirror.tolist()
    for _ in range(8):
        again = kept.mirror.tolist()
        if again == values:
            break
        values = again
    return values


def _totals() -> dict[str, list[int]]:
    totals: dict[str, list[int]] = {}
    for (seam, _), kept in list(_kept.items()):
        values = _read(kept)
        before = totals.get(seam, [0] * len(Field))
        sums = [a + b for a, b in zip(before[:_SUMS], values[:_SUMS], strict=True)]
        totals[seam] = [*sums, max(before[_SUMS], values[_SUMS])]
    return totals


def report() -> dict[str, dict[str, float]]:
    """Return the counters of every seam as plain data; ``worst`` is the worst row's overlap."""
    found: dict[str, dict[str, float]] = {}
    for seam, values in _totals().items():
        found[seam] = {f.name.lower(): values[f] for f in Field if f is not Field.WORST}
        found[seam]["worst"] = 1 - values[Field.WORST] / _MILLION
    return found


def line(seam: str, values: dict[str, float]) -> str:
    """Say one seam's counters as the log does."""
    entries = max(values["entries"], 1)
    shares = {name: 100 * values[name] / entries for name in ("agree", "tied", "lower", "higher")}
    said = (
        f"dsv4 shadow: {seam} {shares['agree']:.2f} % of entries agree over {values['rows']:.0f} "
        f"rows (worst row {100 * values['worst']:.2f} %, {values['equal']:.0f} rows equal)"
    )
    why = {
        "tied": "tie with our last score",
        "lower": "have a lower score",
        "higher": "have a HIGHER score, so ours is not exact",
    }
    parts = [f"{shares[n]:.2f} % of the engine's {text}" for n, text in why.items() if values[n]]
    return "; ".join([said, *parts])


def _log_what_changed() -> None:
    for seam, values in report().items():
        now = [int(values[f.name.lower()]) for f in Field if f is not Field.WORST]
        if values["rows"] and _said.get(seam) != now:
            _said[seam] = now
            level = logging.WARNING if values["higher"] else logging.INFO
            log.say(level, line(seam, values))


def _loop(every_s: float) -> None:
    while True:
        time.sleep(every_s)
        try:
            _log_what_changed()
        except Exception as error:
            _end(error)
            return


def _start() -> None:
    """Start the thread that logs, once a process."""
    global _thread
    if _thread is not None and _thread.is_alive():
        return
    _thread = threading.Thread(target=_loop, args=(EVERY_S,), name="dsv4-shadow", daemon=True)
    _thread.start()
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    log.once(
        logging.INFO,
        "dsv4 shadow: the engine's selection runs beside the plugin's, whose answer is served; "
        f"agreement is logged every {EVERY_S:.0f} s",
    )


def _at_exit() -> None:
    try:
        _log_what_changed()
    except Exception as error:
        _end(error)
