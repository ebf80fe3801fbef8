"""``python -m benchmarks.server``: servers side by side, the steps in turn, one results file.

All servers run at the same time on the same GPUs, each with its own weights and cache. The command
sends requests to one server at a time, so that the GPUs work for that server only. This takes half
the time of starting the servers one after the other. Every figure comes from pairs, so A and B have
the same clocks.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.server import measure, model
from benchmarks.server.options import about, add_common, checked, make_server, place
from benchmarks.server.server import stop
from benchmarks.tool import tool
from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engines import split
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError, held, interruptible

__all__ = ["bases", "main", "parse_server", "summarise"]

RESERVE_S = 12  # to stop the servers, reduce the traces and write the file
LONG = 512 << 10
COMPUTABLE = 256 << 10  # the most tokens to compute if copying was asked for and failed


def parse_server(text: str) -> tuple[str, dict[str, str]]:
    """Return ``NAME:VARIABLE=VALUE,…`` as name and environment."""
    name, _, rest = text.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    if not name or any(not key or not equals for key, equals, _ in pairs):
        raise UsageError("must be NAME or NAME:VARIABLE=VALUE,…")  # not quoted: it may be a secret
    return name, {key: value for key, _, value in pairs}


def _arguments(text: str) -> tuple[str, list[str]]:
    name, equals, rest = text.partition("=")
    if not name or not equals:
        raise UsageError("must be NAME=ARGUMENTS")
    return name, split(rest, "--arguments")


def _crowd(text: str) -> tuple[int, int]:
    context, _, count = text.partition(":")
    return numbers.LENGTH(context), numbers.COUNT(count)


def parser() -> Parser:
    """Return the command line."""
    p = Parser(prog="python -m benchmarks.server", description=__doc__.splitlines()[0])
    add_common(p, port=8100, ready=600, kv_gib=10.2, max_model_len=1 << 20)
    add = p.add_argument
    add(
        "--server", type=parse_server, action="append", metavar="NAME[:VAR=VALUE,…]",
        help="a server and its environment; the others are compared with the first "
        "(default: off:DSV4_PLUGIN=0 and on:DSV4_PLUGIN=1)",
    )  # fmt: skip
    add(
        "--arguments", type=_arguments, action="append", default=[], metavar="NAME=ARGUMENTS",
        help="further arguments for this server; it is compared with the first "
        "server that has the same arguments",
    )  # fmt: skip
    add("--contexts", type=numbers.LENGTH, nargs="*", default=[8 << 10, 64 << 10, 128 << 10],
        help="time per token at batch 1 with this many tokens of context")  # fmt: skip
    add("--concurrent", type=_crowd, nargs="*", default=[], metavar="CONTEXT:REQUESTS",
        help="time per token with several requests, each with its own context")  # fmt: skip
    add("--ttft", type=numbers.LENGTH, nargs="*", default=[], help="time to the first token")
    add("--profile", type=numbers.LENGTH, nargs="*", default=[],
        help="kernel times at these contexts, for every number of requests")  # fmt: skip
    add("--outputs", type=numbers.LENGTH, nargs="*", default=[], metavar="TOKENS",
        help="compare greedy answers to prompts of these lengths")  # fmt: skip
    add("--pairs", type=numbers.COUNT, default=5, help="measurements of each server (default: 5)")
    add(
        "--tokens",
        type=numbers.whole(2, 1 << 20),
        default=96,
        help="timed tokens of a measurement (96)",
    )
    add("--copy-contexts", action="store_true",
        help="make long contexts by copying cache pages instead of by prefill")  # fmt: skip
    add("--checkpoint", action="store_true",
        help="the model folder has weights: load them (default: random ones)")  # fmt: skip
    add("--max-num-seqs", type=numbers.COUNT, default=16)
    add("--budget", type=numbers.SECONDS, default=3600,
        help="end after this many seconds: begin no step that would take longer, and break off a "
        "step that does")  # fmt: skip
    return p


class Run:
    """One run: the servers, the clock and the results file."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.a = arguments
        self.began = time.monotonic()
        wished = arguments.server or [
            ("off", {"DSV4_PLUGIN": "0"}),
            ("on", {"DSV4_PLUGIN": "1"}),
        ]
        self.secrets = checked(arguments, len(wished))
        steps = (arguments.contexts, arguments.concurrent, arguments.ttft, arguments.outputs)
        if not any(steps):
            raise UsageError("nothing is to be measured: no --contexts, --concurrent, --ttft, "
                             "--outputs")  # fmt: skip
        self.results: dict[str, Any] = {
            "complete": False,
            "command": self.secrets.command(["python", "-m", "benchmarks.server", *arguments.argv]),
            "tpot_ms": [],
            "ttft_s": [],
            "profiles": [],
            "skipped": [],
        }
        served = model.read(arguments.model)
        self.results["model"] = served.about
        given = dict(arguments.arguments)
        if unknown := sorted(set(given) - {name for name, _ in wished}):
            raise UsageError(f"--arguments {unknown[0]}: no --server has this name")
        self.bases = bases([(name, given.get(name, [])) for name, _ in wished])
        self.console = Console(self.secrets)
        self.servers = [
            make_server(
                arguments, folder, i, name, environment, [*arguments.serve, *given.get(name, [])],
                served=served, requests=arguments.max_num_seqs, share=0.85 / len(wished),
                console=self.console, weights=not arguments.checkpoint,
            )
            for i, (name, environment) in enumerate(wished)
        ]  # fmt: skip
        self.traces = measure.Traces(served)
        self.copies = True
        self.over = threading.Event()

    def say(self, text: str) -> None:
        """Show progress."""
        self.console.say(text)
        if self.console.signals:  # the reader of the pipe has ended
            raise BrokenPipeError

    def left(self) -> float:
        """Seconds of the budget."""
        return self.a.budget - RESERVE_S - (time.monotonic() - self.began)

    def save(self) -> None:
        """Write the results."""
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        outputs.write(self.a.json, outputs.text_of(self.secrets.data(self.results)))

    def step(self, name: str, work: Callable[[], None], needs: float = 5) -> None:
        """Do one step if there is time; record an error, and end the run if a server has ended."""
        if self.left() < needs:
            self.results["skipped"].append(f"{name}: {self.left():.0f} s were left")
            self.say(f"{name}: skipped")
            return
        before = time.monotonic()
        try:
            work()
            self.say(f"{name}: {time.monotonic() - before:.1f} s")
        except BrokenPipeError:  # of this command's own output
            raise
        except Exception as error:
            self.results["skipped"].append(f"{name}: {type(error).__name__}: {error}"[:1500])
            self.say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            if self.over.is_set():
                raise AbError(f"{name} was broken off: the budget was spent") from error
            for server in self.servers:
                server.check()
        self.save()

    def _break_off(self) -> None:
        """End the servers if a step takes too long, so that its requests end with an error."""
        self.over.set()
        stop(self.servers)

    def run(self) -> None:
        """Start, measure, stop; write what was measured, however the run ends."""
        self.save()
        left = self.a.budget - RESERVE_S / 2 - (time.monotonic() - self.began)
        end = threading.Timer(max(left, 0), self._break_off)
        end.daemon = True
        end.start()
        try:
            for server in self.servers:
                server.begin()
            self.results |= about(self.a)
            self.save()
            for server in self.servers:
                server.wait(min(self.a.ready, self.a.budget - RESERVE_S))
                self.say(f"{server.name} serves after {server.ready_s} s")
            self.measure()
            self.results["complete"] = not self.results["skipped"]
        except AbError as error:
            said = self.secrets.text(str(error))
            self.results["error"] = said[:4000]
            self.say(said[:3000])
        finally:
            with held():
                end.cancel()
                if self.over.is_set():
                    end.join()
                self._stop()

    def _stop(self) -> None:
        self.results["servers"] = {s.name: s.about() for s in self.servers}
        for server in self.servers:
            found = server.workers()
            if found.failures or len(found.engaged) not in (0, self.a.gpus):
                where = f"at work in {len(found.engaged)} of {self.a.gpus} processes"
                said = "; ".join([*found.failures, where])
                self.results["skipped"].append(f"{server.name}: {said}")
        self.results["skipped"] += stop(self.servers)
        for case, by_server in self.traces.results().items():
            context, count = map(int, case.split("x"))
            self.results["profiles"].append(
                {"context": context, "concurrency": count, "servers": by_server}
            )
            for name, found in by_server.items():
                if "error" in found:
                    self.results["skipped"].append(f"profile {case} of {name}: {found['error']}")
        self.results["complete"] &= not self.results["skipped"]
        self.results["summary"] = summarise(self.results, self.bases)
        self.save()

    def measure(self) -> None:
        """Run the steps, the most important first."""
        a, servers, results = self.a, self.servers, self.results
        until = time.monotonic() + self.left() / 3

        def warm() -> None:
            results["warm_up_s"] = measure.warm(servers, a.max_num_seqs, until)

        def outputs() -> None:
            results["outputs"] = measure.outputs(servers, a.outputs, 64, bases=self.bases)

        self.step("warm-up", warm)
        if a.outputs:
            self.step("outputs", outputs, 15)
        for context in a.contexts:
            work = functools.partial(self._context, context, 1)
            self.step(f"context {context}", work, 15 + context / 80_000)
        for context, count in a.concurrent:
            work = functools.partial(self._context, context, count)
            self.step(f"context {context} x {count}", work, 20 + context * count / 20_000)
        for context in a.ttft:
            needs = 10 + len(servers) * min(a.pairs, 3) * context / 12_000
            self.step(f"TTFT {context}", functools.partial(self._ttft, context), needs)

    def _context(self, context: int, count: int) -> None:
        a = self.a
        long = context > 2 * measure.CHUNK
        if a.copy_contexts and not self.copies and context * count > COMPUTABLE:
            raise RuntimeError("copying contexts failed before; too long to be computed")
        # Contexts that do not fit are computed again in every turn, and never decode together.
        needed = count * (context + measure.TAIL + a.tokens)
        for server in self.servers:
            held = server.cache_tokens()
            if held is not None and needed > held:
                raise RuntimeError(
                    f"{needed:,} tokens of cache are needed, {server.name} has {held:,} (--kv-gib)"
                )
        before = time.monotonic()
        prompts, how = measure.contexts(
            self.servers, context, count, a.copy_contexts and self.copies
        )
        self.copies = self.copies and (how == "copied" or not long)
        made = time.monotonic() - before
        # A long prompt costs seconds a request before its first token, cached or not.
        pairs = a.pairs if count == 1 and context < LONG else min(a.pairs, 3)
        apart = measure.unseen(self.servers, prompts, 16)
        tokens = measure.tokens_to_ask(a.tokens, apart, context)
        least = max(a.tokens // 2, 2)
        figures, tokens = measure.tpot(self.servers, prompts, tokens, pairs, least)
        self.results["tpot_ms"].append(
            {
                "context": context + measure.TAIL,
                "concurrency": count,
                "context_made": how,
                "context_s": round(made, 2),
                "apart_s": round(apart, 3),
                "tokens": tokens,
                "servers": figures,
            }
        )
        shown = ", ".join(f"{n} {statistics.median(v):.3f}" for n, v in figures.items())
        self.say(f"{context} x {count} ({how} in {made:.1f} s): {shown} ms a token")
        self.save()
        if context in a.profile:
            least = max(measure.CROWD_TOKENS, tokens)  # as they begin as far apart as when timed
            most = measure.ALONE_TOKENS if count == 1 else least
            for server in self.servers:
                case = f"{context + measure.TAIL}x{count}"
                if wrong := measure.profile(server, prompts, most, case, self.traces):
                    raise RuntimeError(wrong)

    def _ttft(self, context: int) -> None:
        figures = measure.ttft(self.servers, context, min(self.a.pairs, 3))
        self.results["ttft_s"].append({"context": context, "servers": figures})
        shown = ", ".join(f"{n} {statistics.median(v):.3f}" for n, v in figures.items())
        self.say(f"TTFT {context}: {shown} s")


def bases(servers: Sequence[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Return the base of each server: the first server with the same arguments."""
    first: dict[tuple[str, ...], str] = {}
    found = {}
    for name, arguments in servers:
        base = first.setdefault(tuple(arguments), name)
        if base != name:
            found[name] = base
    return found


def summarise(results: dict[str, Any], bases: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return each figure of each server beside the figure of its base, with the ratio."""
    rows = []
    for kind in ("tpot_ms", "ttft_s"):
        for entry in results[kind]:
            measured = entry["servers"]
            for name, base in bases.items():
                if name not in measured or base not in measured:  # a step with some of the servers
                    continue
                a, b = measured[base], measured[name]
                rows.append(
                    {
                        "figure": kind,
                        "context": entry["context"],
                        "concurrency": entry.get("concurrency", 1),
                        base: round(statistics.median(a), 4),
                        name: round(statistics.median(b), 4),
                        **measure.paired(a, b),
                    }
                )
    for entry in results["profiles"]:
        for name, base in bases.items():
            a, b = entry["servers"].get(base, {}), entry["servers"].get(name, {})
            if "chain_us_layer" in a and "chain_us_layer" in b:
                rows.append(
                    {
                        "figure": "chain_us_layer",
                        "context": entry["context"],
                        "concurrency": entry["concurrency"],
                        base: a["chain_us_layer"],
                        name: b["chain_us_layer"],
                        "ratio": round(b["chain_us_layer"] / a["chain_us_layer"], 4),
                    }
                )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every step was done."""
    return tool(parser(), _main, argv)


def _main(arguments: argparse.Namespace) -> int:
    with place(arguments) as folder:
        run = Run(arguments, folder)
        with interruptible() as work:
            run.run()
        for row in run.results.get("summary", []):
            print(json.dumps(row))
    work.end(f"the results so far were written to {arguments.json}")
    return 0 if run.results["complete"] else 1
