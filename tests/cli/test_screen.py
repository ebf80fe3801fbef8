"""The output on a terminal: lines that fit, tables by rich if installed, examples that work."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from benchmarks.soak import command as soak
from dsv4_plugin.cli import main as cli
from dsv4_plugin.cli.bench.command import WHAT
from dsv4_plugin.cli.shared import screen

HEAD = ["", "A", "95 % interval"]
ROWS = [["TPOT mean ms", "3.13", "0.8 … 0.9"], ["a [bold]figure[/bold]", "12.00", "1.0 … 1.1"]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stdout(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None) -> None:
    """Give the module another stdout: pytest's capture changes the real one."""
    monkeypatch.setattr(screen, "sys", types.SimpleNamespace(stdout=stream))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout(monkeypatch, Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def with_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of rich that pip brings: an environment of tests need not have one of its own."""
    for name in ("", ".box", ".console", ".table", ".text"):
        module = importlib.import_module(f"pip._vendor.rich{name}")
        monkeypatch.setitem(sys.modules, f"rich{name}", module)


def plain(lines: list[str]) -> list[str]:
    return [re.sub(r"\033\[[0-9;]*m", "", line) for line in lines]


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout(monkeypatch, io.StringIO())
    assert screen.columns() is None
    stdout(monkeypatch, None)
    assert screen.columns() is None


def test_a_terminal_has_one(terminal: None) -> None:
    assert screen.columns() == 60


def test_lines_are_folded_under_their_own_column() -> None:
    assert screen.fold("a b " * 20, "note: ") == ["note: " + "a b " * 20]
    lines = screen.pairs([("one", "word " * 20), ("three", "x")], 40)
    assert max(map(len, lines)) <= 40 and len(lines) == 5
    assert lines[0].startswith("one    word") and lines[1].startswith("       word")
    assert lines[-1] == "three  x"


def test_a_table_in_a_pipe_is_plain(with_rich: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout(monkeypatch, io.StringIO())
    assert screen.table(HEAD, ROWS) == [
        "                           A  95 % interval",
        "TPOT mean ms            3.13      0.8 … 0.9",
        "a [bold]figure[/bold]  12.00      1.0 … 1.1",
    ]


def test_a_table_without_rich_is_plain(terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert screen.table(HEAD, ROWS)[1] == "TPOT mean ms            3.13      0.8 … 0.9"


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_table_by_rich_fits(
    width: int, terminal: None, with_rich: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = plain(screen.table(HEAD, ROWS))
    assert max(map(len, lines)) <= width
    said = "".join("".join(lines).split())
    assert "[bold]" in said and "12.00" in said, "markup is text, and no figure is cut off"
    assert any(set(line.strip()) == {"─"} for line in lines), "it is rich's"


def test_no_color(terminal: None, with_rich: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\033\[[0-9;]*3[0-7]", "".join(screen.table(HEAD, ROWS)))


COMMANDS = [[name] for name in ("doctor", "ab", "bench", "recall")]
COMMANDS += [["bench", what] for what in WHAT]


def examples_in(shown: str) -> list[str]:
    _, _, under = shown.partition("\nexamples:\n")
    lines = [line.strip() for line in under.strip().splitlines()]
    assert len(lines) >= 2
    return lines


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_ends_with_examples_that_can_be_typed(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    lines = examples_in(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(cli.COMMANDS[command[0]][0])
    ran = []
    monkeypatch.setattr(module, "run", lambda arguments: ran.append(arguments) or 0)
    for line in lines:
        program, *given = shlex.split(line)
        assert program == "dsv4-plugin" and given[: len(command)] == command
        assert cli.main(given) == 0, capsys.readouterr().err
    assert len(ran) == len(lines)


def test_so_does_the_help_of_the_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        soak.main(["--help"])
    lines = examples_in(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(soak, "_run", lambda arguments: ran.append(arguments) or 0)
    for line in lines:
        start = "python -m benchmarks.soak "
        assert line.startswith(start)
        assert soak.main(shlex.split(line.removeprefix(start))) == 0, capsys.readouterr().err
    assert len(ran) == len(lines)
