"""Failure drills on live servers: ``python -m benchmarks.server.drills``.

Every drill is a server of its own, in which one thing is broken or which runs in one mode. It
passes if the server starts and still runs at the end, if it answers every request in full and in
time, if one clear line of the plugin says what happened, and if the counters show that the expected
side served. Where the engine's code has to serve and gives the same answers twice, the answers must
also equal those without the plugin. Requests of many lengths come at the same time, so that prefill
and decode alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dsv4_plugin
from benchmarks.server import model, sglang_drills, vllm_drills
from benchmarks.server.client import at_once, random_prompt
from benchmarks.server.drill import BASE, LIBRARY, Drill
from benchmarks.server.measure import agreement
from benchmarks.server.options import about, add_common, checked, engine, make_server, place
from benchmarks.server.server import Server, stop
from benchmarks.tool import tool
from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, held, interruptible
from dsv4_plugin.cli.shared.secrets import Secrets

__all__ = ["BASE", "DRILLS", "Drill", "main", "parser", "run"]

CROWD = (40, 300, 600, 2500, 3000, 5000, 9000, 12000)  # tokens of the prompts sent at once
ALONE = (1000, 3000, 9000)  # tokens of the prompts sent alone, whose answers are compared
TOKENS = 32
STATUS_S = 2.0  # until the status file has the last calls
DRILLS: Mapping[str, tuple[Drill, ...]] = {
    "vllm": vllm_drills.DRILLS,
    "sglang": sglang_drills.DRILLS,
}


@dataclass
class Result:
    """The result of a drill. ``wrong``: in words, why it did not pass."""

    drill: Drill
    server: Server
    wrong: list[str] = field(default_factory=list)
    alone: list[list[list[int]]] = field(default_factory=list)
    answered: int = 0
    sent: int = 0
    lines: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    shadow: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Record something that went wrong."""
        self.wrong.append(text)


def _answers(result: Result, salt: str, timeout: float) -> None:
    """Send many requests at the same time, and then a few one after the other."""
    client = result.server.client

    def one(prompt: list[int], label: str, ids: bool = False) -> list[int] | None:
        result.sent += 1
        try:
            answer = client.complete(prompt, TOKENS, f"{label} {salt}", ids, timeout)
        except Exception as error:  # lost, incomplete, refused, or without an answer in time
            result.note(f"a request of {len(prompt)} tokens: {type(error).__name__}: {error}"[:300])
            return None
        result.answered += 1
        return answer.tokens

    at_once(lambda p: one(p, "crowd"), [random_prompt(n, 500 + n) for n in CROWD])
    alone = [one(random_prompt(n, 900 + n), "alone", ids=True) for n in ALONE]
    result.alone.append([tokens or [] for tokens in alone])


def _look(result: Result) -> None:
    """Check the log and the counters."""
    drill, server = result.drill, result.server
    said = server.engine.said
    result.lines = sorted(
        {m[1] for line in server.lines(said, 999, 4000) if (m := said.search(line))}
    )
    clear = [line for line in result.lines if re.search(drill.says, line)]
    kinds = {line.partition(":")[0] for line in clear}
    if len(clear) != max(len(kinds), 1):
        result.note(f"{len(clear)} lines of the log say {drill.says!r}, not one a kind of layer")
    for status in server.workers().processes:
        for name, count in status.get("counters", {}).items():
            result.counters[name] = result.counters.get(name, 0) + count
        result.shadow.update(status.get("shadow") or {})
    silent = [name for name in drill.counts if not any(map(result.counters.get, name.split("|")))]
    if silent:
        result.note(f"no call was counted as {', '.join(silent)}")
    if served := [name for name in drill.never if result.counters.get(name)]:
        result.note(f"calls were counted as {', '.join(served)}")
    for kind in drill.shadow:
        seen = result.shadow.get(kind, {})
        if not seen.get("rows") or seen.get("higher"):
            result.note(f"the shadow of {kind} saw {seen}")


def _run(result: Result, ready: float, timeout: float) -> None:
    """Wait for one server and do its drill."""
    try:
        result.server.wait(ready)
        _answers(result, "1", timeout)
        if result.drill.act is not None:
            result.drill.act(result.server)
        _answers(result, "2", timeout)
        if not result.server.healthy():
            result.note("/health is not 200 at the end")
        time.sleep(STATUS_S)
    except (AbError, OSError, RuntimeError) as error:
        result.note(f"{type(error).__name__}: {error}"[:2000])
    with contextlib.suppress(OSError):
        _look(result)


def _compare(result: Result, base: Result) -> dict[str, Any]:
    """Compare answers with those of the base, where the base gives the same answer twice.

    With random weights it may not, because its kernels add up in another order from call to call.
    """
    repeats, own = (
        [a == b for a, b in zip(*of.alone, strict=True)] if len(of.alone) == 2 else []
        for of in (base, result)
    )
    last = [a.alone[-1] if a.alone else [] for a in (base, result)]
    found = [agreement(a, b) if a and b else None for a, b in zip(*last, strict=False)]
    if result.drill.upstream:
        _all_same(result, repeats, found, "the answers are not the engine's")
    if result.drill.act is not None and result.drill.same and len(result.alone) == 2:
        rounds = [agreement(a, b) if a and b else None for a, b in zip(*result.alone, strict=True)]
        _all_same(result, repeats, rounds, "the answers of the two rounds differ")
    return {"upstream_repeats_itself": repeats, "repeats_itself": own, "answers": found}


