"""``dsv4-plugin ab``: options, the run, the results."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dsv4_plugin.cli.ab import AbError, Refused, plot, report
from dsv4_plugin.cli.ab.clients import Client
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engines import ENGINES, Workload, server_command, split
from dsv4_plugin.cli.ab.environment import (
    DEFAULTS,
    client_environ,
    machine,
    parse,
    secrets_of,
    server_environ,
    startable,
    told,
    versions,
)
from dsv4_plugin.cli.ab.experiment import Design, Experiment
from dsv4_plugin.cli.ab.metrics import METRICS
from dsv4_plugin.cli.ab.servers import Server
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import UsageError, examples, reading

__all__ = ["add_arguments", "run"]

FEWEST_PAIRS = 3
MOST_RUNS = 5000  # per side and workload, because there are so many seeds
PAIRS = numbers.whole(FEWEST_PAIRS, MOST_RUNS)
ROUNDS = numbers.whole(0, MOST_RUNS - 1)
SIDES = ("A", "B")
UNPROVEN = (
    "nothing can show whether the plugin is at work in {upper}: name its status folder "
    "(--status-dir-{side}) or its log (--log-{side}), or give --trust-engagement"
)
DESCRIPTION = (
    "Serve a model without the plugin (A) and with it (B) in turn, and compare what the "
    "engine's own benchmark client measures. Arguments after -- go to both servers. docs/ab.md "
    "explains what is measured and what is refused."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``dsv4-plugin ab``."""
    parser.description = DESCRIPTION
    examples(
        parser,
        "--model MODEL --out ab -- --tensor-parallel-size 4",
        "--url-a http://a:8000 --url-b http://b:8000 --status-dir-a DIR --status-dir-b DIR "
        "--out ab",
    )
    add = parser.add_argument
    add(
        "--engine",
        choices=tuple(ENGINES),
        default="vllm",
        help="the engine of the servers (default: vllm)",
    )
    add("--model", help="the model to serve, and its name for the client")
    add(
        "--out",
        type=outputs.folder,
        metavar="DIR",
        help="an empty or new folder for results and logs",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw a plot to FILE (.png or .svg); needs matplotlib",
    )
    add(
        "--from", type=Path, dest="results", metavar="FILE.json",
        help="measure nothing; print the table of an earlier run, and draw --plot",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="print what would be started, and start nothing")

    group = parser.add_argument_group(
        "the two sides (default: A has DSV4_PLUGIN=0, B has DSV4_PLUGIN=1)"
    )
    add = group.add_argument
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for both servers and the client",
    )
    for side, meant in (("a", "off"), ("b", "on")):
        upper = side.upper()
        add(f"--env-{side}", action="append", default=[], metavar="NAME=VALUE", help=f"for {upper}")
        add(f"--args-{side}", default="", metavar="'...'", help=f"options of server {upper}")
        about = f"whether the plugin must be at work in {upper} (default: {meant})"
        add(f"--expect-{side}", choices=("on", "off"), default=meant, help=about)

    group = parser.add_argument_group("commands (split as a shell would; no shell sees them)")
    add = group.add_argument
    add("--python", default=sys.executable, help="the Python that runs server and client")
    add(
        "--server-command", metavar="'...'",
        help="replaces the engine's; gets --host and --port unless it has {port}",
    )  # fmt: skip
    add(
        "--client-command", metavar="'...'",
        help="replaces the engine's; gets the usual options unless it has {result}; {url} {model} "
        "{seed} {input_len} {output_len} {num_prompts} {concurrency} are filled in",
    )  # fmt: skip
    add(
        "--serve-args",
        default="",
        metavar="'...'",
        help="for both servers, like the arguments after --",
    )
    add("--client-args", default="", metavar="'...'", help="more options for the client")
    add("--host", default="127.0.0.1", help="where the servers listen (default: 127.0.0.1)")
    add("--port", type=numbers.PORT, help="their port (default: the engine's, 8000 or 30000)")
    add("--port-b", type=numbers.PORT, help="the port of B with --together (default: the next)")

    group = parser.add_argument_group("what runs")
    add = group.add_argument
    add(
        "--workload", action="append", default=[], metavar="in=N,out=N,n=N,c=N",
        help="tokens in and out, prompts, concurrency; can be given several times "
        "(default: in=8192,out=128,n=16,c=4)",
    )  # fmt: skip
    add("--pairs", type=PAIRS, default=3, help=f"A-B pairs, at least {FEWEST_PAIRS} (default: 3)")
    add(
        "--runs",
        type=numbers.whole(1, MOST_RUNS),
        default=1,
        help="client runs in each half of a pair (default: 1)",
    )
    add("--order", choices=("abab", "abba"), default="abab", help="of the pairs (default: abab)")
    add(
        "--seed",
        type=numbers.SEED,
        default=0,
        help="first seed of the client (default: 0)",
    )
    add("--warmup-rounds", type=ROUNDS, default=8, help="the most warm-up rounds (default: 8)")
    add(
        "--warmup-prompts",
        type=numbers.COUNT,
        help="prompts of a warm-up round (default: twice the concurrency, min. 4)",
    )
    add(
        "--figure", choices=[metric.name for metric in METRICS], default=report.FIGURE,
        metavar="NAME",
        help="the figure that the report closes with, declared before the run: "
        f"{', '.join(metric.name for metric in METRICS)} (default: {report.FIGURE})",
    )  # fmt: skip
    about = "warm when two rounds in a row differ by at most this share (default: 0.1)"
    add("--tolerance", type=numbers.real(least=0, most=1000), default=0.1, help=about)
    add(
        "--start-timeout",
        type=numbers.SECONDS,
        default=1800.0,
        help="seconds until /health must answer (default: 1800)",
    )
    add(
        "--run-timeout",
        type=numbers.SECONDS,
        default=3600.0,
        help="the most seconds of a client run (default: 3600)",
    )

    group = parser.add_argument_group("servers")
    add = group.add_argument
    add("--restart", action="store_true", help="a new server for each half of a pair (the default)")
    add(
        "--together",
        action="store_true",
        help="run both servers at once and alternate between them",
    )
    add("--url-a", help="A is a server that already runs here")
    add("--url-b", help="B is a server that already runs here")
    for side in ("a", "b"):
        about = f"the DSV4_STATUS_DIR with which the running {side.upper()} was started"
        add(f"--status-dir-{side}", type=Path, metavar="DIR", help=about)
        about = f"the log of the running {side.upper()}"
        add(f"--log-{side}", type=Path, metavar="FILE", help=about)
    add(
        "--health",
        default="/health",
        metavar="PATH",
        help="path that answers 200 when a server is ready",
    )
    about = "processes in which the plugin must be at work (default: 1; with TP, its size)"
    add("--workers", type=numbers.COUNT, default=1, help=about)
    about = "report even if nothing shows whether the plugin is at work; the report says so"
    add("--trust-engagement", action="store_true", help=about)


