"""The steps of a run: each takes the servers, alternates between them and returns plain data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.server.client import TooFew, at_once, random_prompt, time_per_token, together
from benchmarks.server.engines import CHUNK
from benchmarks.server.model import Model
from benchmarks.server.server import Server
from dsv4_plugin.cli.ab.intervals import ratio

__all__ = [
    "CHUNK",
    "TAIL",
    "Traces",
    "agreement",
    "contexts",
    "outputs",
    "profile",
    "tokens_to_ask",
    "tpot",
    "ttft",
    "unseen",
    "warm",
]

# A context is whole chunks and this many tokens. The server always computes this end of a context,
# also where it copies the chunks before.
TAIL = 512
SETTLED = 1.2
LEAD = 48  # tokens of an answer before those that are timed,
LEAD_CONTEXT = 4096  # and one more for so many tokens of context
FASTEST_S = 0.008  # no step of several requests is faster
MOST_TOKENS = 2048
TRIES = 2  # of one measurement
ALONE_TOKENS, CROWD_TOKENS = 14, 256  # while one request is profiled, and the least for several
CROWD_S = 0.2


def warm(servers: Sequence[Server], batch: int, until: float) -> dict[str, list[float]]:
    """Send new prompts until the first token comes as fast as for the prompt before.

    The engine compiles kernels on the way. Returns the seconds to each first token.
    """
    took: dict[str, list[float]] = {server.name: [] for server in servers}

    def one(server: Server) -> None:
        times = took[server.name]
        seed = 1_000_000
        while len(times) < 6 and time.monotonic() < until:
            seed += 1
            prompt = random_prompt(2 * CHUNK + TAIL, seed)
            times.append(round(server.client.complete(prompt, 8).ttft, 3))
            server.client.complete(prompt, 8)  # the tokens to compute when the prefix is cached
            if len(times) > 1 and times[-1] * SETTLED > times[-2]:
                break
        prompts = [random_prompt(TAIL + 7 * i, seed + i) for i in range(batch)]
        together([(server.client, p) for p in prompts], 24)

    at_once(one, servers)
    return took


def outputs(
    servers: Sequence[Server],
    lengths: Sequence[int],
    tokens: int,
    times: int = 2,
    bases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Greedy answers to the same prompts, several times each, never from the prefix cache.

    ``bases`` names the server with which each other server is compared; the default is the first.
    """
    prompts = [random_prompt(n, 77 + i) for i, n in enumerate(lengths)]
    answers: dict[str, list[list[list[int]]]] = {server.name: [] for server in servers}

    def one(server: Server) -> None:
        for again in range(times):
            answers[server.name].append(
                [
                    server.client.complete(p, tokens, f"outputs {again}", ids=True).tokens
                    for p in prompts
                ]
            )

    for server in servers:  # one after the other, so that the GPU has no other work
        one(server)
    if bases is None:
        bases = {server.name: servers[0].name for server in servers[1:]}
    return {
        "prompt_tokens": list(lengths),
        "tokens": tokens,
        "repeatable": {
            name: [all(run[i] == runs[0][i] for run in runs) for i in range(len(prompts))]
            for name, runs in answers.items()
        },
        "as_baseline": {
            name: [agreement(answers[base][0][i], answers[name][0][i]) for i in range(len(prompts))]
            for name, base in bases.items()
        },
        "token_ids": answers,
    }


