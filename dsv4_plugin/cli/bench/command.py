"""``dsv4-plugin bench``: the ops against the peers that are installed, on the GPU at hand.

A peer that is not there is named, not made up. Every figure is microseconds a call inside a CUDA
graph (:mod:`dsv4_plugin.cli.checks.timing`). This file has the options; what measures is
imported when it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.bench import against, dry, read_plot
from dsv4_plugin.cli.bench.candidates import report as candidates_report
from dsv4_plugin.cli.bench.topk import plot
from dsv4_plugin.cli.bench.topk.bars import sound
from dsv4_plugin.cli.bench.topk.peers import OURS
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.recall import plot as recall_plot
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.choices import ADAPTERS, ENGINES, KS, LOGITS_SUITES, TOPK_DTYPES
from dsv4_plugin.cli.shared.choices import TOPK_SUITES as SUITES
from dsv4_plugin.cli.shared.run import UsageError, need_torch, reading

__all__ = ["add_arguments", "run"]

K = numbers.whole(1, max(KS))
WHAT = ("read", "topk", "logits", "chain", "candidates", "adapters", "plot")
MORE_SUITES = [name for name in (*LOGITS_SUITES, *ADAPTERS) if name not in SUITES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin bench``."""
    parser.add_argument("what", choices=WHAT, help="which ops, or a plot")
    parser.add_argument(
        "results", type=Path, nargs="?", metavar="RESULTS.json", help="plot: the file to draw"
    )
    parser.add_argument("--json", type=outputs.file, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--load-library", action="append", default=[], metavar="SO",
        help="torch op library of a peer (vLLM's _C*.so) where the engine itself is not installed",
    )  # fmt: skip
    _add_cells(parser)


