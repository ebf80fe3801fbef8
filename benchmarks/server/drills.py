"""Failure drills on live servers: ``python -m benchmarks.server.drills``.

Every drill is a server of its own in which one thing is broken. It passes if the server starts and
still runs at the end, if it answers every request in full and in time, if one clear line of the
plugin says what happened, and if the counters show that the expected side served. Where vLLM's code
has to serve and gives the same answers twice, the answers must also equal vLLM's. Requests of many
lengths come at the same time, so that one step contains prefill chunks and decode.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dsv4_plugin
from benchmarks.server import model
from benchmarks.server.client import at_once, random_prompt
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

BASE = "off"
CROWD = (40, 300, 600, 2500, 3000, 5000, 9000, 12000)  # tokens of the prompts sent at once
ALONE = (1000, 3000, 9000)  # tokens of the prompts sent alone, whose answers are compared
TOKENS = 32
STATUS_S = 2.0  # until the status file has the last calls
PLUGIN = re.compile(r"\[dsv4[^]]*\] (.*)")
LIBRARY = "_C.so"


def _sleep(server: Server, level: int) -> None:
    """Put the engine to sleep and wake it up. Level 2 does not restore the weights."""
    server.client.read(f"/sleep?level={level}", {})
    if not json.loads(server.client.read("/is_sleeping"))["is_sleeping"]:
        raise RuntimeError("it does not sleep after /sleep")
    server.client.read("/wake_up", {})


@dataclass(frozen=True)
class Drill:
    """One server with one fault.

    Attributes:
        name: the name of the drill and of its server.
        what: what is broken.
        says: the line that must be in the log, once for each kind of layer in each process.
        environment: the server's variables.
        arguments: the arguments of its ``vllm serve``.
        counts: counters that must be above zero at the end; of ``a|b`` one of the two.
        never: counters that must be zero.
        upstream: whether the answers must equal those of ``base``, for each prompt to which
            ``base`` gives the same answer twice.
        library: whether the plugin has its compiled library.
        act: runs between two rounds of requests.
        same: whether the answers of both rounds must be equal, for the same prompts.
        kinds: the kinds of model that the drill is for, with the names of :mod:`.model`; none: all.
        base: the drill with whose answers its own are compared.
    """

    name: str
    what: str
    says: str
    environment: dict[str, str] = field(default_factory=lambda: {"DSV4_PLUGIN": "1"})
    arguments: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    never: tuple[str, ...] = ("topk.decode", "topk.prefill", "logits.plugin")
    upstream: bool = True
    library: bool = True
    act: Callable[[Server], None] | None = None
    same: bool = True
    kinds: tuple[str, ...] = ()
    base: str = BASE


def _fault(name: str) -> dict[str, str]:
    return {"DSV4_PLUGIN": "1", "E2E_FAULT": name}


def _candidates(op: str) -> Drill:
    """Return the drill in which an op of two-level selection fails."""
    return Drill(
        op, f"{op} raises at its first call",
        rf"topk failed at a call and was switched off \(RuntimeError: drill: {op}\)",
        _fault(op), counts=("topk.decode.upstream",), never=("candidates.consumer",),
        kinds=(model.V41,),
    )  # fmt: skip


_ALL = ("topk.decode", "topk.prefill", "logits.plugin", "gather")
DRILLS = (
    Drill(
        BASE, "the kill switch, DSV4_PLUGIN=0, although --plugin dsv4 asks for the plugin",
        r"DSV4_PLUGIN=0: nothing is patched", {"DSV4_PLUGIN": "0"},
    ),
    Drill(
        "on", "nothing: the plugin serves",
        r"top-k: bf16 by cuda", counts=_ALL, never=(), upstream=False,
    ),
    Drill(
        "capability", "the plugin sees a GPU of compute capability 7.5",
        r"top-k: the engine's \(.*compute capability 7\.5", _fault("capability"),
        never=(*_ALL,),
    ),
    Drill(
        "library", f"{LIBRARY} is not there",
        rf"top-k: the engine's \(.*{re.escape(LIBRARY)}", library=False,
    ),
    Drill(
        "seam", "a function of vLLM's that is patched has other parameters",
        r"the engine's own code stays at topk\.prefill \(.*top_k_per_row_prefill", _fault("seam"),
        counts=("gather",),
    ),
    Drill(
        "topk", "the top-k raises at its first call",
        r"topk failed at a call and was switched off \(RuntimeError: drill: topk\)",
        _fault("topk"), counts=("topk.decode.upstream", "gather"),
        never=("topk.decode", "topk.prefill"),
    ),
    Drill(
        "logits", "the logits kernel raises at its first call",
        r"topk failed at a call and was switched off \(RuntimeError: drill: logits\)",
        _fault("logits"), counts=("topk.decode.upstream", "gather"), never=("topk.decode",),
    ),
    Drill(
        "gather", "the gather of the keys raises at its first call",
        r"gather failed at a call and was switched off \(RuntimeError: drill: gather\)",
        _fault("gather"), counts=("topk.decode", "topk.prefill", "gather.upstream"),
        never=("gather",), upstream=False,
    ),
    Drill(
        "shadow",
        "nothing: vLLM's selection runs beside the plugin's in float32, on the same scores",
        r"top-k: fp32 by cuda",
        {"DSV4_PLUGIN": "1", "DSV4_TOPK": "fp32", "DSV4_SHADOW": "1"},
        counts=("topk.decode", "topk.prefill"), never=(), upstream=False,
    ),
    Drill(
        "sleep", "nothing: the engine sleeps (level 1) and wakes up between two rounds",
        r"top-k: bf16 by cuda", {"DSV4_PLUGIN": "1", "VLLM_SERVER_DEV_MODE": "1"},
        ("--enable-sleep-mode",), counts=_ALL, never=(), upstream=False,
        act=partial(_sleep, level=1),
    ),
    Drill(
        "sleep2", "nothing: the engine sleeps at level 2, where the shadow's counters must survive",
        r"top-k: fp32 by cuda",
        {"DSV4_PLUGIN": "1", "DSV4_TOPK": "fp32", "DSV4_SHADOW": "1", "VLLM_SERVER_DEV_MODE": "1"},
        ("--enable-sleep-mode",), counts=("topk.decode", "topk.prefill"), never=(),
        upstream=False, act=partial(_sleep, level=2), same=False,
    ),
    Drill(
        "candidates", "nothing: the plugin serves the source of the candidates and its consumers",
        r"top-k: bf16 by cuda", counts=(*_ALL, "candidates.source", "candidates.consumer"),
        never=("candidates.source.engine",), upstream=False, kinds=(model.V41,),
    ),
    Drill(
        "candidate_seam", "vLLM's selection of candidate blocks has other parameters",
        r"top-k: the engine's \(.*_select_candidate_blocks takes \(anything\)",
        _fault("candidate_seam"), never=("candidates.source", "candidates.consumer"),
        upstream=False, kinds=(model.V41,),
    ),
    *map(_candidates, ("block_maxima", "select_blocks", "candidate_select")),
)  # fmt: skip


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
    result.lines = sorted(
        {m[1] for line in server.lines(PLUGIN, 999, 4000) if (m := PLUGIN.search(line))}
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
    for kind in ("decode", "prefill") if "DSV4_SHADOW" in drill.environment else ():
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
        _all_same(result, repeats, found, "the answers are not vLLM's")
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
    prog: str = "benchmarks.server.drills", about: str = __doc__, table: Sequence[Drill] = DRILLS
) -> Parser:
    """Return the command line of a table of drills."""
    p = Parser(prog=f"python -m {prog}", description=about.splitlines()[0])
    p.set_defaults(table=table, module=prog)
    add_common(p, port=8200, ready=300, kv_gib=2, max_model_len=32 << 10)
    add = p.add_argument
    names = [drill.name for drill in table]
    add("--only", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"only these of {', '.join(names)} (default: all that fit the model), and the servers "
        "with which they are compared")  # fmt: skip
    about = "the most servers at a time (default: all)"
    add("--at-once", type=numbers.COUNT, default=len(names), help=about)
    about = "the most seconds for one request (default: 120)"
    add("--timeout", type=numbers.SECONDS, default=120, help=about)
    return p


def drill(
    a: argparse.Namespace, folder: Path, found: list[dict[str, Any]], saved: Callable[[], None],
    secrets: Secrets,
) -> None:  # fmt: skip
    """Do the drills; add each result to ``found``, and call ``saved`` after each group."""
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
    for i in range(0, len(results), a.at_once):
        some = results[i : i + a.at_once]
        _together(a, some)
        for result in some:
            base = next(r for r in results if r.drill.name == result.drill.base)
            found.append(_told(result, _compare(result, base)))
            print(f"{result.drill.name}: {'; '.join(result.wrong) or 'passed'}", flush=True)
        saved()


def _wanted(a: argparse.Namespace) -> list[Drill]:
    kind = model.read(a.model).kind
    fit = [each for each in a.table if not each.kinds or kind in each.kinds]
    named = [each for each in fit if each.name in a.only]
    bases = {each.base for each in named} or {BASE}
    return [each for each in fit if each in named or each.name in bases]


def _together(a: argparse.Namespace, some: list[Result]) -> None:
    """Do some drills at the same time; stop their servers, however the drills end."""
    pool = ThreadPoolExecutor(len(some))
    try:
        for result in some:
            if not result.drill.library:
                _without_library(result.server)
            result.server.begin()
        list(pool.map(partial(_run, ready=a.ready, timeout=a.timeout), some))
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
