"""One run of the benchmark client against a server, from the command to checked figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engines import Engine, Workload, client_command, load_result
from dsv4_plugin.cli.ab.metrics import Result, read
from dsv4_plugin.cli.ab.processes import Process
from dsv4_plugin.cli.ab.servers import Server

__all__ = ["Client"]

SAY_EVERY_S = 30.0


class Client:
    """The engine's benchmark client; command and environment are the same for both servers."""

    def __init__(
        self, engine: Engine, command: Sequence[str], more: Sequence[str], model: str | None,
        environ: Mapping[str, str], timeout: float, console: Console,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._command = list(command)
        self._more = list(more)
        self._model = model
        self._environ = environ
        self._timeout = timeout
        self._console = console

    def command(self, url: str, load: Workload, seed: int, result: Path) -> list[str]:
        """Return the command of one run."""
        return client_command(
            self._engine, self._command, self._more, url, self._model, load, seed, result
        )

    def run(self, server: Server, load: Workload, seed: int, stem: Path) -> Result:
        """Run it once; write the result to ``stem.json`` and the client's output to ``stem.log``.

        Raises:
            AbError: the client or the server failed or took too long, or a request failed.
        """
        result, log = stem.with_suffix(".json"), stem.with_suffix(".log")
        what = f"client of {server.name} ({stem.name})"
        server.check()
        began = said = time.monotonic()
        command = self.command(server.url, load, seed, result)
        process = Process(what, command, self._environ, log, self._console)
        try:
            while process.ended() is None:
                server.check()
                now = time.monotonic()
                if now - began > self._timeout:
                    raise AbError(
                        f"{what} is not done after {self._timeout:g} s; "
                        f"its last line: {process.last_line()}"
                    )
                if now - said > SAY_EVERY_S:
                    said = now
                    self._console.say(f"{what}: {now - began:.0f} s: {process.last_line()}")
                self._console.pause(0.1)
            if process.ended() != 0:
                self._console.pause(0.5)  # a server that failed with the client has ended by now
                server.check()
                raise process.died("instead of a result")
        finally:
            process.stop()
        server.check()
        found = load_result(self._engine, result, what)
        return read(found, load.prompts, what, self._console.secrets.text)