def run(arguments: argparse.Namespace) -> int:
    """Run ``dsv4-plugin ab``; ``arguments.after`` are options of both servers.

    Returns:
        0, or the exit code of what went wrong (:class:`AbError`), which is printed.

    Raises:
        UsageError: the options cannot be run like this.
    """
    if arguments.results is not None:
        _again(arguments)
        return 0
    more = split(arguments.serve_args, "--serve-args")
    return _run(arguments, [*more, *arguments.after])


def _again(arguments: argparse.Namespace) -> None:
    file = arguments.results
    with reading(file):
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("what") != "ab":
            raise UsageError(f"{file} is no results file of dsv4-plugin ab")
        if not document.get("complete"):
            raise UsageError(f"{file} is not complete: {document.get('error') or 'it was cut off'}")
        if arguments.plot:
            plot.check(arguments.plot)
        lines = report.lines(document)
    print("\n".join(lines), flush=True)
    if arguments.plot:
        with reading(file):
            plot.draw(document, arguments.plot)
        print(f"drawn to {arguments.plot}")


class _Plan:
    """The checked options."""

    def __init__(self, arguments: argparse.Namespace, more: list[str]) -> None:
        self.arguments = arguments
        self.engine = ENGINES[arguments.engine]
        self.design = _design(arguments)
        self.common = parse(arguments.env, "--env")
        self.own = {
            side: parse(getattr(arguments, f"env_{side.lower()}"), f"--env-{side.lower()}")
            for side in SIDES
        }
        self.urls = {"A": _url(arguments, "url_a"), "B": _url(arguments, "url_b")}
        if not arguments.health.startswith("/"):
            raise UsageError(f"--health must begin with /, got {arguments.health!r}")
        running = self.design.mode == "running"
        if not running and not (arguments.model or arguments.server_command):
            raise UsageError("--model is missing (or --server-command, or --url-a and --url-b)")
        starts = more or arguments.server_command or arguments.args_a or arguments.args_b
        if running and (starts or arguments.env_a or arguments.env_b):
            raise UsageError(
                "with --url-a and --url-b no server is started: --server-command, --serve-args, "
                "--args-a/-b, --env-a/-b and what stands after -- have no meaning"
            )
        known = (arguments.status_dir_a, arguments.status_dir_b, arguments.log_a, arguments.log_b)
        if not running and any(known):
            raise UsageError("--status-dir-a/-b and --log-a/-b need --url-a and --url-b")
        for option, path in zip(("--status-dir-a", "--status-dir-b"), known[:2], strict=True):
            if path is not None and not path.is_dir():
                raise UsageError(f"{option} {path} is no folder")
        for option, path in zip(("--log-a", "--log-b"), known[2:], strict=True):
            if path is not None and not path.is_file():
                raise UsageError(f"{option} {path} is no file")
        if running and not self.design.trust:
            for side, folder, log in zip("ab", known[:2], known[2:], strict=True):
                if folder is None and log is None:
                    raise UsageError(UNPROVEN.format(side=side, upper=side.upper()))
        self.client = split(arguments.client_command or "", "--client-command") or [
            arguments.python, *self.engine.client,
        ]  # fmt: skip
        if not (self.engine.client or arguments.client_command):
            raise UsageError(
                f"{arguments.engine} has no benchmark client: name one with --client-command, such "
                "as 'PYTHON -m vllm.entrypoints.cli.main bench serve' of a Python that has vLLM"
            )
        self.client_args = split(arguments.client_args, "--client-args")
        self.ports = {"A": arguments.port or self.engine.port}
        self.ports["B"] = self.ports["A"]
        if self.design.mode == "together":
            self.ports["B"] = arguments.port_b or self.ports["A"] + 1
            if self.ports["B"] > 65_535 or len(set(self.ports.values())) < 2:
                raise UsageError(
                    f"--port and --port-b must be two ports up to 65535, got {self.ports['A']} and "
                    f"{self.ports['B']}"
                )
        self.commands = {} if running else {side: self._server(side, more) for side in SIDES}
        self.argv = ["dsv4-plugin", *arguments.argv]
        self.secrets = secrets_of(
            [self.common, *self.own.values()],
            [self.argv, *self.commands.values(), self.client, self.client_args],
        )

    def _server(self, side: str, more: list[str]) -> list[str]:
        a = self.arguments
        command = split(a.server_command or "", "--server-command")
        own = split(getattr(a, f"args_{side.lower()}"), f"--args-{side.lower()}")
        return server_command(
            command or [a.python, *self.engine.server, a.model], [*more, *own], a.host,
            self.ports[side],
        )  # fmt: skip

    def url(self, side: str) -> str:
        """Return the address of a side."""
        host = self.arguments.host
        host = f"[{host}]" if ":" in host else host
        return self.urls[side] or f"http://{host}:{self.ports[side]}"

    def environ(self, side: str, status: Path) -> dict[str, str]:
        """Return the environment of a server that this command starts."""
        return server_environ(side, self.common, self.own[side], str(status))

    def asked(self, side: str) -> dict[str, str]:
        """Return the variables that set this side's environment apart."""
        if self.design.mode == "running":
            return {}
        return {**self.common, **DEFAULTS[side], **self.own[side]}

    def server(self, side: str, folder: Path, console: Console) -> Server:
        """Return the server of a side; it is not started yet."""
        a = self.arguments
        if self.design.mode == "running":
            low = side.lower()
            return Server(
                side, self.url(side), console, health=a.health,
                log=getattr(a, f"log_{low}"), status=getattr(a, f"status_dir_{low}"),
            )  # fmt: skip
        status = folder / "status"
        return Server(
            side, self.url(side), console, health=a.health, command=self.commands[side],
            environ=self.environ(side, status), log=folder / "server.log", status=status,
        )  # fmt: skip


