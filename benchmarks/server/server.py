"""A server that is measured: the module loaded into its processes, its log, its workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.server.client import Client, at_once
from benchmarks.server.engines import NAME, Engine
from benchmarks.server.side import COPY, OPTIONS
from dsv4_plugin.cli.ab import AbError, servers
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engagement import Evidence, look
from dsv4_plugin.cli.shared.run import held

__all__ = ["Server", "stop"]

HOST = "127.0.0.1"
PATIENCE = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))


class Server(servers.Server):
    """One server and its folder.

    Args:
        name: its name in the results.
        engine: its engine.
        environment: variables in addition to those of this process.
        model: the model's folder, as examples/make_tiny_v4.py or make_tiny_v41.py writes it.
        folder: the folder for its log, traces and status; it is emptied.
        port: the port on which it listens.
        arguments: arguments of the engine's command, after the model.
        console: shows progress.
        command: the command that gets the model and the arguments (default: the engine's).
        weights: whether the weights are random.
    """

    def __init__(
        self, name: str, engine: Engine, environment: Mapping[str, str], model: Path, folder: Path,
        port: int, arguments: Sequence[str], console: Console, command: Sequence[str] = (),
        weights: bool = True,
    ) -> None:  # fmt: skip
        self.engine, self.folder = engine, folder
        self.environment = dict(environment)
        self.traces = folder / "traces"
        self.ready_s: float | None = None
        self.captured: list[dict[str, float]] = []  # memory when it began to serve
        shutil.rmtree(folder, ignore_errors=True)
        self.traces.mkdir(parents=True)
        self.arguments = [
            str(model.absolute()), "--served-model-name", NAME, "--host", HOST, "--port", str(port),
            "--load-format", "dummy" if weights else "auto", *arguments,
        ]  # fmt: skip
        url = f"http://{HOST}:{port}"
        super().__init__(
            name, url, console, log=folder / "serve.log", status=folder / "status", cwd=folder,
            command=[
                *(command or (sys.executable, *(engine.command or engine.shipped.server))),
                *self.arguments,
            ],
            environ=self._environ_of(weights), patience=PATIENCE,
        )  # fmt: skip
        self.client = Client(url, engine)

    def _environ_of(self, weights: bool) -> dict[str, str]:
        """Put :mod:`.side` on the path, and return the variables."""
        side = self.folder / "path"
        info = side / "dsv4_e2e-0.dist-info"
        info.mkdir(parents=True)
        # The engine's processes run in another folder. They import this folder from the checkout,
        # and the plugin from its installation.
        (side / "benchmarks").symlink_to(Path(__file__).resolve().parents[1])
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-e2e\nVersion: 0\n")
        entry = f"[{self.engine.group}]\ndsv4_e2e = {self.engine.side}\n"
        (info / "entry_points.txt").write_text(entry)
        (self.folder / OPTIONS).write_text(json.dumps({"weights": weights, "fast_start": True}))
        environ = {**self.engine.environment, **os.environ, **self.environment}
        environ["E2E_DIR"] = str(self.folder)
        environ["DSV4_STATUS_DIR"] = str(self.folder / "status")
        paths = (str(side), environ.get("PYTHONPATH", ""))
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if allowed := environ.get(self.engine.allowed):
            environ[self.engine.allowed] = f"{allowed},dsv4_e2e"
        return environ

    def begin(self) -> None:
        """Start it; :meth:`wait` returns when it serves."""
        with held():  # so that no server is started without being recorded
            super().begin()

    def wait(self, timeout: float) -> float:
        """Wait until it serves, ``timeout`` seconds from its start; return the seconds."""
        seconds = super().wait(timeout)
        self.ready_s = round(seconds, 1)
        self.captured = self.memory()
        return seconds

    def copy_contexts(self, on: bool) -> None:
        """Switch on or off that the server copies long prompts instead of computing them."""
        flag = self.folder / COPY
        if on:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)

    @property
    def copies(self) -> bool:
        """Whether copying is on; the server switches it off if it fails."""
        return (self.folder / COPY).exists()

    def lines(self, pattern: re.Pattern[str], most: int = 40, width: int = 400) -> list[str]:
        """Return the log's last lines that match."""
        assert self.log is not None
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return []
        return [line[:width] for line in text.splitlines() if pattern.search(line)][-most:]

    def _numbers(self, pattern: re.Pattern[str]) -> list[float]:
        found = (pattern.search(line) for line in self.lines(pattern))
        return [float(m[1].replace(",", "")) for m in found if m]

    def cache_tokens(self) -> int | None:
        """Return the tokens that the cache holds according to the log, or None if not logged."""
        found = self._numbers(self.engine.cache)
        return int(found[-1]) if found else None

    def graphs_gib(self) -> float | None:
        """Return the memory of the captured graphs according to the log, or None."""
        found = self._numbers(self.engine.graphs)
        return found[-1] if found else None

    def workers(self) -> Evidence:
        """Return the plugin's status in its living processes: counters, failures."""
        return look(self)

    def memory(self) -> list[dict[str, float]]:
        """Return torch's GPU memory in each of its processes with the model, in GiB."""
        return self._told("memory")

    def rows(self) -> list[dict[str, int]]:
        """Return how many rows of its prefills each of these processes scored."""
        return self._told("rows")

    def _told(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob(f"{name}-*.json"))]

    def about(self) -> dict[str, Any]:
        """Return the server's fields in the results."""
        return {
            "environment": self.environment,
            "arguments": [a.replace(str(self.folder), "FOLDER") for a in self.arguments],
            "ready_s": self.ready_s,
            "memory": {
                "graphs_gib": self.graphs_gib(),
                "serving": self.captured,
                "end": self.memory(),
            },
            "status": self.workers().processes,
            "rows": self.rows(),
            "log": self.lines(self.engine.told),
        }


def stop(some: Sequence[Server]) -> list[str]:
    """Stop servers at the same time; return those that did not stop."""
    left: list[str] = []

    def one(server: Server) -> None:
        try:
            server.stop()
        except AbError as error:
            left.append(str(error))

    with contextlib.suppress(ValueError):  # no server
        at_once(one, some)
    return left
