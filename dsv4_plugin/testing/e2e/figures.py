"""The tables of docs/vllm.md, made from the committed results.

``python -m dsv4_plugin.testing.e2e.figures modes`` (``drills``) prints what stands between the
markers of that name.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from typing import Any

from dsv4_plugin.testing import figures

__all__ = ["DRILLS", "MODES", "drills", "modes"]

MODES = "h200_vllm_modes.json"
DRILLS = "h200_vllm_drills.json"


def _where(about: dict[str, Any], name: str) -> str:
    return (
        f"vLLM {about['vllm']}, one {about['gpu']}, commit {about['commit'][:7]} "
        f"(`benchmarks/results/{name}`)"
    )


def modes() -> str:
    """Return the Markdown between the ``modes`` markers."""
    document = figures._load(MODES)
    outputs, servers = document["outputs"], document["servers"]
    lines = [
        f"{_where(document['machine'], MODES)}, {document['model']['num_hidden_layers']} layers of "
        "random weights. Prompts answered alike: greedily, 64 tokens, of "
        f"{len(outputs['prompt_tokens'])} prompts of "
        f"{min(outputs['prompt_tokens']):,} to {max(outputs['prompt_tokens']):,} tokens, twice by "
        "one server, and by the server without the plugin:",
        "",
        "| server | arguments | top-k calls, decode / prefill | twice alike | as without |",
        "|---|---|---|---|---|",
    ]
    words = document["command"]
    given = [b for a, b in itertools.pairwise(words) if a == "--arguments"]
    own_of = {name: own for name, _, own in (word.partition("=") for word in given)}
    for name, server in servers.items():
        own = own_of.get(name)
        counters = server["status"][0]["counters"] if server["status"] else {}
        calls = [counters.get(f"topk.{kind}", 0) for kind in ("decode", "prefill")]
        alike = outputs["as_baseline"].get(name)
        lines.append(
            f"| {name} | {f'`{own}`' if own else 'default graphs'} | "
            f"{' / '.join(map(str, calls)) if counters else 'no plugin'} | "
            f"{sum(outputs['repeatable'][name])} | "
            f"{sum(a['identical'] for a in alike) if alike else ''} |"
        )
    first = {
        name: [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
               for a, b in zip(*runs, strict=True)]
        for name, runs in outputs["token_ids"].items()
    }  # fmt: skip
    off = [i for name, where in first.items() if not servers[name]["status"] for i in where]
    with_it = [a["first_difference"] for of in outputs["as_baseline"].values() for a in of]
    known = [64 if i is None else i for i in with_it]
    lines += [
        "",
        "The first token that differs, median: of two answers by one server without the plugin "
        f"{statistics.median(off):g}, of an answer with it and one without "
        f"{statistics.median(known):g}.",
    ]
    return "\n".join(lines)


def drills() -> str:
    """Return the Markdown between the ``drills`` markers."""
    document = figures._load(DRILLS)
    lines = [
        f"{_where(document['machine'], DRILLS)}:",
        "",
        "| drill | what is broken | requests answered | decode calls, ours / upstream's | passed |",
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


if __name__ == "__main__":
    print({"modes": modes, "drills": drills}[sys.argv[1]]())