def _design(arguments: argparse.Namespace) -> Design:
    a = arguments
    if bool(a.url_a) != bool(a.url_b):
        raise UsageError("--url-a and --url-b come together")
    modes = [
        name
        for name, asked in (
            ("--restart", a.restart), ("--together", a.together), ("--url-a/--url-b", a.url_a),
        )
        if asked
    ]  # fmt: skip
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(modes)} exclude each other")
    if a.url_a and a.url_a.rstrip("/") == a.url_b.rstrip("/"):
        raise UsageError(f"--url-a and --url-b are the same server, {a.url_a}")
    if a.pairs * a.runs > MOST_RUNS:
        raise UsageError(f"--pairs x --runs must be at most {MOST_RUNS}, got {a.pairs * a.runs}")
    loads = tuple(Workload.parse(text) for text in a.workload) or (Workload.parse(""),)
    if len(set(loads)) < len(loads):
        raise UsageError("the same --workload was given twice")
    return Design(
        "running" if a.url_a else "together" if a.together else "restart", loads, a.pairs, a.runs,
        a.order, a.seed, a.warmup_rounds, a.warmup_prompts, a.tolerance, a.start_timeout,
        a.workers, a.trust_engagement,
    )  # fmt: skip


def _url(arguments: argparse.Namespace, name: str) -> str | None:
    """Return the address of a running server.

    Raises:
        UsageError: the address has a wrong form.
    """
    text = getattr(arguments, name)
    if text is None:
        return None
    try:
        at = urlsplit(text)
        sound = at.scheme in ("http", "https") and at.hostname and at.port != 0
    except ValueError:
        sound = False
    if not sound:
        option = name.replace("_", "-")
        raise UsageError(f"--{option} must be http://HOST:PORT or https://…, got {text!r}")
    return text


