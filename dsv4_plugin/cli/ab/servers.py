"""A server that this command starts, or a server that already runs."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.processes import Patience, Process
from dsv4_plugin.cli.shared.requests import ask

__all__ = ["Server", "free_port", "version"]

POLL_S = 0.5
SAY_EVERY_S = 15.0
PORT_S = 2.0  # how long a process that just ended may hold a port


def free_port(host: str, port: int, console: Console, patience: float = 0.0) -> None:
    """Return once nothing listens on ``port``.

    Raises:
        AbError: another process listens, for longer than ``patience`` seconds.
    """
    end = time.monotonic() + patience
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except (OSError, OverflowError, ValueError) as error:
                if time.monotonic() >= end:
                    why = getattr(error, "strerror", None) or error
                    raise AbError(
                        f"port {port} of {host} cannot be used ({why}): "
                        "stop what listens there, or choose another with --port"
                    ) from error
        console.pause(POLL_S)


def version(url: str) -> str | None:
    """Return the version that a server reports, or None."""
    for path in ("/version", "/server_info", "/get_server_info"):
        reply = ask(url, path, most=1 << 20)
        if reply.status == 200:
            try:
                found = json.loads(reply.body).get("version")
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(found, str):
                return found[:100]
    return None


class Server:
    """Answers at ``url``. This command starts it if ``command`` is given; else it already runs.

    ``status`` is the folder of ``DSV4_STATUS_DIR`` and ``log`` the log, if they are known. The
    command runs in ``cwd``.
    """

    def __init__(
        self, name: str, url: str, console: Console, *, health: str = "/health",
        command: Sequence[str] = (), environ: Mapping[str, str] | None = None,
        log: Path | None = None, status: Path | None = None, cwd: Path | None = None,
        patience: Patience | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.url = url.rstrip("/")
        self.log = log
        self.status = status
        self.process: Process | None = None
        self.secrets = console.secrets
        self._console = console
        self._health = health
        self._command = list(command)
        self._environ = environ
        self._cwd = cwd
        self._patience = patience
        self._began = 0.0

    def start(self, timeout: float) -> float:
        """Start it, if it has a command, and wait until it is healthy; returns the seconds.

        Raises:
            AbError: the port is taken, the server ended, or it is not healthy in time.
        """
        self.begin()
        return self.wait(timeout)

    def begin(self) -> None:
        """Start it, if it has a command; :meth:`wait` says when it serves.

        Raises:
            AbError: the port is taken, or there is no such program.
        """
        self._began = time.monotonic()
        if self._command:
            assert self.log is not None and self._environ is not None
            at = urlsplit(self.url)
            free_port(at.hostname or "", at.port or 0, self._console, PORT_S)
            mark = f"DSV4_STATUS_DIR={self._environ['DSV4_STATUS_DIR']}"
            self.process = Process(
                f"server {self.name}", self._command, self._environ, self.log, self._console, mark,
                self._cwd,
            )  # fmt: skip

    def wait(self, timeout: float) -> float:
        """Wait until it is healthy; returns the seconds since :meth:`begin`.

        Raises:
            AbError: it ended, or it is not healthy ``timeout`` seconds after :meth:`begin`.
        """
        said = 0.0
        while True:
            self.check()
            reply = ask(self.url, self._health, most=0)
            seconds = time.monotonic() - self._began
            if reply.status == 200:
                self.check()  # the answer came from this server and no other
                return seconds
            if seconds > timeout:
                raise AbError(
                    f"server {self.name} is not healthy after {timeout:g} s "
                    f"({reply.said} at {self.url}{self._health}){self._last('; its last line: ')}"
                )
            if seconds - said > SAY_EVERY_S:
                said = seconds
                waits = f"{self.name}: waiting for {self._health}, {seconds:.0f} s"
                self._console.say(f"{waits}{self._last(': ')}")
            self._console.pause(POLL_S)

    def _last(self, before: str) -> str:
        return before + self.process.last_line() if self.process else ""

    def healthy(self) -> bool:
        """Whether its health answer is 200."""
        return ask(self.url, self._health, most=0).status == 200

    def check(self) -> None:
        """Raise :class:`AbError` if this command started it and it has ended."""
        if self.process is not None and self.process.ended() is not None:
            raise self.process.died("without being asked to")

    def stop(self) -> None:
        """Stop it, if this command started it."""
        if self.process is not None:
            self.process.stop(self._patience)