def _all_same(result: Result, where: list[bool], found: list[Any], wrong: str) -> None:
    differ = [
        length
        for length, counts, a in zip(ALONE, where, found, strict=False)
        if counts and a is not None and not a["identical"]
    ]
    if differ:
        result.note(f"{wrong}: prompts of {', '.join(map(str, differ))} tokens")


def _without_library(server: Server) -> None:
    """Put a copy of the package without its compiled library before the real one."""
    shutil.copytree(
        Path(dsv4_plugin.__file__).parent,
        server.folder / "path" / "dsv4_plugin",
        ignore=shutil.ignore_patterns(LIBRARY, "__pycache__"),
    )


def parser(
    prog: str = "benchmarks.server.drills",
    about: str = __doc__,
    tables: Mapping[str, Sequence[Drill]] = DRILLS,
) -> Parser:
    """Return the command line of the tables of drills of some engines."""
    p = Parser(prog=f"python -m {prog}", description=about.splitlines()[0])
    p.set_defaults(tables=tables, module=prog)
    add_common(p, port=8200, ready=300, kv_gib=2, max_model_len=32 << 10, engines=tables)
    add = p.add_argument
    names = list(dict.fromkeys(drill.name for table in tables.values() for drill in table))
    add("--only", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"only these of {', '.join(names)} (default: all that fit engine and model), and the "
        "servers with which they are compared")  # fmt: skip
    about = "the most servers at a time (default: all)"
    add("--at-once", type=numbers.COUNT, default=len(names), help=about)
    about = "the most seconds for one request (default: 120)"
    add("--timeout", type=numbers.SECONDS, default=120, help=about)
    return p


def drill(
    a: argparse.Namespace, folder: Path, found: list[dict[str, Any]], saved: Callable[[], None],
    secrets: Secrets,
) -> None:  # fmt: skip
    """Do the drills; add each result to ``found`` as it comes, and call ``saved``.

    A result that comes before the one of its base waits for it, because it is compared with it.
    """
    served = model.read(a.model)
    console = Console(secrets)
    results: list[Result] = []
    for i, each in enumerate(_wanted(a)):
        server = make_server(
            a, folder, i, each.name, each.environment,
            [*engine(a).wish, *a.serve, *each.arguments],
            served=served, requests=16, share=0.05, console=console,
        )  # fmt: skip
        results.append(Result(each, server))
    names = [result.drill.name for result in results]
    ended: dict[str, Result] = {}
    waiting: list[Result] = []
    for i in range(0, len(results), a.at_once):
        for result in _together(a, results[i : i + a.at_once]):
            ended[result.drill.name] = result
            waiting.append(result)
            for told in [r for r in waiting if r.drill.base in ended]:
                waiting.remove(told)
                found.append(_told(told, _compare(told, ended[told.drill.base])))
                print(f"{told.drill.name}: {'; '.join(told.wrong) or 'passed'}", flush=True)
            found.sort(key=lambda fields: names.index(fields["name"]))
            saved()


def _wanted(a: argparse.Namespace) -> list[Drill]:
    kind = model.read(a.model).kind
    fit = [each for each in a.tables[a.engine] if not each.kinds or kind in each.kinds]
    named = [each for each in fit if each.name in a.only]
    bases = {each.base for each in named} or {BASE}
    return [each for each in fit if each in named or each.name in bases]


def _together(a: argparse.Namespace, some: list[Result]) -> Iterator[Result]:
    """Do some drills at the same time, and give each as it ends; stop all servers in any case."""
    pool = ThreadPoolExecutor(len(some))
    try:
        for result in some:
            if not result.drill.library:
                _without_library(result.server)
            result.server.begin()
        running = {pool.submit(_run, each, a.ready, a.timeout): each for each in some}
        for ended in as_completed(running):
            ended.result()
            yield running[ended]
    finally:
        with held():  # the servers first: the threads that wait for their answers end then
            for said in stop([result.server for result in some]):
                print(said, flush=True)
            pool.shutdown(cancel_futures=True)


def _told(result: Result, compared: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a drill in the results file."""
    return {
        "name": result.drill.name,
        "what": result.drill.what,
        "base": result.drill.base,
        "passed": not result.wrong,
        "wrong": result.wrong,
        "requests": {"sent": result.sent, "answered": result.answered},
        "environment": result.drill.environment,
        "arguments": list(result.drill.arguments),
        "ready_s": result.server.ready_s,
        "said": [line[:600] for line in result.lines],
        "counters": result.counters,
        "shadow": result.shadow,
        "compared": compared,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every drill passed."""
    return tool(parser(), run, argv)


def run(a: argparse.Namespace) -> int:
    """Do what a command line of drills asks for."""
    began = time.monotonic()
    secrets = checked(a, len(_wanted(a)))
    results: dict[str, Any] = {
        "command": ["python", "-m", a.module, *a.argv],
        "complete": False,
        "drills": [],
    }
    results["command"] = secrets.command(results["command"])

    def save() -> None:
        results["seconds"] = round(time.monotonic() - began, 1)
        outputs.write(a.json, outputs.text_of(secrets.data(results)))

    save()
    with interruptible() as work, place(a) as folder:
        results["model"] = model.read(a.model).about
        results |= about(a)
        drill(a, folder, results["drills"], save, secrets)
    passed = bool(results["drills"]) and all(d["passed"] for d in results["drills"])
    results["complete"] = work.whole and passed
    save()
    work.end(f"the results so far were written to {a.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
