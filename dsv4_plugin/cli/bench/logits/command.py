"""``dsv4-plugin bench logits`` and ``bench chain``: their suites, peers and floor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dsv4_plugin.cli.bench import floor, suites
from dsv4_plugin.cli.bench.logits import cases, report
from dsv4_plugin.cli.bench.logits.chain import ChainBench
from dsv4_plugin.cli.bench.logits.check import TOLERANCE
from dsv4_plugin.cli.bench.logits.measure import Bench, KeyBench
from dsv4_plugin.cli.checks.results import Results

__all__ = ["run"]


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the logits or the chain, and keep the results file up to date."""
    device, is_chain = arguments.device, arguments.what == "chain"
    names = suites.chosen(arguments, ("decode",) if is_chain else cases.SUITES)
    grid: dict[str, Any] = {
        "dtypes": arguments.dtype, "rows": arguments.rows, "columns": arguments.columns
    }  # fmt: skip
    if is_chain:
        cells = {"decode": cases.chain(ks=arguments.k, **grid)}
        forms = ["logits", "decode"]
    else:
        cells = {name: cases.suite(name, **grid) for name in names}
        forms = list(dict.fromkeys(_form(name) for name in names))
    others = suites.peers(arguments, forms, say)
    rate = floor.read_rate(device)
    method = f"{cases.KEY_BYTES} bytes a key at the read rate"
    if device == "cuda":
        say(f"roof: read {rate / 1e3:.0f} GB/s; floor: {method}")
    about: dict[str, Any] = {"roof": {"read_gb_s": round(rate / 1e3, 1)}, "floor": method}
    engines: dict[str, str] = {}
    kind: type[KeyBench] = ChainBench if is_chain else Bench
    bench = suites.bench(kind, arguments, file, say, others)
    bench.read_rate = rate
    if isinstance(bench, ChainBench):
        asked = {"vllm": arguments.vllm_choice, "sglang": arguments.sglang_choice}
        usual = {"vllm": "vllm33", "sglang": "sglang_v2"}
        engines = {name: others.choice(name, asked[name], usual[name]) for name in usual}
        bench.choices = tuple(engines.values())
        about |= {f"{name}_choice": choice for name, choice in engines.items()}
        if others["logits"]:
            # If all peers come from engines, an engine that was not named is not reported as
            # missing.
            missed = bench.choices if arguments.peers else tuple(filter(None, asked.values()))
            for name in sorted(set(missed) - set(others["decode"]) - set(others.missing)):
                say(f"{name} is not compared: it is not among the peers")
    else:
        about["tolerance"] = TOLERANCE[device]
    suites.run(arguments, file, bench, cells, about, report.lines, **engines)


def _form(suite: str) -> str:
    """Return the form of peers that a suite uses."""
    return "ragged_logits" if suite == "prefill" else "logits"
