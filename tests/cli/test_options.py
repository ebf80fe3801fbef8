"""The readers that all command lines share: numbers, files to write, options that run no work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.engines import command as engines
from benchmarks.server import command as e2e
from benchmarks.server import drills, trace
from benchmarks.soak import command as soak
from benchmarks.tool import MINUTES
from benchmarks.tuning import sweep
from dsv4_plugin.cli import main as cli
from dsv4_plugin.cli.checks.results import Results
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import Parser, UsageError
from tests.fuzz import command as fuzz

BAD_COUNTS = ("0", "-1", "nan", "inf", "1.5", "", "x", "1_000", "٣", "0x10", "9" * 40, "9" * 5000)
BAD_TIMES = ("0", "-1", "nan", "inf", "-inf", "1e400", "", "x", "1_0", "٣")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("text", BAD_COUNTS)
def test_what_is_no_count(text: str) -> None:
    for reader in (numbers.COUNT, numbers.LENGTH, numbers.PORT):
        with pytest.raises(UsageError, match="must be a whole number"):
            reader(text)


@pytest.mark.parametrize("text", BAD_TIMES)
def test_what_is_no_time(text: str) -> None:
    for reader in (MINUTES, numbers.SECONDS):
        with pytest.raises(UsageError, match="must be a number above 0"):
            reader(text)


def test_numbers_are_read() -> None:
    assert [numbers.COUNT(t) for t in ("1", "+7", " 2147483647 ")] == [1, 7, 2147483647]
    assert [numbers.LENGTH(t) for t in ("5", "64k", "1M")] == [5, 65_536, 1 << 20]
    assert numbers.SEED("0") == 0 and numbers.BUDGET("0") == 0.0
    assert MINUTES("0.5") == 0.5 and numbers.SECONDS("1e3") == 1000.0


# Every option with a number: the command line up to it.
COUNTS = {
    "bench": ["bench topk --device cpu " + option for option in
              ("--k", "--rows", "--columns", "--launches", "--replays")],
    "recall": ["recall --k", "recall --rows", "recall --columns"],
    "fuzz": ["fuzz --cases"],
    "ab": ["ab --model m " + option for option in
           ("--port", "--pairs", "--runs", "--warmup-prompts", "--workers")],
}  # fmt: skip
TIMES = ["bench topk --budget", "fuzz --minutes", "soak --minutes", "ab --start-timeout",
         "ab --run-timeout"]  # fmt: skip
SEEDS = ["fuzz --seed", "recall --seed", "soak --seed", "ab --seed"]


def main(arguments: list[str]) -> int:
    """Run a command, or one of the two tools whose options are those of a command."""
    name, *given = arguments
    tool = {"fuzz": fuzz.main, "soak": soak.main}.get(name)
    return tool(given) if tool else cli.main(arguments)


def refused(line: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line.split(), value]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{line.split()[-1]} must be a " in said.err and repr(value) in said.err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "2.5", "99999999999999999999"])
@pytest.mark.parametrize("line", [line for lines in COUNTS.values() for line in lines])
def test_a_wrong_count_is_refused(
    line: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(line, value, capsys)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
@pytest.mark.parametrize("line", TIMES)
def test_a_wrong_time_is_refused(line: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(line, value, capsys)


@pytest.mark.parametrize("value", ["-1", "nan", "1.5", "99999999999999999999"])
@pytest.mark.parametrize("line", SEEDS)
def test_a_wrong_seed_is_refused(line: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(line, value, capsys)


@pytest.mark.parametrize("parser", [tool.parser() for tool in (e2e, drills, engines, fuzz, soak)])
def test_the_tools_read_numbers_with_the_same_readers(parser: Parser) -> None:
    """argparse's own int and float take NaN, -1 and infinity."""
    for action in parser._actions:
        assert action.type not in (int, float), action.option_strings