def _add_cells(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the benchmarks of cells."""
    group = parser.add_argument_group("topk, logits, chain, candidates")
    add = group.add_argument
    add(
        "--suite", nargs="+", choices=(*SUITES, *MORE_SUITES, "all"), default=["decode"],
        help="topk: decode: k x rows x columns (default); narrow: 8K rows in 256,000-wide buffers; "
        "adversarial: scores that hurt; prefill: thousands of rows; paged: answers in pool slots; "
        "seed: bfloat16 over float32 beside the figures of vLLM #40811. logits: decode: requests x "
        "keys (default); next_n: several queries a request; varied: lengths that differ; prefill: "
        "causal windows of gathered keys. chain: decode. candidates: the index layers of "
        "DeepSeek-V4.1: decode, prefill",
    )  # fmt: skip
    add("--k", type=K, nargs="+", help="only these k (plot: the k to draw; not logits)")
    add(
        "--rows",
        type=numbers.COUNT,
        nargs="+",
        help="only these numbers of rows (logits, chain: of requests)",
    )
    add("--columns", type=numbers.COUNT, nargs="+", help="only these numbers of columns")
    add(
        "--dtype", nargs="+", choices=tuple(TOPK_DTYPES),
        help="of the logits (default: bfloat16 float32)",
    )  # fmt: skip
    add(
        "--peers", type=Path, metavar="FILE.py",
        help="other kernels: available(), available_prefill(), available_paged(), "
        "available_logits() and available_ragged_logits() return them",
    )  # fmt: skip
    add(
        "--against", action="append", default=[], metavar="ENGINE[,ENGINE...]|FILE.csv",
        help=f"the kernels of what is installed here of {', '.join(ENGINES)}; what is "
        "not is named (also bench read). Or, topk: figures of another run, marked as recorded. May "
        "be repeated",
    )  # fmt: skip
    add(
        "--vllm-choice", metavar="NAME",
        help="the top-k peer that stands for what vLLM 0.33 itself runs (default: vllm33, or where "
        "that is not loaded, what --against vllm runs itself)",
    )  # fmt: skip
    add(
        "--sglang-choice", metavar="NAME",
        help="chain: the top-k peer that stands for SGLang 0.5.23's (default: sglang_v2, or what "
        "--against sglang runs itself)",
    )  # fmt: skip
    add("--cold", action="store_true", help="cold for every peer, not only the best two of a cell")
    add("--launches", type=numbers.COUNT, default=40, help="launches in a graph (default: 40)")
    add(
        "--replays", type=numbers.COUNT, default=7, help="replays, whose median counts (default: 7)"
    )
    add(
        "--budget", type=numbers.BUDGET, metavar="SECONDS",
        help="begin no cell after this time; what was measured is reported",
    )  # fmt: skip
    add(
        "--plot", type=outputs.plot, metavar="FILE",
        help="draw the decode suite, or the reads (.png or .svg); needs matplotlib",
    )  # fmt: skip
    add(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a dry run of the harness on the torch reference, of a small grid where --k, "
        "--rows, --columns are not given; its times mean nothing",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin bench``.

    Returns:
        0 if every answer of the plugin's was right, 1 if one was not.

    Raises:
        UsageError: it cannot be run like this, or nothing was measured.
    """
    if arguments.what == "plot":
        _plot(arguments)
        return 0
    if arguments.results is not None:
        raise UsageError(f"RESULTS.json is for bench plot, got {arguments.results}")
    if arguments.what == "read" and arguments.device != "cuda":
        raise UsageError("bench read has no dry run: --device must be cuda")
    if arguments.what == "topk":
        against.split(arguments.against)
    elif arguments.what != "adapters":
        against.engines_only(arguments.against)
    need_torch()
    import torch

    on_cpu = arguments.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise UsageError(
            "there is no CUDA device here; nothing was measured (--device cpu is a dry run, of all "
            "but read)"
        )
    for library in arguments.load_library:
        with reading(library, "library"):
            _load(torch, library)
    from dsv4_plugin.cli.checks.timing import machine

    about = machine()
    gpu = (
        f"{about['gpu']} ({about['sms']} SMs), driver {about['driver']}"
        if "gpu" in about
        else "CPU"
    )
    triton = f"triton {about['triton']}" if about["triton"] else "no triton"

    def say(line: str) -> None:
        print(line, flush=True)

    document: dict[str, Any] = {
        "machine": about, "what": arguments.what, "complete": False, "results": []
    }  # fmt: skip
    with Results(document, arguments.json) as file:
        say(f"{gpu}, torch {about['torch']}, {triton}, dsv4-plugin {about['plugin']}")
        if on_cpu:
            say(dry.SAID)
            small = dry.shrink(arguments)
            if small:
                say(small)
        _bench(arguments.what)(arguments, file, say)
    wrong = [row for row in document["results"] if not _right(row)]
    if wrong:
        say(f"\n{len(wrong)} results of dsv4-plugin are WRONG, or failed")
    if on_cpu:
        say(f"\n{dry.SAID}")
    if arguments.json:
        print(f"written to {arguments.json}")
    return 1 if wrong else 0


def _bench(what: str) -> Callable[[argparse.Namespace, Results, Callable[[str], None]], None]:
    """Return what measures one of :data:`WHAT` and fills the results file."""
    if what == "topk":
        from dsv4_plugin.cli.bench.topk.command import run
    elif what == "adapters":
        from benchmarks.engines.kernels.command import run
    elif what == "candidates":
        from dsv4_plugin.cli.bench.candidates.command import run
    elif what == "read":
        from dsv4_plugin.cli.bench.read import run
    else:
        from dsv4_plugin.cli.bench.logits.command import run
    return run


def _load(torch: Any, library: str) -> None:
    try:
        torch.ops.load_library(library)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _right(row: dict[str, Any]) -> bool:
    """Whether a result is no wrong answer of the plugin's; a peer's may be wrong."""
    if "equal" in row:  # bench read: bit for bit beside an engine's
        return bool(row["equal"])
    if row.get("recorded") or not str(row["implementation"]).startswith(OURS):
        return True
    return sound(row) and bool(row.get("lowest_index", True))


def _plot(arguments: argparse.Namespace) -> None:
    """Draw a results file."""
    if arguments.results is None or arguments.plot is None:
        raise UsageError("bench plot needs a results file and --plot FILE")
    with reading(arguments.results):
        document = json.loads(arguments.results.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "results" not in document:
            raise UsageError(f"{arguments.results} is no results file: it has no results")
        what = document.get("what", "topk")
        if what == "recall":
            recall_plot.draw(document, arguments.plot)
        elif what == "read":
            read_plot.draw(document, arguments.plot)
        elif what == "candidates":
            candidates_report.draw(document, arguments.plot)
        elif isinstance(what, str) and what in plot.TITLE:
            plot.draw(document, arguments.plot, k=arguments.k[0] if arguments.k else None)
        else:
            raise UsageError(f"{arguments.results} has results of {what!r}, which has no plot")
    print(f"drawn to {arguments.plot}")
