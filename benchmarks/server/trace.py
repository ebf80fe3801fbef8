"""A torch-profiler trace of a decoding server → microseconds a step, kernel by kernel.

Every step writes one key to each indexer's cache, and scores keys after it. So the first scoring
kernel after each written key marks a layer of a step. A step lasts from its first mark to the first
mark of the next step. A step that took more than 1.5 times the median (a prefill came between, or
the profiler stopped) is left out.

The parts of the indexer's chain, by the names of the engine's kernels and of the plugin's:

==========  =====================================================================================
k_write     compress, quantise and store the new key in the indexer's cache
fill        the fill of the top-k's output with -1: an int32 fill right before a scoring kernel, on
            its stream
logits      the paged index logits
maxima      the scores of blocks of keys: the engine's pass over the logits, or the plugin's kernel,
            which also writes the logits
blocks      the selection of candidate blocks: the kernels between the maxima and the store of the
            blocks, on their stream; the plugin's is one kernel
candidates  the scores of the candidates' keys: the engine's flags and mask over the logits, or the
            plugin's kernel
topk        the selection of keys
transform   indices in the request → slots of the cache, and the lengths
==========  =====================================================================================

Only DeepSeek-V4.1 has ``maxima``, ``blocks`` and ``candidates``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tool import tool
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, reading

__all__ = ["PARTS", "Kernel", "TraceError", "classify", "kernels", "read", "reduce"]

PARTS = ("k_write", "fill", "logits", "maxima", "blocks", "candidates", "topk", "transform")
SCORING = ("logits", "maxima", "candidates")
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = re.compile(r"Launch")

# The order matters: another pattern would match the plugin's scoring kernels too.
_NAMES = (
    ("metadata", re.compile(r"paged_mqa_logits_metadata")),
    ("maxima", re.compile(r"^_block_scores_kernel|dsv4::\S*maxima", re.I)),
    ("blocks", re.compile(r"^_store_candidates_kernel|dsv4::\S*select_blocks")),
    ("candidates", re.compile(r"^_(candidate_flags|mask_candidates)_kernel|"
                              r"dsv4::candidate_logits")),
    ("logits", re.compile(r"paged_mqa_logits|^_dsa_decode_logits|dsv4::\S*paged_logits")),
    ("transform", re.compile(r"compute_global_topk|^_local_topk_to_global_slots|"
                             r"dsv4::\S*(slots|global)")),
    ("topk", re.compile(r"dsv4::\S*topk|(cooperative|persistent|filtered)_?topk|"
                        r"topk_?per_?row|FilteredTopK|"
                        r"topk_(main|\w*cluster|transform)_kernel|"
                        r"^_dsa_(radix|logits_topk)", re.I)),
    ("k_write", re.compile(r"compress\w*_insert_indexer|indexer_k_quant_and_cache|"
                           r"indexer_k_norm_rope_quant_store|fused_norm_rope_indexer|"
                           r"dsv4::\S*(write|insert)")),
)  # fmt: skip
_FILL = re.compile(r"FillFunctor<int>|dsv4::\S*fill")


class TraceError(ValueError):
    """The trace contains no decode steps of a model with an indexer."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or memset on the GPU; times in microseconds."""

    name: str
    start: float
    duration: float
    stream: int

    @property
    def end(self) -> float:
        """The time of its end."""
        return self.start + self.duration


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace file, ``.json`` or ``.json.gz``."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return json.load(file)["traceEvents"]


