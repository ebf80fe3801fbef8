"""``dsv4-plugin bench topk`` and ``bench plot``: options, the run, the results file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.bench import dry, read_plot
from dsv4_plugin.cli.bench import upstream as installed
from dsv4_plugin.cli.bench.topk import UsageError, bars, cases, floor, peers, plot, report
from dsv4_plugin.cli.bench.topk.measure import Bench
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.recall import plot as recall_plot

__all__ = ["add_arguments", "named", "run", "run_plot"]


def add_arguments(parser: argparse.ArgumentParser, more_suites: Sequence[str] = ()) -> None:
    """Declare the arguments of the benchmarks of cells: the top-k, the logits and the chain.

    ``more_suites`` are those that the top-k does not have.
    """
    group = parser.add_argument_group("topk, logits, chain")
    add = group.add_argument
    add(
        "--suite", nargs="+", choices=(*cases.SUITES, *more_suites, "all"), default=["decode"],
        help="topk: decode: k x rows x columns (default); narrow: 8K rows in 256,000-wide buffers; "
        "adversarial: scores that hurt; prefill: thousands of rows; paged: answers in pool slots; "
        "seed: bfloat16 over float32 beside the figures of vLLM #40811. logits: decode: requests x "
        "keys (default); next_n: several queries a request; varied: lengths that differ; prefill: "
        "causal windows of gathered keys. chain: decode",
    )  # fmt: skip
    add("--k", type=int, nargs="+", help="only these k (plot: the k to draw; not logits)")
    add(
        "--rows",
        type=int,
        nargs="+",
        help="only these numbers of rows (logits, chain: of requests)",
    )
    add("--columns", type=int, nargs="+", help="only these numbers of columns")
    add(
        "--dtype", nargs="+", choices=tuple(cases.DTYPES),
        help="what selects; narrow is float32 read as bfloat16 (default: bfloat16 float32)",
    )  # fmt: skip
    add(
        "--peers", type=Path, metavar="FILE.py",
        help="other kernels: available(), available_prefill(), available_paged(), "
        "available_logits() and available_ragged_logits() return them",
    )  # fmt: skip
    add(
        "--against", action="append", default=[], metavar="ENGINE[,ENGINE...]|FILE.csv",
        help=f"the kernels of what is installed here of {', '.join(installed.ENGINES)}; what is "
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
    add("--launches", type=int, default=40, help="launches in a graph (default: 40)")
    add("--replays", type=int, default=7, help="replays, whose median counts (default: 7)")
    add(
        "--budget", type=float, metavar="SECONDS",
        help="begin no cell after this time; what was measured is reported",
    )  # fmt: skip
    add(
        "--plot", type=Path, metavar="FILE",
        help="draw the decode suite, or the reads (.png or .svg); needs matplotlib",
    )  # fmt: skip
    add(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a dry run of the harness on the torch reference, of a small grid where --k, "
        "--rows, --columns are not given; its times mean nothing",
    )  # fmt: skip


def run(
    arguments: argparse.Namespace, about: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the suites; returns the document of the results file, which is kept up to date."""
    suites = _suites(arguments.suite)
    if arguments.plot:
        plot.require()  # now, not when all is measured
    engines, files = installed.split(arguments.against)
    known = [row for file in files for row in peers.recorded(file)]
    others = installed.load(engines, _forms(suites), arguments.peers, of="topk")
    named(others, say)
    vllm = others.choice("vllm", arguments.vllm_choice, "vllm33")
    for known_file in files:
        say(f"recorded, other run: {known_file}")
    device = arguments.device
    roof = {
        "read_gb_s": round(floor.read_rate(device) / 1e3, 1),
        "copy_gb_s": round(floor.copy_rate(device) / 1e3, 1),
    }
    say(f"roof: read {roof['read_gb_s']:.0f} GB/s, copy {roof['copy_gb_s']:.0f} GB/s "
        f"(read + written); floor: {floor.method(device)}")  # fmt: skip
    document: dict[str, Any] = {
        "machine": about,
        "what": "topk",
        "complete": False,
        "suites": suites,
        "launches": arguments.launches,
        "replays": arguments.replays,
        "vllm_choice": vllm,
        "roof": roof,
        "floor": floor.method(device),
        "bars": [],
        "results": [],
    }
    file = Results(document, arguments.json)
    bench = Bench(
        others, say, file.save, device=device, cold_all=arguments.cold, launches=arguments.launches,
        replays=arguments.replays, budget_s=arguments.budget, results=document["results"],
    )  # fmt: skip
    complete = False
    try:
        for name in document["suites"]:
            some = cases.suite(name, dtypes=arguments.dtype, ks=arguments.k, rows=arguments.rows,
                               columns=arguments.columns)  # fmt: skip
            if name == "seed":
                some = _not_yet(some, document["results"])
            say(f"\n{name}: {len(some)} cells; us warm/cold, ! not exact")
            bench.run(some)
        complete = not bench.progress.out_of_time
    except KeyboardInterrupt:
        say("interrupted: what was measured is reported")
    finally:
        file.save(now=True)
    document["complete"] = complete
    mine = {(row["k"], row["rows"], row["columns"]) for row in document["results"]}
    document["results"] += [r for r in known if (r["k"], r["rows"], r["columns"]) in mine]
    on_gpu = device == "cuda"
    held = bars.all_bars(document["results"], vllm) if on_gpu else []
    document["bars"] = [bar.as_dict() for bar in held]
    file.save(now=True)
    end = (
        report.bars_lines(document["results"], held) if on_gpu else dry.answers(document["results"])
    )
    for line in report.lines(document["results"], roof) + end:
        say(line)
    if arguments.plot:
        plot.draw(document, arguments.plot, k=arguments.k[0] if arguments.k else None)
        say(f"drawn to {arguments.plot}")
    return document