def test_a_tool_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for start, arguments in (
        (sweep.main, ["--rows", "0"]), (trace.main, ["x", "--layers", "-1"]),
        (drills.main, ["--at-once", "0"]), (e2e.main, ["--pairs", "nan"]),
        (engines.main, ["--shapes", "0x5"]), (engines.main, ["--shapes", "5"]),
    ):  # fmt: skip
        assert start(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "must be a whole number" in said


# ---- Runs that check nothing ---------------------------------------------------------------------

NOTHING = [
    "fuzz --device cpu --minutes 1e-9",
    "soak --device cpu --minutes 1e-9",
    "recall --device cpu --rows 2 --columns 16 --k 512",
    "bench topk --device cpu --suite adversarial --rows 5 --columns 64",
]


@pytest.mark.parametrize("line", NOTHING)
def test_a_run_that_did_nothing_is_no_success(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    assert main([*line.split(), "--json", str(file)]) == 2
    assert "nothing was" in capsys.readouterr().err
    assert not file.exists() or json.loads(file.read_text())["complete"] is False


# ---- Files to write ------------------------------------------------------------------------------

WRITERS = {
    "bench topk": ["bench", "topk", "--device", "cpu"],
    "recall": ["recall", "--device", "cpu"],
    "fuzz": ["fuzz", "--device", "cpu"],
    "soak": ["soak", "--device", "cpu"],
}


def unwritable(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("x")
    return {
        "is a folder": folder,
        "there is no folder": folder / "none" / "x.json",
        "No space left": Path("/dev/full"),
        "No such file": Path("/proc/x.json"),
        "too long": folder / ("x" * 300),
        "there is no folder " + str(folder / "file"): folder / "file" / "x.json",
    }


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
def test_what_cannot_be_written_is_refused_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for said, file in unwritable(tmp_path).items():
        assert main([*command, "--json", str(file)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and "--json cannot be written" in shown.err and said in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "trying leaves nothing"


PLOTTERS = {
    "bench topk": ["bench", "topk", "--device", "cpu"],
    "bench logits": ["bench", "logits", "--device", "cpu"],
    "bench read": ["bench", "read"],
    "bench plot": ["bench", "plot", "x.json"],
    "recall": ["recall", "--device", "cpu"],
    "ab": ["ab", "--model", "m", "--out", "OUT"],
}


@pytest.mark.parametrize("command", PLOTTERS.values(), ids=PLOTTERS)
@pytest.mark.parametrize("name", ["x.xyz", "x", "none/x.svg", "."])
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    assert cli.main([*given, "--plot", str(tmp_path / name)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "--plot " in shown.err and list(tmp_path.iterdir()) == []


def test_other_outputs_are_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for command, said in (
        (["fuzz", "--device", "cpu", "--trace", str(tmp_path)], "--trace cannot be written"),
        (["doctor", "--engines", "vllm", "--folder", str(tmp_path / "file")], "is no folder"),
        (["doctor", "--engines", "vllm", "--folder", "/proc/none"], "cannot be used"),
        (["ab", "--model", "m", "--out", str(tmp_path / "file" / "x")], "--out cannot be used"),
        (["ab", "--model", "m", f"--client-command={sys.executable}", "--out", "/proc/none"],
             "cannot be used"),
    ):  # fmt: skip
        assert main(command) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and said in shown.err


def test_a_file_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.svg"
    same = str(tmp_path / "." / "x.svg")
    for command in (
        ["recall", "--json", str(file), "--plot", same],
        ["fuzz", "--json", str(file), "--trace", same],
        ["bench", "plot", str(file), "--plot", same],
    ):
        assert main(command) == 2
        assert "is named twice" in capsys.readouterr().err


def test_a_refused_run_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("of an earlier run")
    assert cli.main(["bench", "topk", "--device", "cpu", "--suite", "next_n",
                     "--json", str(file)]) == 2  # fmt: skip
    assert file.read_text() == "of an earlier run"


def test_a_results_file_is_whole_at_any_moment(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    document = {"what": "x", "results": [{"a": 1}]}
    with pytest.raises(ZeroDivisionError), Results(document, file) as results:
        assert json.loads(file.read_text()) == {"what": "x", "complete": False,
                                                "results": [{"a": 1}]}  # fmt: skip
        document["results"].append({"a": 2})  # type: ignore[attr-defined]
        results.save(now=True)
        assert len(json.loads(file.read_text())["results"]) == 2
        document["more"] = 1
        _ = 1 / 0
    assert json.loads(file.read_text())["more"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_device_is_never_replaced_and_a_link_is_followed(tmp_path: Path) -> None:
    outputs.write(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    outputs.file(str(link))
    assert link.is_symlink() and not target.exists(), "trying leaves nothing"
    outputs.write(link, "x")
    assert link.is_symlink() and target.read_text() == "x"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert outputs.is_stream(pipe)
