"""``dsv4-plugin bench``: the ops and the installed *peers* (kernels of others), on this GPU.

The output names a peer that is missing; its figures are not replaced. Every figure is microseconds
per call inside a CUDA graph (:mod:`dsv4_plugin.cli.checks.timing`). This file has the options. The
measuring modules are imported when the command runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_plugin.cli import plots
from dsv4_plugin.cli.bench import dry
from dsv4_plugin.cli.checks import compare
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import choices, numbers, outputs
from dsv4_plugin.cli.shared.run import UsageError, examples, need_torch, reading

__all__ = ["add_arguments", "engines", "grid", "run", "timing"]

K = numbers.whole(1, max(choices.KS))
WHAT = {
    "topk": "the selection, on given scores",
    "logits": "the scores, from the cache",
    "chain": "scores and selection in one CUDA graph",
    "candidates": "the index layers of DeepSeek-V4.1",
    "read": "reads and gathers of the cache (needs a GPU)",
    "plot": "draw a results file, without a GPU",
}
EXAMPLES = {
    "topk": (
        "--against vllm,torch --json topk.json --plot topk.svg",
        "--suite served --k 512 --rows 1 16",
    ),
    "logits": ("--json logits.json", "--suite prefill --dtype bfloat16 --columns 65536"),
    "chain": ("--against vllm --k 512 --json chain.json", "--rows 1 64 --budget 300"),
    "candidates": ("--json candidates.json", "--suite prefill --dtype float32"),
    "read": ("--against vllm --json read.json", "--load-library vllm/_C.abi3.so"),
    "plot": ("topk.json --plot topk.svg", "topk.json --plot k1024.png --k 1024"),
}
SUITES = {
    "topk": (
        choices.TOPK_SUITES,
        "decode: k x rows x columns (default); served: as in a server, where a call's code is "
        "cold; narrow: 8K rows in 256,000-wide buffers; adversarial: hard scores; prefill: "
        "thousands of rows; paged: answers in pool slots",
    ),
    "logits": (
        choices.LOGITS_SUITES,
        "decode: requests x keys (default); next_n: several queries per request; varied: lengths "
        "that differ; prefill: causal windows of gathered keys",
    ),
    "candidates": (
        choices.CANDIDATE_SUITES,
        "decode: rows x keys (default); prefill: a chunk over gathered keys",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and the options of each."""
    examples(parser, *(f"{what} {EXAMPLES[what][0]}" for what in ("topk", "plot")))
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, about in WHAT.items():
        said = f"{about[0].upper()}{about[1:]}."
        one = benchmarks.add_parser(what, help=about, description=said)
        examples(one, *EXAMPLES[what])
        if what == "plot":
            one.add_argument("results", type=Path, metavar="RESULTS.json", help="the file to draw")
            one.add_argument("--plot", type=outputs.plot, metavar="FILE", required=True,
                             help="the plot (.png or .svg); needs matplotlib")  # fmt: skip
            one.add_argument("--k", type=K, help="the k to draw (default: the smallest)")
            continue
        if what == "chain":
            one.set_defaults(suite=["decode"])
        elif what in SUITES:
            names, said = SUITES[what]
            one.add_argument("--suite", nargs="+", choices=(*names, "all"), default=["decode"],
                             help=said)  # fmt: skip
        if what in ("topk", "chain"):
            one.add_argument("--k", type=K, nargs="+", help="only these k")
        if what == "candidates":
            one.add_argument(
                "--cache", choices=choices.CACHES, default="fp8",
                help="the keys: fp8 as in vLLM (default), or fp4 as in SGLang, bfloat16 only",
            )  # fmt: skip
            one.add_argument(
                "--next-n", type=numbers.COUNT, nargs="+", default=[1],
                help="rows per request; --rows then counts requests (default: 1)",
            )  # fmt: skip
        if what != "read":
            grid(one)
            one.add_argument(
                "--dtype", nargs="+", help="of the scores (default: bfloat16 float32)",
                choices=tuple(choices.TOPK_DTYPES) if what == "topk" else choices.LOGITS_DTYPES,
            )  # fmt: skip
            timing(one)
        if what in ("topk", "logits", "chain"):
            _peers(one)
        if what != "candidates":
            _against(one)
        if what in ("topk", "chain"):
            _choice(one, "vllm", "vLLM 0.33", "vllm33")
        if what == "chain":
            _choice(one, "sglang", "SGLang 0.5.23", "sglang_v2")
        one.add_argument("--json", type=outputs.file, metavar="FILE",
                         help="write the results to this file")  # fmt: skip
        one.add_argument("--plot", type=outputs.plot, metavar="FILE",
                         help="draw the results of the suite decode (.png or .svg); needs "
                         "matplotlib")  # fmt: skip


