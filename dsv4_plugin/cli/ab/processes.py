"""Start a command in its own session, follow its log, and stop all processes that it started.

A command is a list; no shell reads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv4_plugin.cli.ab import AbError
from dsv4_plugin.cli.ab.console import Console

__all__ = ["PATIENCE", "Patience", "Process", "tail"]

LINES = 30  # lines of a log that an error shows
# How many seconds each signal has to work. An engine that is told to end frees its GPU memory.
Patience = tuple[tuple[signal.Signals, float], ...]
PATIENCE: Patience = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))


class Process:
    """A command whose output goes to ``log``; only its processes have the variable ``mark``."""

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path,
        console: Console, mark: str | None = None, cwd: Path | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.command = list(command)
        self.log = log
        self._mark = mark.encode() if mark else None
        self._console = console
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("wb") as file:
                self._popen = subprocess.Popen(
                    self.command,
                    env=dict(environ),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            told = console.secrets.command(command)
            raise AbError(f"{name} cannot be started: {told}: {error}") from error

    @property
    def pid(self) -> int:
        """The process that was started; it leads the session."""
        return self._popen.pid

    def ended(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._popen.poll()

    def last_line(self) -> str:
        """Return the last line of the log that is not empty."""
        lines = [line for line in self._tail() if line.strip()]
        return lines[-1].strip()[:100] if lines else "no output yet"

    def _tail(self) -> list[str]:
        """Return the end of the log; secrets are hidden before a line is cut."""
        return list(map(self._console.secrets.text, tail(self.log)))

    def died(self, when: str) -> AbError:
        """Return the error for an end that this command did not ask for."""
        code = self.ended()
        how = f"with exit code {code}" if code is None or code >= 0 else f"by signal {-code}"
        text = "\n".join(f"    {line}" for line in self._tail())
        return AbError(f"{self.name} ended {how} {when}; the end of {self.log}:\n{text}")

    def living(self) -> list[int]:
        """Return the processes of this session, and processes elsewhere that inherited the mark."""
        self._popen.poll()  # a dead leader is reaped
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid() and self._is_mine(int(entry)):
                found.append(int(entry))
        return found

    def _is_mine(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # state ppid pgrp session, after a name that may hold any character
                state, _, group, session = file.read().rpartition(b")")[2].split()[:4]
            if state in (b"Z", b"X"):
                return False
            if self.pid in (int(group), int(session)):
                return True
            if self._mark is None:
                return False
            with open(f"/proc/{pid}/environ", "rb") as file:
                return self._mark in file.read().split(b"\0")
        except (OSError, ValueError):
            return False

    def stop(self, patience: Patience | None = None) -> None:
        """End the command and all that it started: SIGINT, then SIGTERM, then SIGKILL.

        ``patience``: each signal, and the seconds that it has to work (default: ``PATIENCE``).

        Raises:
            AbError: a process of it is alive after SIGKILL.
        """
        for number, seconds in patience or PATIENCE:
            if self._console.urgent and number != signal.SIGKILL:
                continue
            left = self.living()
            for pid in left:
                with contextlib.suppress(OSError):  # gone, or owned by another user
                    os.kill(pid, number)
            end = time.monotonic() + seconds
            while left and time.monotonic() < end:
                if self._console.urgent and number != signal.SIGKILL:
                    break
                time.sleep(0.05)
                left = self.living()
            if not left:
                return
            if number != signal.SIGKILL:
                self._console.say(f"{self.name}: {len(left)} processes outlive {number.name}")
        raise AbError(f"{self.name}: processes {left} outlive SIGKILL")


def tail(file: Path, lines: int = LINES) -> list[str]:
    """Return the last lines of a text file, with carriage returns of progress bars resolved."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 64_000))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    # A progress bar overwrites its line, so only the text after the last carriage return counts.
    shown_lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return (shown_lines[:-1] if not shown_lines[-1] else shown_lines)[-lines:]
