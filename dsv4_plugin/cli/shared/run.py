"""What all commands share: how options are read, and how every run ends.

:func:`ended` runs a command. An error that the user can repair is one line and exit code 2. If the
reader of the output has gone, the command ends silently. A signal ends it with one line and exit
code 130 (Ctrl-C), 143 or 129. A long run is done in :func:`interruptible`: an interrupted run still
prints and writes its results so far. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from dsv4_plugin.cli.shared import secrets
from dsv4_plugin.errors import SettingError, UnmetError

__all__ = [
    "Interrupted", "Parser", "Run", "UsageError", "ended", "examples", "held", "interruptible",
    "lost_signals", "need_torch", "reading",
]  # fmt: skip

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Replacements for characters that a stream cannot encode; "?" for all others.
PLAIN = {
    "±": "+-", "…": "...", "–": "-", "—": "-", "·": "*", "×": "x", "µ": "u", "≥": ">=", "≤": "<=",
    "→": "->", "Σ": "sum", "√": "sqrt", "“": '"', "”": '"', "‘": "'", "’": "'", "█": "#",
}  # fmt: skip


class UsageError(ValueError, argparse.ArgumentTypeError):
    """An error that the user can repair: in an option, or in a file that an option names."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end; ``said`` is added to the last line."""

    def __init__(self, number: int = signal.SIGINT, said: str = "") -> None:
        super().__init__(number)
        self.exit_code, self.said = 128 + int(number), said


class Parser(argparse.ArgumentParser):
    """A parser whose error is a :class:`UsageError`: :func:`ended` prints it as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        said = re.sub(r"^argument (-[^:]*): (?=must |cannot |needs )", r"\1 ", message)
        raise UsageError(f"{said} (see {self.prog} --help)")


def examples(parser: argparse.ArgumentParser, *lines: str) -> None:
    """Put command lines under a parser's help; ``lines`` are what follows the command."""
    parser.formatter_class = _Help
    parser.epilog = "\n".join(["examples:", *(f"  {parser.prog} {line}" for line in lines)])


class _Help(argparse.HelpFormatter):
    """Wraps the description, and leaves the lines of the examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def ended(prog: str, body: Callable[[], int], argv: Sequence[str] = ()) -> int:
    """Run a command to its end; returns its exit code.

    Args:
        prog: the beginning of its error lines.
        body: does the work and returns an exit code.
        argv: its arguments; no error may show their secrets.
    """
    known = secrets.Secrets(commands=[argv, sys.argv])

    def say(error: object, code: int) -> int:
        with contextlib.suppress(OSError, ValueError):
            print(f"{prog}: {known.text(_line(str(error)))}", file=sys.stderr, flush=True)
        return code

    # Hide torch's own warning about a missing NumPy; nothing here needs NumPy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    _came.clear()
    with _streams(), _signals():
        try:
            try:
                code = body()
                lost_signals()
                return code
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except (UsageError, SettingError, UnmetError) as error:
            return say(error, 2)
        except KeyboardInterrupt as error:
            _came.clear()
            said = getattr(error, "said", "")
            return say(f"interrupted{'; ' if said else ''}{said}", getattr(error, "exit_code", 130))
        except BrokenPipeError:
            _let_go()
            return 128 + int(signal.SIGPIPE)
        except OSError as error:
            if error.filename is None:  # most likely the stream of the report
                _let_go()
            return say(error, 1)
        except MemoryError as error:
            return say(f"there is not enough memory {error}".rstrip(), 1)
        except RuntimeError as error:
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                return say(f"there is not enough memory ({error})", 1)
            raise


@contextlib.contextmanager
def interruptible() -> Iterator[Run]:
    """Run the long part of a command: a signal ends it, and the command goes on with its report.

    The command ends with :meth:`Run.end`, which raises the signal again.
    """
    run = Run()
    try:
        yield run
    except KeyboardInterrupt as error:
        _came.clear()
        run.interrupt = error


class Run:
    """Whether the long part of a command ran to its planned end."""

    def __init__(self) -> None:
        self.interrupt: KeyboardInterrupt | None = None

    @property
    def whole(self) -> bool:
        """Whether no signal ended it."""
        return self.interrupt is None

    def must(self, done: object, nothing: str, said: str = "") -> None:
        """Stop here if nothing was ``done``: because of the signal, or with an error.

        Raises:
            UsageError: no signal came; a run that did ``nothing`` is a failed run.
        """
        if not done:
            self.end(said)
            raise UsageError(nothing)

    def end(self, said: str = "") -> None:
        """Raise the interruption again, if there was one; ``said`` is added to the last line."""
        if self.interrupt is not None:
            number = getattr(self.interrupt, "exit_code", 128 + signal.SIGINT) - 128
            raise Interrupted(number, said) from None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay signals until the block ends, because it stops processes or writes files."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with _signals(note):
        yield
    if came:
        raise Interrupted(came[0])


def need_torch() -> None:
    """Import torch.

    Raises:
        UsageError: it cannot be imported, with the reason.
    """
    try:
        import torch

        torch.cuda.is_available()
    except (Exception, SystemExit) as error:  # a broken installation can raise anything
        lost_signals()
        raise UsageError(f"torch cannot be imported ({type(error).__name__}: {error})") from error
    lost_signals()


@contextlib.contextmanager
def reading(file: object, what: str = "results file") -> Iterator[None]:
    """Read a file of the user's: any error in it becomes a :class:`UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file} is no {what} that can be read: {said}") from error


def _line(text: str) -> str:
    """Return a text as one line."""
    return " ".join(text.split())


def _let_go() -> None:
    """Detach a stream that cannot be written, or Python reports it again at its exit."""
    with contextlib.suppress(Exception):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    some = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, "?") for c in some), error.end


codecs.register_error("dsv4-plain", _plain)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Make every text printable: replace what a stream cannot encode."""
    changed: list[tuple[Any, str]] = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            before = stream.errors
            stream.reconfigure(errors="dsv4-plain")  # type: ignore[union-attr]
            changed.append((stream, before or "strict"))
    try:
        yield
    finally:
        for stream, before in changed:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=before)


_came: list[int] = []  # signals whose exception was not caught yet


def _raise(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise Interrupted(number)


def lost_signals() -> None:
    """Raise a signal again if its exception was lost, for example in an import or a destructor.

    Raises:
        Interrupted: a signal came that has not ended anything yet.
    """
    if _came:
        raise Interrupted(_came[0])


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None] = _raise) -> Iterator[None]:
    """Install a handler for the signals that end a run, except those that the caller ignores."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
