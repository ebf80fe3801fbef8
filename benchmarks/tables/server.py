"""What whole servers showed, made from the committed results.

``python -m benchmarks.tables NAME`` prints what stands between the markers of that name: ``modes``
and ``drills`` of docs/development/vllm.md, ``sglang-drills`` of docs/development/sglang.md,
``sglang-server`` and ``tokenspeed-server`` of docs/results.md, ``ab`` of docs/ab.md.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.server.drills import ALONE, CROWD
from benchmarks.server.measure import agreement
from benchmarks.tables import readme as figures
from dsv4_plugin.cli.ab import report

__all__ = [
    "AB", "DRILLS", "MODES", "PAIRS", "SGLANG", "SGLANG_DRILLS", "TOKENSPEED", "ab", "drills",
    "modes", "sglang", "sglang_drills", "tokenspeed",
]  # fmt: skip

MODES, SGLANG, AB = "h200_vllm_modes.json", "h200_sglang_e2e.json", "h200_ab_sglang.json"
TOKENSPEED = "h200_tokenspeed_e2e.json"
SGLANG_DRILLS = "h200_sglang_drills.json"
PAIRS = ("h200_vllm033_modes.json", "h200_vllm033_v32_modes.json")
DRILLS = (
    "h200_vllm033_v41_seam.json",
    "h200_vllm033_v41_drills.json",
    "h200_vllm033_drills.json",
    "h200_vllm_drills.json",
)


def _where(about: dict[str, Any], name: str) -> str:
    engine = "vLLM" if "vllm" in about else "SGLang"
    return (
        f"{engine} {about[engine.lower()]}, one {about['gpu']}, commit {about['commit'][:7]} "
        f"(`benchmarks/results/{name}`)"
    )


def modes() -> str:
    """Return the Markdown between the ``modes`` markers: one table for each file."""
    return "\n\n".join([*map(_pairs, PAIRS), _modes()])


def _pairs(name: str) -> str:
    """Return the table of a file of :mod:`benchmarks.server.modes`."""
    document = figures.load(name)
    model, prompts = document["model"], len(ALONE)
    lines = [
        f"{_where(document['machine'], name)}, `{model['model_type']}` with "
        f"{model['num_hidden_layers']} layers of random weights. Each server gets requests of "
        f"{min(CROWD)} to {max(CROWD):,} tokens, {len(CROWD)} at a time, and {prompts} prompts "
        "alone, twice. *twice alike* and *as without* are of these:",
        "",
        "| server | arguments | requests answered | decode calls, plugin / vLLM | prefill calls, "
        "plugin / vLLM | twice alike | as without | passed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for server in document["drills"]:
        counters, requests, found = server["counters"], server["requests"], server["compared"]
        given = " ".join(server["arguments"])
        given = f"`{given}`" if given else "default graphs"
        topk = server["environment"].get("DSV4_TOPK")
        calls = [
            f"{counters.get(f'topk.{kind}', 0)} / "
            f"{sum(counters.get(f'topk.{kind}.{of}', 0) for of in ('aside', 'upstream'))}"
            for kind in ("decode", "prefill")
        ]
        alike = sum(answer is not None and answer["identical"] for answer in found["answers"])
        lines.append(
            f"| {server['name']} | {given}{f', `DSV4_TOPK={topk}`' if topk else ''} | "
            f"{requests['answered']} of {requests['sent']} | "
            f"{' | '.join(calls) if counters else 'no plugin | no plugin'} | "
            f"{sum(found['repeats_itself'])} of {prompts} | "
            f"{f'{alike} of {prompts}' if server['base'] != server['name'] else ''} | "
            f"{'yes' if server['passed'] else 'no: ' + '; '.join(server['wrong'])} |"
        )
    return "\n".join(lines)


def _modes() -> str:
    """Return the table of the older file, of a run with ``--outputs``."""
    document = figures.load(MODES)
    outputs, servers = document["outputs"], document["servers"]
    tokens = outputs["tokens"]
    lines = [
        f"{_where(document['machine'], MODES)}, {document['model']['num_hidden_layers']} layers of "
        f"random weights. Each server gives greedy answers of {tokens} tokens to "
        f"{len(outputs['prompt_tokens'])} prompts of "
        f"{min(outputs['prompt_tokens']):,} to {max(outputs['prompt_tokens']):,} tokens, twice. "
        "*twice alike* counts the prompts whose two answers are the same, *as without* those whose "
        "answer is that of the server without the plugin:",
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
        "The median position of the first token that differs is "
        f"{repeated:g} between two answers of one server without the plugin, and {with_it:g} "
        "between an answer with the plugin and one without.",
    ]
    return "\n".join(lines)


def sglang() -> str:
    """Return the Markdown between the ``sglang-server`` markers."""
    return _served(
        SGLANG, "SGLang",
        "*Logits to top-k* is the time from the start of the logits to the end of the top-k; the "
        "next columns are the times of the two kernels:",
        ("GPU busy, ms a step", "logits to top-k, µs a layer", "its top-k", "its logits"),
        _kernels,
    )  # fmt: skip


def tokenspeed() -> str:
    """Return the Markdown between the ``tokenspeed-server`` markers."""
    document = figures.load(TOKENSPEED)
    if not document["tpot_ms"]:
        return _started(document)
    return _served(
        TOKENSPEED, "TokenSpeed",
        "*Indexer* is the time of the kernels of the logits, the top-k and the slots:",
        ("GPU busy, ms a step", "indexer, µs a layer"),
        _chain,
    )  # fmt: skip


def _served(
    name: str, engine: str, note: str, columns: Sequence[str],
    of: Callable[[dict[str, Any]], list[str]],
) -> str:  # fmt: skip
    """Return the table of one file: times, and what the profiler saw (``of``, for ``columns``)."""
    document = figures.load(name)
    about = document["machine"]
    profiles = {(of["context"], of["concurrency"]): of["servers"] for of in document["profiles"]}
    lines = [
        f"{engine} {about[engine.lower()]} with {document['model']['num_hidden_layers']} layers of "
        f"random weights, on one {about['gpu']} (`benchmarks/results/{name}`, of commit "
        f"{about['commit'][:7]}), without the plugin / with it (`DSV4_TOPK=auto`: bfloat16). "
        f"{note}",
        "",
        "| requests x tokens of context | ms a token | ratio (95 % interval) | "
        f"{' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    firsts = []
    for row in document["summary"]:
        low, high = row.get("interval95", (0, 0))
        ratio = f"{row['ratio']:.3f} ({low:.3f} – {high:.3f})"
        if row["figure"] == "ttft_s":
            times = f"{row['off']:.2f} / {row['on']:.2f} s"
            firsts.append(f"{row['context']:,} tokens {times}, {ratio}")
        if row["figure"] != "tpot_ms":
            continue
        found = profiles.get((row["context"], row["concurrency"]))
        kernels = " | ".join(of(found) if found else "–" * len(columns))
        lines.append(
            f"| {row['concurrency']} x {row['context']:,} | {row['off']:.2f} / {row['on']:.2f} | "
            f"{ratio} | {kernels} |"
        )
    if firsts:
        lines += ["", "Time to the first token of a prompt that no cache holds: "
                      f"{'; '.join(firsts)}."]  # fmt: skip
    return "\n".join(lines)


def _started(document: dict[str, Any]) -> str:
    """Say what a run of two TokenSpeed engines showed that ended before it timed a request."""
    about, off, on = document["machine"], *map(document["servers"].get, ("off", "on"))
    rows, failures = on["rows"][0], on["status"][0]["failures"]
    assert not failures
    return (
        f"TokenSpeed {about['tokenspeed']} with {document['model']['num_hidden_layers']} layers of "
        f"random weights, on one {about['gpu']} (`benchmarks/results/{TOKENSPEED}`, of commit "
        f"{about['commit'][:7]}): two whole engines, without the plugin and with it, side by side. "
        f"Both served after {off['ready_s']:.0f} s, with CUDA graphs of decode "
        f"({off['memory']['graphs_gib']:.1f} / {on['memory']['graphs_gib']:.1f} GB). In the one "
        f"with the plugin it selected {rows['topk.dsa_prefill_topk']:,} rows of prefill and "
        f"{rows['topk.dsa_decode_topk']:,} of decode, and none of its calls failed. **No time was "
        "measured, and no answers were compared**: the run ended while the engine without the "
        "plugin compiled its kernels for the first requests."
    )


def _chain(servers: dict[str, Any]) -> list[str]:
    return figures.profiled([servers["off"], servers["on"]])


def _kernels(servers: dict[str, Any]) -> list[str]:
    """Return what the profiler saw of the servers ``off`` and ``on``."""
    sides = servers["off"], servers["on"]
    of = [
        [f"{side['busy_us'] / 1e3:.2f}" for side in sides],
        [f"{side['logits_to_topk_us']:.1f}" for side in sides],
        [f"{side['parts']['topk']['us_call']:.1f}" for side in sides],
        [f"{side['parts']['logits']['us_call']:.1f}" for side in sides],
    ]
    return [" / ".join(pair) for pair in of]


def ab() -> str:
    """Return the Markdown between the ``ab`` markers."""
    document = figures.load(AB)
    about = document["machine"]
    (version,) = {server["version"] for server in document["servers"]}
    calls = document["sides"]["B"]["engagement"]["processes"]
    served = sum(process["counters"]["topk.paged"] for process in calls)
    shown = "; ".join(
        f"{row['metric']} {row['a_mean']:.2f} / {row['b_mean']:.2f} {row['unit']}, "
        f"{row['ratio']:.3f} ({row['low']:.3f} – {row['high']:.3f}), {row['verdict']}"
        for row in document["summary"]
        if row["metric"] in ("TPOT mean", "ITL mean", "TTFT mean")
    )
    (sentence,) = report.closing(document)
    return (
        f"On a whole server of SGLang {version} with its own client, one {about['gpu']}, commit "
        f"{about['commit'][:7]} (`benchmarks/results/{AB}`), "
        f"{document['design']['workloads'][0]}: {shown}. The counters of B: {served:,} calls of "
        f"the top-k, of A: none. The last line was: `{sentence}`."
    )


def drills() -> str:
    """Return the Markdown between the ``drills`` markers: one table for each file."""
    return "\n\n".join(map(_drills, DRILLS))


def sglang_drills() -> str:
    """Return the Markdown between the ``sglang-drills`` markers."""
    return _drills(SGLANG_DRILLS, "paged")


def _drills(name: str, kind: str = "decode") -> str:
    document = figures.load(name)
    lines = [
        f"{_where(document['machine'], name)}:",
        "",
        f"| drill | what is broken | requests answered | {kind} calls, plugin / engine | passed |",
        "|---|---|---|---|---|",
    ]
    for drill in document["drills"]:
        counters, requests = drill["counters"], drill["requests"]
        calls = [counters.get(f"topk.{kind}{of}", 0) for of in ("", ".upstream")]
        lines.append(
            f"| {drill['name']} | {drill['what']} | {requests['answered']} of {requests['sent']} | "
            f"{' / '.join(map(str, calls)) if counters else 'no plugin'} | "
            f"{'yes' if drill['passed'] else 'no: ' + '; '.join(drill['wrong'])} |"
        )
    return "\n".join(lines)