def agreement(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """Return how far two answers agree."""
    same = [x == y for x, y in zip(a, b, strict=True)]
    return {
        "identical": all(same),
        "first_difference": same.index(False) if False in same else None,
        "share": round(sum(same) / len(same), 4),
    }


def contexts(
    servers: Sequence[Server], context: int, count: int, copy: bool
) -> tuple[list[list[int]], str]:
    """Fill the caches of all servers with ``count`` contexts; returns prompts and how.

    A context is made of whole chunks and :data:`TAIL` tokens. The server computes a context of up
    to two chunks. If copying fails, it computes the rest, and the context counts as computed.
    """
    prompts = [random_prompt(context + TAIL, 10 * context + i) for i in range(count)]
    copy = copy and context > 2 * CHUNK and all(server.engine.copies for server in servers)
    failed: list[str] = []

    def one(server: Server) -> None:
        server.copy_contexts(copy)
        try:
            for prompt in prompts:
                server.client.complete(prompt, 2, timeout=600)
            failed.extend([server.name] if copy and not server.copies else [])
        finally:
            server.copy_contexts(False)

    at_once(one, servers)
    if failed and len(failed) < len(servers):
        raise RuntimeError(f"copying a context failed in {', '.join(failed)} only; see the log")
    return prompts, "copied" if copy and not failed else "computed"


def unseen(servers: Sequence[Server], prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Answer the prompts, untimed; return how many seconds apart the answers begin.

    The first answers after a change of shape compile, allocate and fill caches, and some wait for
    each other. So several prompts are answered twice, and the second round gives the seconds.
    """
    apart = 0.0
    for server in servers:
        for _ in range(min(len(prompts), 2)):
            answers = together([(server.client, p) for p in prompts], tokens)
        firsts = [answer.times[0] for answer in answers]
        apart = max(apart, max(firsts) - min(firsts))
    return apart


def lead(context: int) -> int:
    """Return how many tokens of an answer are not timed.

    The first tokens come late and then all at once, because the server is busy with the prompt
    while the GPU already decodes. This grows with the prompt (more than a second with a million
    tokens).
    """
    return LEAD + context // LEAD_CONTEXT


def tokens_to_ask(tokens: int, apart: float, context: int) -> int:
    """Return how many tokens to ask for, so that ``tokens`` are timed while all requests decode.

    ``apart``: how many seconds apart the answers begin.
    """
    return min(lead(context) + tokens + math.ceil(apart / FASTEST_S), MOST_TOKENS)


def tpot(
    servers: Sequence[Server], prompts: Sequence[Sequence[int]], tokens: int, pairs: int, least: int
) -> tuple[dict[str, list[float]], int]:
    """Milliseconds a token in turn: A B, B A, …; the prompts are in the prefix cache.

    ``tokens`` are asked for, of which the first are not timed (:func:`lead`). Where fewer than
    ``least`` are left to be timed, the same is asked once more, because a server stands still now
    and then. If that does not help, all begins again with twice as many tokens: a server can be
    busy with a long prompt for seconds while the GPU decodes already. Returns also how many were
    asked for.

    Raises:
        TooFew: that is so with :data:`MOST_TOKENS`.
    """
    while True:
        try:
            return _tpot(servers, prompts, tokens, pairs, least), tokens
        except TooFew:
            if tokens >= MOST_TOKENS:
                raise
            tokens = min(2 * tokens, MOST_TOKENS)


def _tpot(
    servers: Sequence[Server], prompts: Sequence[Sequence[int]], tokens: int, pairs: int, least: int
) -> dict[str, list[float]]:
    ahead = lead(max(map(len, prompts)))
    found: dict[str, list[float]] = {server.name: [] for server in servers}

    def one(server: Server) -> float:
        for left in reversed(range(TRIES)):
            answers = together([(server.client, p) for p in prompts], tokens)
            try:
                return round(time_per_token(answers, ahead, least), 4)
            except TooFew:
                if not left:
                    raise
        raise AssertionError

    for pair in range(pairs):
        for server in servers if pair % 2 == 0 else list(servers)[::-1]:
            found[server.name].append(one(server))
    return found


def ttft(servers: Sequence[Server], context: int, pairs: int) -> dict[str, list[float]]:
    """Seconds to the first token of a prompt that no cache holds, for each server in turn."""
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    for pair in range(pairs):
        prompt = random_prompt(context, 5 * context + pair)
        for server in servers if pair % 2 == 0 else list(servers)[::-1]:
            salt = f"ttft {pair}"
            found[server.name].append(round(server.client.complete(prompt, 1, salt).ttft, 4))
    return found


class Traces:
    """Child processes that reduce traces while the run goes on."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._running: list[tuple[str, str, Path, subprocess.Popen[bytes]]] = []

    def add(self, server: str, case: str, trace: Path) -> None:
        """Begin to reduce one trace."""
        out = trace.parent / f"{case}.reduced.json"
        command = [
            sys.executable, "-m", "benchmarks.server.trace", str(trace),
            "--layers", str(self.model.indexers), "--writers", str(self.model.writers),
            "--json", str(out),
        ]  # fmt: skip
        self._running.append((case, server, out, subprocess.Popen(command)))

    def results(self) -> dict[str, dict[str, Any]]:
        """Wait for all of them; returns case → server → what :func:`.trace.reduce` returns."""
        found: dict[str, dict[str, Any]] = {}
        for case, server, out, process in self._running:
            process.wait()
            try:
                result = json.loads(out.read_text())
            except OSError:
                result = {"error": f"the reduction ended with {process.returncode}"}
            found.setdefault(case, {})[server] = result
        return found


def profile(
    server: Server, prompts: Sequence[Sequence[int]], tokens: int, case: str, traces: Traces
) -> str | None:
    """Profile decoding of all prompts at once; return an error, or None.

    Each prompt gets ``tokens``. Several prompts do not begin together, so the profile then lasts
    :data:`CROWD_S` from the first token of the last one, and the first must still decode.
    """
    before = {p.name for p in server.traces.iterdir()}
    if len(prompts) == 1:
        _begin_profile(server)
        try:
            server.client.complete(prompts[0], tokens)
        finally:
            server.client.read("/stop_profile", {})
    else:
        _profile_crowd(server, prompts, tokens)
    for _ in range(40):
        new = [
            p for p in server.traces.glob("*.json*")
            if p.name not in before and ".reduced" not in p.name
        ]  # fmt: skip
        if new:
            biggest = max(new, key=lambda p: p.stat().st_size)
            time.sleep(0.2)
            kept = server.traces / f"{case}{''.join(biggest.suffixes[-2:])}"
            biggest.rename(kept)
            traces.add(server.name, case, kept)
            return None
        time.sleep(0.25)
    return f"{server.name}: no trace was written"


def _begin_profile(server: Server) -> None:
    server.client.read("/start_profile", server.engine.profile(server.traces))


def _profile_crowd(server: Server, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [
            pool.submit(server.client.complete, p, tokens, began=begun.release) for p in prompts
        ]
        if all(begun.acquire(timeout=60) for _ in prompts):
            _begin_profile(server)
            time.sleep(CROWD_S)
            server.client.read("/stop_profile", {})
        for answer in answers:
            answer.result()


def paired(base: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return the ratio other/base of paired measurements, and its 95 % interval.

    As :func:`dsv4_plugin.cli.ab.intervals.ratio`; the interval of a single pair is ``None``.
    """
    pairs = min(len(base), len(other))
    if pairs == 1:
        return {"pairs": 1, "ratio": round(other[0] / base[0], 5), "interval95": None}
    found = ratio(base[:pairs], other[:pairs])
    return {
        "pairs": pairs,
        "ratio": round(found.value, 5),
        "interval95": [round(found.low, 5), round(found.high, 5)],
    }
