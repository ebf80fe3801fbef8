"""benchmarks/README.md: every results file has its two commands, and today's parsers take them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.marked import between
from kits.packaging_tools import ROOT

from benchmarks.tuning import aside
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.cli.main import COMMANDS
from dsv4_plugin.cli.shared.run import Parser, UsageError

PAGE = ROOT / "benchmarks" / "README.md"
FILES = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))
# Editable, with the kernels compiled in place: `python -m` imports the checkout's own package.
INSTALL = re.compile(
    r'DSV4_BUILD_CUDA=[01] pip install -e (?:"\.\[bench\]"|\.)( "[a-z]+==[\d.]+")?'
)
# An engine's release that has an adapter, by what --against calls it, too.
ENGINES = ("vllm", "sglang", "tokenspeed")


def commands() -> dict[str, list[tuple[str, str]]]:
    """File -> its pairs of commands."""
    block = re.sub(r" *\\\n *", " ", between(PAGE, "repeat").strip().strip("`"))
    found = {}
    for part in re.split(r"^# ", block, flags=re.M)[1:]:
        name, *lines = part.strip().splitlines()
        assert len(lines) % 2 == 0, f"{name}: {len(lines)} commands"
        found[name] = list(zip(lines[::2], lines[1::2], strict=True))
    return found


def test_every_file_has_commands_and_a_row() -> None:
    assert sorted(commands()) == FILES
    table = PAGE.read_text().partition("\nEach file holds")[0]
    assert sorted(re.findall(r"`(\w+\.json)`", table.partition("| file |")[2])) == FILES


def parsed(command: str) -> Iterator[argparse.Namespace]:
    """Parse all of a command line that is joined by ``&&``; what a parser refuses is an error."""
    for one in command.split(" && "):
        words = shlex.split(one)
        if words[:2] == ["python", "-m"]:
            name = words[2]
            alone = (
                "benchmarks.prefill_chunks",
                "benchmarks.server.drills",
                "benchmarks.server.modes",
                "benchmarks.tuning.aside",
            )
            where = name if name in alone else f"{name}.command"
            yield importlib.import_module(where).parser().parse_args(words[3:])
        elif words[0] == "dsv4-plugin":
            parser = Parser()
            importlib.import_module(COMMANDS[words[1]][0]).add_arguments(parser)
            at = words.index("--") if "--" in words else None
            yield parser.parse_args(words[2:at])
        elif words[1].startswith("benchmarks/"):
            text = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in text for word in words if word.startswith("--"))
            yield argparse.Namespace(json=Path(words[words.index("--json") + 1]))
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), one


@pytest.mark.parametrize("name", FILES)
def test_the_commands_of_a_file_are_those_of_today(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for first, second in commands()[name]:
        if name == "h200_gpu_suite.json":
            assert (first, second) == ("make env", f"make test-gpu RESULTS={name}")
            continue
        installed = INSTALL.fullmatch(first)
        assert installed, first
        (measured,) = parsed(second)
        file = getattr(measured, "json", None) or measured.out.with_suffix(".json")  # ab
        assert file == Path(name)
        engine = (installed[1] or "").strip(' "').partition("==")[0]
        against = [word for word in getattr(measured, "against", []) if word in ENGINES]
        assert against in ([engine], []) and getattr(measured, "peers", None) is None
        if "benchmarks.tuning.aside" in second:
            assert {call.partition(".")[0] for call in measured.call} == {engine}
        if "python -m benchmarks.engines" in second:
            assert measured.engine == [engine]


def test_beside_a_call_is_the_installed_engine_or_what_the_file_has() -> None:
    def none() -> None:
        raise AssertionError("it is not called")

    installed = Peers(decode={"vllm 0.33.0": none, "sglang 0.5.23 v2": none}, paged={"x": none})
    assert aside._peer("vllm.decode", installed) == "vllm 0.33.0"
    assert aside._peer("sglang.dsa", installed) == "sglang_v2_paged"  # which is named as missing
    with_file = Peers(decode={"vllm 0.33.0": none, "vllm33": none})
    assert aside._peer("vllm.decode", with_file) == "vllm33"


def test_a_command_that_is_refused_is_noticed() -> None:
    with pytest.raises(UsageError, match="--gone"):
        list(parsed("dsv4-plugin bench topk --suit decode --json x.json --gone"))
    with pytest.raises(UsageError, match="--json"):
        list(parsed("python examples/make_tiny_v4.py M && python -m benchmarks.server --model M"))


@pytest.mark.parametrize("script", ["make_tiny_v4.py", "make_tiny_v41.py"])
def test_the_models_are_made_by_options_that_exist(script: str) -> None:
    used = re.findall(rf"examples/{script} MODEL (--[\w-]+)", str(commands()))
    text = (ROOT / "examples" / script).read_text()
    text += (ROOT / "examples" / "tiny_model.py").read_text()
    assert used and all(f'"{option}"' in text for option in set(used))
