"""``dsv4-plugin``: a mistake that the user can correct gives one line and exit code 2.

The fuzzer and the soak, two tools of a checkout, end in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.soak import command as soak
from dsv4_plugin import __version__
from dsv4_plugin.cli import main as cli
from tests.fuzz import command as fuzz

COMMANDS = {
    "bench": ["topk", "--device", "cpu", "--rows", "1", "--columns", "8192"],
    "recall": ["--k", "512", "--columns", "1024", "--rows", "1"],
}
TOOLS = {
    "tests.fuzz": (fuzz.main, ["--cases", "1"]),
    "benchmarks.soak": (soak.main, ["--minutes", "0.01"]),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # fuzz takes one


def run(name: str, *more: str, without: tuple[str, ...] = ()) -> int:
    """Run a command, or a tool, with its short arguments."""
    main, given = TOOLS.get(name) or (cli.main, [name, *COMMANDS[name]])
    return main([*(word for word in given if word not in without), *more])


def one_line(capsys: pytest.CaptureFixture[str], name: str) -> str:
    said = capsys.readouterr()
    prog = f"python -m {name}" if name in TOOLS else f"dsv4-plugin {name}"
    assert said.out == ""
    assert said.err.startswith(f"{prog}: ") and said.err.count("\n") == 1
    return said.err


def test_every_command_is_here() -> None:
    assert set(COMMANDS) | {"ab", "doctor", "status"} == set(cli.COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dsv4-plugin {__version__}\n"


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_a_results_file_that_cannot_be_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    assert run(command, "--json", str(folder / "x.json")) == 2
    said = one_line(capsys, command)
    assert f"--json cannot be written: there is no folder {folder}" in said


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_a_gpu_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--device", "cuda", without=("--device", "cpu")) == 2
    assert "no CUDA device here" in one_line(capsys, command)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("cudda", "DSV4_BACKEND is 'cudda'; it can be 'auto', 'cuda', 'triton', 'torch'"),
        ("cuda", "backend 'cuda' for topk cannot be met: the tensors are on cpu"),
    ],
)
def test_a_setting_that_cannot_be(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_BACKEND", value)
    assert cli.main(["recall", *COMMANDS["recall"]]) == 2
    assert said in capsys.readouterr().err


def test_reads_have_no_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "read", "--device", "cpu"]) == 2
    assert "unrecognized arguments: --device cpu" in one_line(capsys, "bench")


def test_a_dry_run_says_so_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--k", "512", "--dtype", "float32", "--rows", "1", "--columns", "8192"]
    assert cli.main(["bench", "topk", "--device", "cpu", *few]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[1] == lines[-1]
    assert lines[-1].startswith("A dry run on a CPU") and lines[-1].endswith("so none is shown.")


@pytest.mark.parametrize("what", ["topk", "logits", "chain", "candidates"])
def test_a_dry_run_shows_and_draws_no_times(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, drawn = tmp_path / "x.json", tmp_path / "x.svg"
    few = ["bench", what, "--device", "cpu", "--rows", "1", "--columns", "512"]
    assert cli.main([*few, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"dsv4\b.* (exact|right)", said)
    assert not re.search(
        r"\bus\b|µs|GB/s|TB/s|floor|best peer|\d\.\d\d", said.partition("\n")[2]
    ), said
    pytest.importorskip("matplotlib")
    assert cli.main([*few, "--plot", str(drawn)]) == 2
    assert cli.main(["bench", "plot", str(file), "--plot", str(drawn)]) == 2
    assert capsys.readouterr().err.count("a dry run on a CPU mean nothing") == 2
    assert not drawn.exists()
