"""``dsv4-plugin bench topk``: the run and the results file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dsv4_plugin.cli.bench import against, dry
from dsv4_plugin.cli.bench import upstream as installed
from dsv4_plugin.cli.bench.topk import bars, cases, floor, peers, plot, report
from dsv4_plugin.cli.bench.topk.measure import Bench
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared.run import UsageError, interruptible

__all__ = ["named", "run"]


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the suites, and keep the results file up to date."""
    suites = _suites(arguments.suite)
    if arguments.plot and "decode" not in suites:
        raise UsageError("--plot draws the suite decode, which is not run")
    engines, files = against.split(arguments.against)
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
    document = file.document
    document |= {
        "suites": suites,
        "launches": arguments.launches,
        "replays": arguments.replays,
        "vllm_choice": vllm,
        "roof": roof,
        "floor": floor.method(device),
        "bars": [],
        "results": [],
    }
    bench = Bench(
        others, say, file.save, device=device, cold_all=arguments.cold,
        launches=arguments.launches, replays=arguments.replays, budget_s=arguments.budget,
        results=document["results"],
    )  # fmt: skip
    with interruptible() as work:
        for name in document["suites"]:
            some = cases.suite(name, dtypes=arguments.dtype, ks=arguments.k,
                               rows=arguments.rows, columns=arguments.columns)  # fmt: skip
            if name == "seed":
                some = _not_yet(some, document["results"])
            say(f"\n{name}: {len(some)} cells; us warm/cold, ! not exact")
            bench.run(some)
    done = document["results"] or bench.progress.out_of_time
    work.must(done, "nothing was measured: no cell is left", file.said())
    file.save(now=True)
    document["complete"] = work.whole and not bench.progress.out_of_time
    mine = {(row["k"], row["rows"], row["columns"]) for row in document["results"]}
    document["results"] += [r for r in known if (r["k"], r["rows"], r["columns"]) in mine]
    on_gpu = device == "cuda"
    held = bars.all_bars(document["results"], vllm) if on_gpu else []
    document["bars"] = [bar.as_dict() for bar in held]
    file.save(now=True)
    results = document["results"]
    end = report.bars_lines(results, held) if on_gpu else dry.answers(results)
    for line in report.lines(results, roof) + end:
        say(line)
    if arguments.plot:
        plot.draw(document, arguments.plot, k=arguments.k[0] if arguments.k else None)
        say(f"drawn to {arguments.plot}")
    work.end(file.said())


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