def kernels(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """Return the events on the GPU, ordered by start."""
    found = [
        Kernel(e["name"], float(e["ts"]), float(e["dur"]), int(e["args"].get("stream", 0)))
        for e in events
        if e.get("cat") in GPU and "dur" in e
    ]
    return sorted(found, key=lambda k: k.start)


def classify(ran: Sequence[Kernel]) -> list[str]:
    """Return the part of each kernel; ``""`` if it belongs to none."""
    parts = [next((part for part, name in _NAMES if name.search(k.name)), "") for k in ran]
    last: dict[int, int] = {}  # of each stream
    choosing: set[int] = set()  # streams on which blocks have scores and are not yet selected
    for i, kernel in enumerate(ran):
        before = last.get(kernel.stream)
        if parts[i] in SCORING and before is not None and _FILL.search(ran[before].name):
            parts[before] = "fill"
        if parts[i] == "maxima":
            choosing.add(kernel.stream)
        elif kernel.stream in choosing and parts[i] in ("", "topk", "blocks"):
            if parts[i]:  # the plugin's kernel, or the engine's last
                choosing.discard(kernel.stream)
            parts[i] = "blocks"
        elif parts[i] != "metadata":
            choosing.discard(kernel.stream)
        if parts[i] != "metadata":  # the engine may make a schedule in between
            last[kernel.stream] = i
    return parts


def _marks(ran: Sequence[Kernel], parts: Sequence[str]) -> list[int]:
    """Return the first kernel that scores keys after each key that is written.

    If the trace shows no written key, return every kernel that scores keys. The engine's maxima and
    mask do not count: they read scores, in prefill too.
    """
    found, written = [], True
    for i, part in enumerate(parts):
        if part == "k_write":
            written = True
        elif part == "logits" or (part in SCORING and "dsv4::" in ran[i].name):
            if written:
                found.append(i)
            written = "k_write" not in parts
    return found


def reduce(
    events: Sequence[dict[str, Any]], layers: int, writers: int | None = None, top: int = 25
) -> dict[str, Any]:
    """Return the time of each part for each step.

    Args:
        events: the trace's events.
        layers: the number of layers with an indexer.
        writers: the number of layers that write a key to an indexer's cache (default: all).
        top: how many kernels to list by time.

    Raises:
        TraceError: fewer than three decode steps are in the trace.
    """
    ran = kernels(events)
    parts = classify(ran)
    marks, writers = _marks(ran, parts), writers or layers
    firsts = marks[::writers]
    gaps = [ran[j].start - ran[i].start for i, j in zip(firsts, firsts[1:], strict=False)]
    if len(gaps) < 3:
        names = Counter(k.name[:80] for k in ran).most_common(12)
        raise TraceError(
            f"{len(marks)} layers that write and score keys in the trace are fewer than four steps "
            f"of {writers} layers; the most frequent kernels: {names}"
        )
    usual = statistics.median(gaps)
    steps = [
        (i, j)
        for i, j in zip(firsts, firsts[1:], strict=False)
        if ran[j].start - ran[i].start < 1.5 * usual
    ]
    n = len(steps)
    counted = [range(i, j) for i, j in steps]
    us: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    by_part: dict[str, defaultdict[str, float]] = {
        part: defaultdict(float) for part in (*PARTS, "metadata")
    }
    part_calls: Counter[str] = Counter()
    for indices in counted:
        for i in indices:
            us[ran[i].name] += ran[i].duration
            calls[ran[i].name] += 1
            if parts[i]:
                by_part[parts[i]][ran[i].name] += ran[i].duration
                part_calls[parts[i]] += 1
    shown = {
        part: {
            "us": round(sum(names.values()) / n, 2),
            "calls": round(part_calls[part] / n, 2),
            "us_call": round(sum(names.values()) / part_calls[part], 3) if names else None,
            "kernels": [name[:160] for name in sorted(names, key=names.__getitem__)[:-5:-1]],
        }
        for part, names in by_part.items()
    }
    chain = sum(sum(by_part[part].values()) for part in PARTS) / n
    begin, end = ran[steps[0][0]].start, ran[steps[-1][1]].start
    launches = Counter(
        e["name"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver")
        and LAUNCHES.search(e["name"])
        and begin <= e["ts"] <= end
    )
    return {
        "steps": n,
        "layers": layers,
        "step_us": round(statistics.median(ran[j].start - ran[i].start for i, j in steps), 1),
        "busy_us": round(sum(_busy(ran, indices) for indices in counted) / n, 1),
        "kernels": round(sum(calls.values()) / n, 1),
        "host_launches": {k: round(v / n, 2) for k, v in launches.most_common(6)},
        "parts": shown,
        "chain_us": round(chain, 2),
        "chain_us_layer": round(chain / layers, 3),
        "logits_to_topk_us": _logits_to_topk(ran, parts, counted),
        "top": [
            {"kernel": name[:160], "us": round(t / n, 2), "calls": round(calls[name] / n, 2)}
            for name, t in sorted(us.items(), key=lambda item: -item[1])[:top]
        ],
    }


def _busy(ran: Sequence[Kernel], indices: range) -> float:
    """Microseconds in which at least one kernel ran."""
    busy, end = 0.0, ran[indices.start].start
    for i in indices:
        busy += max(0.0, ran[i].end - max(ran[i].start, end))
        end = max(end, ran[i].end)
    return busy


def _logits_to_topk(
    ran: Sequence[Kernel], parts: Sequence[str], counted: Sequence[range]
) -> float | None:
    """Median from the start of a logits kernel to the end of its top-k, including the gap."""
    spans, begin = [], None
    for indices in counted:
        for i in indices:
            if parts[i] == "logits" or (parts[i] in SCORING and begin is None):
                begin = ran[i].start
            elif parts[i] == "topk" and begin is not None:
                spans.append(ran[i].end - begin)
                begin = None
    return round(statistics.median(spans), 3) if spans else None


def main(argv: Sequence[str] | None = None) -> int:
    """Reduce one trace; return the exit code. It is 0 also if the text says why it failed."""
    parser = Parser(prog="python -m benchmarks.server.trace", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("trace", type=Path)
    add("--layers", type=numbers.COUNT, required=True, help="number of layers with an indexer")
    add("--writers", type=numbers.COUNT, metavar="N",
        help="number of them that write index keys (default: all)")  # fmt: skip
    add("--json", type=outputs.file, help="write to this file, not to the terminal")
    return tool(parser, _main, argv)


def _main(arguments: argparse.Namespace) -> int:
    with reading(arguments.trace, "trace"):
        try:
            text = json.dumps(
                reduce(read(arguments.trace), arguments.layers, arguments.writers), indent=1
            )
        except TraceError as error:
            text = json.dumps({"error": str(error)})
    if arguments.json:
        outputs.write(arguments.json, text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
