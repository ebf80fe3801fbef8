"""``dsv4-plugin bench logits`` and ``bench chain``: the run and the results file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dsv4_plugin.cli.bench import against, dry
from dsv4_plugin.cli.bench import upstream as installed
from dsv4_plugin.cli.bench.logits import bars, cases, report
from dsv4_plugin.cli.bench.logits.chain import ChainBench
from dsv4_plugin.cli.bench.logits.check import TOLERANCE
from dsv4_plugin.cli.bench.logits.measure import Bench, KeyBench
from dsv4_plugin.cli.bench.topk import floor, plot
from dsv4_plugin.cli.bench.topk.command import named
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared.run import UsageError, interruptible

__all__ = ["run"]


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the logits or the chain, and keep the results file up to date."""
    what, device = arguments.what, arguments.device
    lists = _cases(arguments)
    if arguments.plot and "decode" not in lists:
        raise UsageError("--plot draws the suite decode, which is not run")
    engines = against.engines_only(arguments.against)
    others = installed.load(engines, _forms(what, list(lists)), arguments.peers, of=what)
    named(others, say)
    asked = arguments.vllm_choice, arguments.sglang_choice
    choices = (others.choice("vllm", asked[0], "vllm33"),
               others.choice("sglang", asked[1], "sglang_v2"))  # fmt: skip
    if what == "chain" and others["logits"]:
        # Where the peers are all of engines, an engine that was not named is not missed.
        missed = set(choices) if arguments.peers else {name for name in asked if name}
        for name in sorted(missed - set(others["decode"]) - set(others.missing)):
            say(f"{name} is not compared: it is not among the peers")
    rate = floor.read_rate(device)
    say(f"roof: read {rate / 1e3:.0f} GB/s; floor: {cases.KEY_BYTES} bytes a key at this rate")
    document = file.document
    document |= {
        "suites": list(lists),
        "launches": arguments.launches,
        "replays": arguments.replays,
        "roof": {"read_gb_s": round(rate / 1e3, 1)},
        "floor": f"{cases.KEY_BYTES} bytes a key at the read rate",
        "bars": [],
        "results": [],
    }
    if what == "chain":
        document |= {"vllm_choice": choices[0], "sglang_choice": choices[1]}
    else:
        document["tolerance"] = TOLERANCE[device]
    kind: type[KeyBench] = Bench if what == "logits" else ChainBench
    bench = kind(
        others, say, file.save, device=device, cold_all=arguments.cold,
        launches=arguments.launches, replays=arguments.replays, budget_s=arguments.budget,
        results=document["results"],
    )  # fmt: skip
    bench.read_rate = rate
    if isinstance(bench, ChainBench):
        bench.choices = choices
    with interruptible() as work:
        for name, some in lists.items():
            say(f"\n{name}: {len(some)} cells; us warm/cold, ! wrong")
            bench.run(some)
    results = document["results"]
    done = results or bench.progress.out_of_time
    work.must(done, "nothing was measured: no cell is left", file.said())
    file.save(now=True)
    document["complete"] = work.whole and not bench.progress.out_of_time
    found = bars.logits_bars(results) if what == "logits" else bars.chain_bars(results, *choices)
    held = found if device == "cuda" else []
    document["bars"] = [bar.as_dict() for bar in held]
    file.save(now=True)
    end = ["", "Bars", *map(str, held)] if device == "cuda" else dry.answers(results)
    for line in report.lines(results) + end:
        say(line)
    if arguments.plot:
        plot.draw(document, arguments.plot, k=arguments.k[0] if arguments.k else None)
        say(f"drawn to {arguments.plot}")
    work.end(file.said())


def _forms(what: str, suites: list[str]) -> list[str]:
    """Return the forms of the peers that the suites have."""
    if what == "chain":
        return ["logits", "decode"]
    return list(dict.fromkeys("ragged_logits" if s == "prefill" else "logits" for s in suites))


def _cases(arguments: argparse.Namespace) -> dict[str, list[cases.Case]]:
    """Return the cases by suite.

    Raises:
        UsageError: an option is not for this benchmark.
    """
    what = arguments.what
    known = cases.SUITES if what == "logits" else ("decode",)
    names = list(known) if "all" in arguments.suite else list(dict.fromkeys(arguments.suite))
    strange = [name for name in names if name not in known]
    if strange:
        raise UsageError(
            f"--suite of bench {what} must be of {', '.join(known)} or all, got {strange[0]}"
        )
    some: dict[str, Any] = {
        "dtypes": arguments.dtype, "rows": arguments.rows, "columns": arguments.columns
    }  # fmt: skip
    if what == "chain":
        return {"decode": cases.chain(ks=arguments.k, **some)}
    if arguments.k:
        raise UsageError("--k is for bench topk and bench chain")
    return {name: cases.suite(name, **some) for name in names}
