"""The order of the steps: start, warm up, check whether the plugin is at work, measure, stop.

``restart`` starts the server anew for each half of a pair (A B A B …), so the interval includes
what differs between two starts. ``together`` and ``running`` alternate between two servers that
both run. Their interval includes only the runs on these two servers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.ab import Refused
from dsv4_plugin.cli.ab.clients import Client
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engagement import judge
from dsv4_plugin.cli.ab.engines import Workload
from dsv4_plugin.cli.ab.metrics import Result
from dsv4_plugin.cli.ab.servers import Server, version
from dsv4_plugin.cli.shared import outputs

__all__ = ["Design", "Experiment"]

SETTLED_BY = ("TTFT mean", "TPOT mean")
# A server gets every prompt only once, because the prefix cache would answer it the second time. So
# each workload has its own seeds, and the warm-up has seeds that no run has.
SEEDS_OF_A_WORKLOAD = 10_000
WARM_UP_SEEDS = 5_000


@dataclass(frozen=True)
class Design:
    """How much runs, and in which order."""

    mode: str  # restart, together, running
    workloads: tuple[Workload, ...]
    pairs: int = 3
    runs: int = 1  # client runs for each workload and half of a pair
    order: str = "abab"
    seed: int = 0
    warmup_rounds: int = 8
    warmup_prompts: int | None = None
    tolerance: float = 0.1
    start_timeout: float = 1800.0
    workers: int = 1
    trust: bool = False

    def sides(self, pair: int) -> str:
        """Return the sides of a pair (from 1) in their order."""
        return "BA" if self.order == "abba" and pair % 2 == 0 else "AB"

    def run_seed(self, workload: int, pair: int, run: int) -> int:
        """Return the seed of a measured run, the same for both sides."""
        return self.seed + workload * SEEDS_OF_A_WORKLOAD + (pair - 1) * self.runs + run - 1

    def warmup_seed(self, workload: int, number: int) -> int:
        """Return the seed of a warm-up round."""
        return self.seed + workload * SEEDS_OF_A_WORKLOAD + WARM_UP_SEEDS + number

    def warmup_load(self, load: Workload) -> Workload:
        """Return the workload of the warm-up: the same shapes, fewer prompts."""
        prompts = self.warmup_prompts or min(load.prompts, max(4, 2 * load.concurrency))
        return Workload(load.input_len, load.output_len, prompts, load.concurrency)


class Experiment:
    """Runs a design and keeps ``document`` and its file up to date.

    ``make(side, folder)`` returns a server that is not started yet. ``expect`` says for each side
    whether the plugin is meant to be ``on`` or ``off``.
    """

    def __init__(
        self, design: Design, make: Callable[[str, Path], Server], client: Client,
        expect: dict[str, str], document: dict[str, Any], folder: Path, console: Console,
    ) -> None:  # fmt: skip
        self._design = design
        self._make = make
        self._client = client
        self._expect = expect
        self._folder = folder
        self._console = console
        self._results: dict[tuple[str, int, int, int], Result] = {}
        self.document = document
        document |= {
            "design": {**asdict(design), "workloads": [str(w) for w in design.workloads]},
            "servers": [],
            "warmups": [],
            "runs": [],
            "warnings": [],
        }

    def run(self) -> None:
        """Run everything.

        Raises:
            AbError: a step failed, or the result must not be reported.
        """
        design = self._design
        if design.mode == "restart":
            for pair in range(1, design.pairs + 1):
                for side in design.sides(pair):
                    with self._up(side, f"{side.lower()}{pair}") as server:
                        self._prepare(side, server, f"{side.lower()}{pair}")
                        for number in range(1, len(design.workloads) + 1):
                            self._measure(side, server, number, pair)
                        self._judge(side, server)
            return
        with self._up("A", "a") as a, self._up("B", "b") as b:
            servers = {"A": a, "B": b}
            for side, server in servers.items():
                self._prepare(side, server, side.lower())
            for number in range(1, len(design.workloads) + 1):
                for pair in range(1, design.pairs + 1):
                    for side in design.sides(pair):
                        self._measure(side, servers[side], number, pair)
            for side, server in servers.items():
                self._judge(side, server)

    @contextlib.contextmanager
    def _up(self, side: str, name: str) -> Iterator[Server]:
        server = self._make(side, self._folder / name)
        given = self._design.mode == "running"
        try:
            if not given:
                self._console.say(f"{name}: starting, log in {server.log}")
            seconds = server.start(self._design.start_timeout)
            entry = {
                "side": side, "name": name, "url": server.url, "version": version(server.url),
                "start_s": None if given else round(seconds, 1),
            }  # fmt: skip
            self.document["servers"].append(entry)
            self._console.say(f"{name}: healthy after {seconds:.1f} s at {server.url}")
            yield server
        finally:
            if server.process is not None:
                self._console.say(f"{name}: stopping")
            server.stop()

    def _stem(self, side: str, pair: int, name: str) -> Path:
        folder = f"{side.lower()}{pair}" if self._design.mode == "restart" else side.lower()
        if self._design.mode != "restart":
            name = name.replace("run", f"pair{pair}-run")
        return self._folder / folder / name

    def _prepare(self, side: str, server: Server, name: str) -> None:
        if self._expect[side] == "off":  # evidence against "off" exists before the warm-up
            self._judge(side, server)
        for number, load in enumerate(self._design.workloads, 1):
            self._warm_up(side, server, number, load, self._folder / name)
        self._judge(side, server)

    def _judge(self, side: str, server: Server) -> None:
        evidence, warnings = judge(
            server, self._expect[side], workers=self._design.workers, trust=self._design.trust
        )
        self.document["sides"][side]["engagement"] = evidence.as_data()
        for warning in warnings:
            self._warn(warning)
        self.save()
        self._console.say(f"{server.name}: plugin: {evidence.summary()}")

    def _warn(self, text: str) -> None:
        if text not in self.document["warnings"]:
            self.document["warnings"].append(text)

    def _warm_up(
        self, side: str, server: Server, number: int, load: Workload, folder: Path
    ) -> None:
        """Repeat a short run until two in a row agree: nothing is compiled any more."""
        load = self._design.warmup_load(load)
        rounds: list[dict[str, float]] = []
        settled = False
        for i in range(1, self._design.warmup_rounds + 1):
            stem = folder / f"w{number}-warm{i}"
            seed = self._design.warmup_seed(number, i)
            metrics = self._client.run(server, load, seed, stem).metrics
            now = {name: metrics[name] for name in SETTLED_BY if name in metrics}
            before = rounds[-1] if rounds else {}
            rounds.append(now)
            shown = ", ".join(f"{name} {value:.2f} ms" for name, value in now.items())
            self._console.say(f"{server.name}: warm-up {i} of {load}: {shown}")
            settled = bool(before) and all(
                abs(now[name] - before.get(name, 0.0)) <= self._design.tolerance * before[name]
                for name in now.keys() & before.keys()
            )
            if settled:
                break
        self.document["warmups"].append(
            {"side": side, "server": folder.name, "workload": str(load), "rounds": rounds,
             "settled": settled}
        )  # fmt: skip
        if not settled:
            self._warn(
                f"{folder.name}: no two warm-up rounds of {load} in a row agreed within "
                f"{self._design.tolerance:.0%} ({len(rounds)} rounds)"
            )
        self.save()

    def _measure(self, side: str, server: Server, number: int, pair: int) -> None:
        load = self._design.workloads[number - 1]
        for run in range(1, self._design.runs + 1):
            seed = self._design.run_seed(number, pair, run)
            stem = self._stem(side, pair, f"w{number}-run{run}")
            result = self._client.run(server, load, seed, stem)
            self._results[side, number, pair, run] = result
            self.document["runs"].append({
                "side": side, "workload": str(load), "pair": pair, "run": run, "seed": seed,
                "completed": result.completed, "input_tokens": result.input_tokens,
                "output_tokens": result.output_tokens, "metrics": result.metrics,
                "result": str(stem.with_suffix(".json").relative_to(self._folder)),
            })  # fmt: skip
            shown = ", ".join(
                f"{name} {result.metrics[name]:.2f}"
                for name in (*SETTLED_BY, "output throughput")
                if name in result.metrics
            )
            self._console.say(f"{server.name}: pair {pair}, {load}, seed {seed}: {shown}")
            self.save()
            self._same_work(number, pair, run)

    def _same_work(self, number: int, pair: int, run: int) -> None:
        """Compare the work of both sides, once both have run: prompts and generated tokens."""
        a = self._results.get(("A", number, pair, run))
        b = self._results.get(("B", number, pair, run))
        if a is None or b is None:
            return
        where = f"{self._design.workloads[number - 1]}, pair {pair}, run {run}"
        if a.input_tokens != b.input_tokens:
            raise Refused(
                f"the two sides were not given the same prompts ({where}: {a.input_tokens} and "
                f"{b.input_tokens} tokens)"
            )
        if a.output_tokens != b.output_tokens:
            self._warn(
                f"the two sides did not generate equally much ({where}: {a.output_tokens} and "
                f"{b.output_tokens} tokens): throughput compares different work"
            )
        if a.texts is not None and b.texts is not None and len(a.texts) == len(b.texts):
            self.document["runs"][-1]["same_texts"] = sum(
                x == y for x, y in zip(a.texts, b.texts, strict=True)
            )

    def save(self) -> None:
        """Write the document."""
        told = self._console.secrets.data(self.document)
        outputs.write(self._folder / "ab.json", outputs.text_of(told))
