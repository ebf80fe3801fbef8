"""``dsv4-plugin bench topk``: its suites, peers and floor."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dsv4_plugin.cli.bench import floor, suites
from dsv4_plugin.cli.bench.topk import report
from dsv4_plugin.cli.bench.topk.measure import Bench
from dsv4_plugin.cli.checks import topk_cases as cases
from dsv4_plugin.cli.checks.results import Results

__all__ = ["run"]


def run(arguments: argparse.Namespace, file: Results, say: Callable[[str], None]) -> None:
    """Measure the suites, and keep the results file up to date."""
    names, device = suites.chosen(arguments, cases.SUITES), arguments.device
    of = {"prefill": "prefill", "paged": "paged"}
    forms = list(dict.fromkeys(of.get(name, "decode") for name in names))
    others = suites.peers(arguments, forms, say)
    vllm = others.choice("vllm", arguments.vllm_choice, "vllm33")
    roof = {
        "read_gb_s": round(floor.read_rate(device) / 1e3, 1),
        "copy_gb_s": round(floor.copy_rate(device) / 1e3, 1),
    }
    if device == "cuda":
        say(f"roof: read {roof['read_gb_s']:.0f} GB/s, copy {roof['copy_gb_s']:.0f} GB/s "
        f"(read + written); floor: {floor.method(device)}")  # fmt: skip
    cells = {
        name: cases.suite(name, dtypes=arguments.dtype, ks=arguments.k,
                          rows=arguments.rows, columns=arguments.columns)
        for name in names
    }  # fmt: skip
    suites.run(
        arguments, file, suites.bench(Bench, arguments, file, say, others), cells,
        {"vllm_choice": vllm, "roof": roof, "floor": floor.method(device)},
        lambda results: report.lines(results, roof), vllm=vllm,
    )  # fmt: skip
