"""The tables of docs/vllm.md, made from the committed results.

``python -m benchmarks.tables modes`` (``drills``) prints what stands between the
markers of that name.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from benchmarks.server.measure import agreement
from benchmarks.tables import readme as figures

__all__ = ["DRILLS", "MODES", "drills", "modes"]

MODES = "h200_vllm_modes.json"
DRILLS = ("h200_vllm033_drills.json", "h200_vllm_drills.json")


def _where(about: dict[str, Any], name: str) -> str:
    return (
        f"vLLM {about['vllm']}, one {about['gpu']}, commit {about['commit'][:7]} "
        f"(`benchmarks/results/{name}`)"
    )


def modes() -> str:
    """Return the Markdown between the ``modes`` markers."""
    document = figures.load(MODES)
    outputs, servers = document["outputs"], document["servers"]
    tokens = outputs["tokens"]
    lines = [
        f"{_where(document['machine'], MODES)}, {document['model']['num_hidden_layers']} layers of "
        f"random weights. Prompts answered alike: greedily, {tokens} tokens, of "
        f"{len(outputs['prompt_tokens'])} prompts of "
        f"{min(outputs['prompt_tokens']):,} to {max(outputs['prompt_tokens']):,} tokens, twice by "
        "one server, and by the server without the plugin:",
        "",
        "| server | arguments | top-k calls, decode / prefill | twice alike | as without |",
        "|---|---|---|---|---|",
    ]
    words = document["command"]
    given = [b for a, b in itertools.pairwise(words) if a == "--arguments"]
    arguments_of = {name: more for name, _, more in (word.partition("=") for word in given)}
    for name, server in servers.items():
        more = arguments_of.get(name)
        counters = server["status"][0]["counters"] if server["status"] else {}
        calls = [counters.get(f"topk.{kind}", 0) for kind in ("decode", "prefill")]
        alike = outputs["as_baseline"].get(name)
        lines.append(
            f"| {name} | {f'`{more}`' if more else 'default graphs'} | "
            f"{' / '.join(map(str, calls)) if counters else 'no plugin'} | "
            f"{sum(outputs['repeatable'][name])} | "
            f"{sum(a['identical'] for a in alike) if alike else ''} |"
        )
    twice = [
        agreement(a, b)
        for name, runs in outputs["token_ids"].items()
        if not servers[name]["status"]
        for a, b in zip(*runs, strict=True)
    ]
    beside = [a for of in outputs["as_baseline"].values() for a in of]
    repeated, with_it = (
        statistics.median(tokens if a["identical"] else a["first_difference"] for a in answers)
        for answers in (twice, beside)
    )
    lines += [
        "",
        "The first token that differs, median: of two answers by one server without the plugin "
        f"{repeated:g}, of an answer with it and one without {with_it:g}.",
    ]
    return "\n".join(lines)


def drills() -> str:
    """Return the Markdown between the ``drills`` markers: a table a file."""
    return "\n\n".join(map(_drills, DRILLS))


def _drills(name: str) -> str:
    document = figures.load(name)
    lines = [
        f"{_where(document['machine'], name)}:",
        "",
        "| drill | what is broken | requests answered | decode calls, plugin / engine | passed |",
        "|---|---|---|---|---|",
    ]
    for drill in document["drills"]:
        counters, requests = drill["counters"], drill["requests"]
        calls = [counters.get(f"topk.decode{of}", 0) for of in ("", ".upstream")]
        lines.append(
            f"| {drill['name']} | {drill['what']} | {requests['answered']} of {requests['sent']} | "
            f"{' / '.join(map(str, calls)) if counters else 'no plugin'} | "
            f"{'yes' if drill['passed'] else 'no: ' + '; '.join(drill['wrong'])} |"
        )
    return "\n".join(lines)