def run_plot(arguments: argparse.Namespace) -> None:
    """Draw a results file."""
    if arguments.results is None or arguments.plot is None:
        raise UsageError("bench plot needs a results file and --plot FILE")
    try:
        document = json.loads(arguments.results.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{arguments.results} is no results file: {error}") from error
    if not isinstance(document, dict) or "results" not in document:
        raise UsageError(f"{arguments.results} is no results file: it has no results")
    what = document.get("what", "topk")
    if what == "recall":
        recall_plot.draw(document, arguments.plot)
    elif what == "read":
        read_plot.draw(document, arguments.plot)
    elif what in plot.TITLE:
        plot.draw(document, arguments.plot, k=arguments.k[0] if arguments.k else None)
    else:
        raise UsageError(f"{arguments.results} has results of {what!r}, which has no plot")


def named(others: peers.Peers, say: Callable[[str], None]) -> None:
    """Say which peers there are not, and why."""
    for name, why in others.missing.items():
        say(f"{name} is not compared: {why}")


def _forms(suites: list[str]) -> list[str]:
    """Return the forms of the peers that the suites have."""
    of = {"prefill": "prefill", "paged": "paged"}
    return list(dict.fromkeys(of.get(name, "decode") for name in suites if name != "seed"))


def _suites(names: list[str]) -> list[str]:
    strange = [name for name in names if name not in (*cases.SUITES, "all")]
    if strange:
        raise UsageError(
            f"--suite of bench topk must be of {', '.join(cases.SUITES)} or all, got {strange[0]}"
        )
    return list(cases.SUITES) if "all" in names else list(dict.fromkeys(names))


def _not_yet(some: list[cases.Case], results: list[dict[str, Any]]) -> list[cases.Case]:
    """Leave out the seed's cells that the decode suite of this run has measured."""
    have = {
        (row["dtype"], row["k"], row["rows"], row["columns"])
        for row in results
        if row["suite"] == "decode" and row["implementation"] == peers.OURS
    }
    return [case for case in some if (case.dtype, case.k, case.rows, case.columns) not in have]
