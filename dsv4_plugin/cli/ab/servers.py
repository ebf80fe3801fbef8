"""A server: one that is started here, or one that runs already."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.processes import Process

__all__ = ["Server", "free_port", "version"]

POLL_S = 0.5
SAY_EVERY_S = 15.0
ANSWER_S = 5.0  # how long a server may take for an answer
PORT_S = 2.0  # how long a port may be held by what has just ended


def free_port(host: str, port: int, console: Console, patience: float = 0.0) -> None:
    """Return once nothing listens on ``port``.

    Raises:
        AbError: somebody does, for longer than ``patience`` seconds.
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


def _get(url: str, path: str, most: int = 0) -> tuple[int, str, bytes]:
    """Ask for a path: the status, in words what came, and up to ``most`` bytes of the body.

    The status is 0 where nothing came that is HTTP. Proxies are for other machines.
    """
    at = urlsplit(url)
    user, _, place = at.netloc.rpartition("@")
    whole = at._replace(netloc=place, path=at.path.rstrip("/") + path).geturl()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(whole)
        if user:
            word = base64.b64encode(unquote(user).encode()).decode()
            request.add_header("Authorization", f"Basic {word}")
        with opener.open(request, timeout=ANSWER_S) as answer:
            return answer.status, f"HTTP {answer.status}", answer.read(most) if most else b""
    except urllib.error.HTTPError as error:
        return error.code, f"HTTP {error.code}", b""
    except http.client.HTTPException as error:  # another protocol, or half of an answer
        return 0, f"no answer that is HTTP: {type(error).__name__}: {str(error)!r:.100}", b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return 0, f"no answer: {reason!s:.100}", b""


def version(url: str) -> str | None:
    """Return the version that a server says it is of, or None."""
    for path in ("/version", "/server_info", "/get_server_info"):
        status, _, body = _get(url, path, most=1 << 20)
        if status == 200:
            try:
                found = json.loads(body).get("version")
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(found, str):
                return found[:100]
    return None


class Server:
    """Answers at ``url``. Started here if ``command`` is given, else somebody else's.

    ``status`` is the folder of ``DSV4_STATUS_DIR`` and ``log`` the log, where they are known.
    """

    def __init__(
        self, name: str, url: str, console: Console, *, health: str = "/health",
        command: Sequence[str] = (), environ: Mapping[str, str] | None = None,
        log: Path | None = None, status: Path | None = None,
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

    def start(self, timeout: float) -> float:
        """Start it, if it is ours to start, and wait until it is healthy; returns the seconds.

        Raises:
            AbError: the port is taken, it ended, or it is not healthy in time.
        """
        began = time.monotonic()
        if self._command:
            assert self.log is not None and self._environ is not None
            at = urlsplit(self.url)
            free_port(at.hostname or "", at.port or 0, self._console, PORT_S)
            mark = f"DSV4_STATUS_DIR={self._environ['DSV4_STATUS_DIR']}"
            self.process = Process(
                f"server {self.name}", self._command, self._environ, self.log, self._console, mark
            )
        said = began
        while True:
            self.check()
            status, answer, _ = _get(self.url, self._health)
            now = time.monotonic()
            if status == 200:
                self.check()  # it is this one that answered
                return now - began
            if now - began > timeout:
                last = f"; its last line: {self.process.last_line()}" if self.process else ""
                raise AbError(
                    f"server {self.name} is not healthy after {timeout:g} s "
                    f"({answer} at {self.url}{self._health}){last}"
                )
            if now - said > SAY_EVERY_S:
                said = now
                last = f": {self.process.last_line()}" if self.process else ""
                self._console.say(f"{self.name}: waiting for /health, {now - began:.0f} s{last}")
            self._console.pause(POLL_S)

    def check(self) -> None:
        """Raise :class:`AbError` if it is ours and has ended."""
        if self.process is not None and self.process.ended() is not None:
            raise self.process.died("without being asked to")

    def stop(self) -> None:
        """Stop it, if it was started here."""
        if self.process is not None:
            self.process.stop()