def _run(arguments: argparse.Namespace, more: list[str]) -> int:
    plan = _Plan(arguments, more)
    if arguments.dry_run:
        _show(plan)
        return 0
    folder = arguments.out
    if folder is None:
        raise UsageError("--out DIR is missing: the folder for results and logs")
    folder = folder.absolute()
    if arguments.plot:  # fail now, not after everything is measured
        plot.check(arguments.plot, folder)
    with reading(folder, "folder"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--out {folder} must be an empty or new folder")
    if why := startable(plan.client, client_environ(plan.common)):
        raise UsageError(f"the client cannot be started: {why} (see --python, --client-command)")
    outputs.make_folder("--out", folder)
    document = _document(plan)
    with Console(plan.secrets) as console:
        client = Client(
            plan.engine, plan.client, plan.client_args, arguments.model,
            client_environ(plan.common), arguments.run_timeout, console,
        )  # fmt: skip
        expect = {"A": arguments.expect_a, "B": arguments.expect_b}

        def make(side: str, where: Path) -> Server:
            return plan.server(side, where, console)

        experiment = Experiment(plan.design, make, client, expect, document, folder, console)
        experiment.save()

        def whole() -> None:
            _ask_versions(plan, document)
            experiment.run()
            console.pause()

        code = _guarded(whole, document, console)
        if code == 0:
            document["summary"] = report.summarise(document)
            document["complete"] = True
        experiment.save()
    if code == 0:
        told = plan.secrets.data(document)
        print("\n".join(report.lines(told)))
        if arguments.plot:
            plot.draw(told, arguments.plot)
            print(f"drawn to {arguments.plot}")
    print(
        f"{'written' if code == 0 else 'the results so far were written'} to {folder / 'ab.json'}"
    )
    return code


def _guarded(action: Callable[[], None], document: dict[str, Any], console: Console) -> int:
    """Run the action; print an error and put it into the document."""
    try:
        action()
    except AbError as error:
        # An error while a server is stopped must not hide the error that led to the stop.
        first = error.__context__
        said = f"{first}\n{error}" if isinstance(first, AbError) else str(error)
        refused = isinstance(error, Refused)
        document["error"] = console.secrets.text(said)
        document["refused"] = refused
        with contextlib.suppress(OSError):
            print(
                f"dsv4-plugin ab: {'REFUSED: ' if refused else ''}{document['error']}",
                file=sys.stderr,
            )
        return error.exit_code
    return 0


def _ask_versions(plan: _Plan, document: dict[str, Any]) -> None:
    """Ask the Python of the servers that will be started for its versions."""
    for side in SIDES if plan.design.mode != "running" else ():
        environ = plan.environ(side, Path("OUT", "SERVER", "status"))
        document["sides"][side]["versions"] = plan.secrets.data(
            versions(plan.arguments.python, environ, "torch", "triton", plan.engine.distribution)
        )


def _document(plan: _Plan) -> dict[str, Any]:
    a = plan.arguments
    sides = {}
    for side in SIDES:
        running = plan.design.mode == "running"
        environ = {} if running else plan.environ(side, Path("OUT", "SERVER", "status"))
        sides[side] = {
            "command": plan.secrets.command(plan.commands.get(side, [])),
            "url": plan.secrets.text(plan.urls[side] or "") or None,
            "asked_env": told(plan.asked(side), plan.asked(side), plan.secrets),
            "env": told(environ, plan.asked(side), plan.secrets),
            "expect": a.expect_a if side == "A" else a.expect_b,
            "versions": None,
            "engagement": {"summary": "not checked yet"},
        }  # fmt: skip
    example = Client(plan.engine, plan.client, plan.client_args, a.model, {}, 0, Console())
    load = plan.design.workloads[0]
    return {
        "what": "ab",
        "complete": False,
        "refused": False,
        "error": None,
        "machine": machine(),
        "engine": a.engine,
        "figure": a.figure,
        "argv": plan.secrets.command(plan.argv),
        "sides": sides,
        "client": {
            "first_command": plan.secrets.command(
                example.command(plan.url("A"), load, plan.design.run_seed(1, 1, 1), Path("RESULT"))
            ),
            "env": told(client_environ(plan.common), plan.common, plan.secrets),
        },
        "summary": [],
    }


def _show(plan: _Plan) -> None:
    document = _document(plan)
    _ask_versions(plan, document)
    for side in SIDES:
        about = document["sides"][side]
        environ = " ".join(f"{n}={v}" for n, v in about["asked_env"].items())
        print(f"{side}: {environ} {shlex.join(about['command']) or about['url']}")
        if about["versions"]:
            print(f"   {json.dumps(about['versions'])}")
        if side in plan.commands:
            _absent(plan, plan.commands[side], plan.environ(side, Path("OUT", "SERVER", "status")))
    print(f"client: {shlex.join(document['client']['first_command'])}")
    _absent(plan, plan.client, client_environ(plan.common))
    design = plan.design
    print(f"{design.mode}: {' '.join(design.sides(p) for p in range(1, design.pairs + 1))}, "
          f"{design.runs} run(s) of {', '.join(map(str, design.workloads))}")  # fmt: skip


def _absent(plan: _Plan, command: list[str], environ: dict[str, str]) -> None:
    """Print why a command that is shown could not be started here."""
    if why := startable(command, environ):
        print(f"   cannot be started here: {plan.secrets.text(why)}")