def grid(parser: argparse._ActionsContainer) -> None:
    """Declare the options that choose the measured cells."""
    parser.add_argument("--rows", type=numbers.COUNT, nargs="+",
                        help="only these numbers of rows (logits, chain: of requests)")  # fmt: skip
    parser.add_argument("--columns", type=numbers.COUNT, nargs="+",
                        help="only these numbers of columns, or of keys")  # fmt: skip


def timing(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how and where cells are timed."""
    add = parser.add_argument
    add("--launches", type=numbers.COUNT, default=40, help="launches in a graph (default: 40)")
    add("--replays", type=numbers.COUNT, default=7,
        help="replays of a graph; their median counts (default: 7)")  # fmt: skip
    add("--budget", type=numbers.BUDGET, metavar="SECONDS",
        help="begin no cell after this time; report what was measured")  # fmt: skip
    add(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a dry run on the torch reference, which checks answers and shows no times",
    )  # fmt: skip


def _peers(parser: argparse.ArgumentParser) -> None:
    """Declare the options for peers."""
    parser.add_argument(
        "--peers", type=Path, metavar="FILE.py",
        help="other kernels: the file's functions available(), available_prefill(), "
        "available_paged(), available_logits() and available_ragged_logits() return them",
    )  # fmt: skip
    parser.add_argument("--cold", action="store_true",
                        help="measure all peers cold, not only the best two of a cell")  # fmt: skip


def _against(parser: argparse.ArgumentParser) -> None:
    """Declare the options for engines whose kernels are peers."""
    parser.add_argument(
        "--against", action="extend", type=engines, default=[], metavar="ENGINE[,ENGINE...]",
        help=f"compare with the installed kernels of {', '.join(choices.ENGINES)}; the output "
        "names the missing ones. Can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--load-library", action="append", default=[], metavar="SO",
        help="torch op library of a peer (vLLM's _C*.so), if the engine itself is not installed",
    )  # fmt: skip


def _choice(parser: argparse.ArgumentParser, engine: str, release: str, usual: str) -> None:
    parser.add_argument(
        f"--{engine}-choice", metavar="NAME",
        help=f"the top-k peer that stands for {release}'s own choice (default: {usual}, or "
        f"if that is not loaded, the choice of --against {engine})",
    )  # fmt: skip


def engines(text: str) -> list[str]:
    """Read engines, separated by commas.

    Raises:
        UsageError: an engine is not known.
    """
    for word in text.split(","):
        if word not in choices.ENGINES:
            raise UsageError(
                f"must be of {', '.join(choices.ENGINES)}, with commas between, got {word!r}"
            )
    return text.split(",")


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin bench``.

    Returns:
        0 if every answer of the plugin was right, 1 if an answer was wrong.

    Raises:
        UsageError: the options cannot be run like this, or nothing was measured.
    """
    if arguments.what == "plot":
        _plot(arguments)
        return 0
    need_torch()
    import torch

    on_cpu = getattr(arguments, "device", "cuda") == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise UsageError(
            "there is no CUDA device here; nothing was measured (--device cpu: a dry run of all "
            "but bench read)"
        )
    if on_cpu and arguments.plot:
        raise UsageError(dry.NO_PLOT)
    for library in getattr(arguments, "load_library", ()):
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
        "machine": about, "what": arguments.what, "complete": False, "dry_run": on_cpu,
        "results": [],
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
    """Return the function that measures one of :data:`WHAT` and fills the results file."""
    if what == "topk":
        from dsv4_plugin.cli.bench.topk.command import run
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
    """Whether a result is right or a peer's; only the plugin's wrong answers count."""
    if "equal" in row:  # bench read: compared bit for bit with an engine's
        return bool(row["equal"])
    return row["implementation"] != compare.PLUGIN or compare.right(row)


def _plot(arguments: argparse.Namespace) -> None:
    """Draw a results file."""
    with reading(arguments.results):
        document = json.loads(arguments.results.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "results" not in document:
            raise UsageError(f"{arguments.results} is no results file: it has no results")
        if document.get("dry_run"):
            raise UsageError(dry.NO_PLOT)
        plots.draw(document, arguments.plot, k=arguments.k)
    print(f"drawn to {arguments.plot}")
