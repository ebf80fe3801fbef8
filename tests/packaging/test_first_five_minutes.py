"""docs/first_five_minutes.md typed in by a newcomer, and the commands of README and CONTRIBUTING.

The environment is fresh, has this one's torch (linked, not downloaded again) and no nvcc on PATH;
the source is a clean copy of the tracked files.
"""

from __future__ import annotations

import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from kits import newcomer
from kits.packaging_tools import ROOT, check, without_nvcc

from dsv4_plugin import envs
from dsv4_plugin.cli import main as cli

PAGE = (ROOT / "docs" / "first_five_minutes.md").read_text()
README = (ROOT / "README.md").read_text()
STEPS = newcomer.console(PAGE)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = list(dict.fromkeys([*newcomer.shell(README), *newcomer.shell(CONTRIBUTING)]))


@pytest.fixture(scope="module")
def checkout(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of its own: building leaves files in it."""
    target = tmp_path_factory.mktemp("newcomer") / "dsv4"
    check(["cp", "-r", tree, target], tree)
    return target


@pytest.fixture(scope="module")
def typed(checkout: Path) -> list[tuple[int, str]]:
    environment = newcomer.fresh(checkout.parent)
    env = without_nvcc() | {"CUDA_VISIBLE_DEVICES": ""}
    return newcomer.type_in(STEPS, environment, checkout, env)


def differs(shown: str, said: str) -> str:
    """Where the output is not the page's, ``...`` standing for anything; empty if it is."""
    example, checker = doctest.Example("", shown), doctest.OutputChecker()
    # Between the last line of a command and the next one an empty line is for the eye.
    if checker.check_output(shown, said.rstrip("\n") + "\n", doctest.ELLIPSIS):
        return ""
    return checker.output_difference(example, said, doctest.ELLIPSIS | doctest.REPORT_NDIFF)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=lambda n: STEPS[n].command[:40])
def test_a_command_prints_what_the_page_shows(number: int, typed: list[tuple[int, str]]) -> None:
    step, (_, said) = STEPS[number], typed[number]
    wrong = differs(step.shown.rstrip("\n") + "\n", said)
    assert not wrong, f"docs/first_five_minutes.md:{step.line}: $ {step.command}\n{wrong}"


def test_no_command_fails_without_the_page_saying_so(typed: list[tuple[int, str]]) -> None:
    for number, (step, (code, _)) in enumerate(zip(STEPS, typed, strict=True)):
        following = [later.command for later in STEPS[number + 1 : number + 2]]
        assert code == 0 or following == ["echo $?"], f"{step.command} ended with {code}"


def test_the_transcript_leaves_what_the_page_asks_for(
    typed: list[tuple[int, str]], checkout: Path, tree: Path
) -> None:
    new = {p.name for p in checkout.iterdir()} - {p.name for p in tree.iterdir()}
    assert new - {"build", "dsv4_plugin.egg-info"} == {"recall.json", "topk.json"}
    for name in ("recall.json", "topk.json"):
        assert json.loads((checkout / name).read_text())["machine"]["torch"]


@pytest.mark.parametrize(
    "damage", ["4 cells; answers only", "written to recall.json", "$ echo $?\n1"]
)
def test_a_page_that_is_wrong_is_noticed(damage: str, typed: list[tuple[int, str]]) -> None:
    assert damage in PAGE
    steps = newcomer.console(PAGE.replace(damage, damage[:-1] + "9"))
    pairs = zip(steps, typed, strict=True)
    found = [s.command for s, (_, said) in pairs if differs(s.shown.rstrip("\n") + "\n", said)]
    assert len(found) == 1


def test_the_page_is_linked_from_the_readme() -> None:
    assert "(docs/first_five_minutes.md)" in README


# What becomes of a command of the two pages here. Each pattern must fit one command at least, each
# command exactly one pattern.
IN_THE_TRANSCRIPT = [r"(DSV4_BUILD_CUDA=1 )?pip install \.", r"dsv4-plugin doctor"]
SMALLER_IN_THE_TRANSCRIPT = [r"dsv4-plugin (recall|bench) .*"]  # minutes, not seconds
A_TOOL_OF_THE_CHECKOUT = [r"python -m (tests\.fuzz|benchmarks\.soak) .*"]  # minutes, not seconds
A_STEP_OF_CI = [r"make (demo|env|test|lint|docs|check-site)", r"dsv4-plugin doctor --engines"]
NEEDS_AN_ENGINE_AND_A_GPU = [r"(\w+=\S+ )*(vllm|sglang|tokenspeed) serve .*"]
NEEDS_AN_ENGINE_BUT_HAS_A_DRY_RUN = [r"dsv4-plugin ab .*"]
NEEDS_A_GPU = [r"make test-gpu"]
KINDS = (
    IN_THE_TRANSCRIPT
    + SMALLER_IN_THE_TRANSCRIPT
    + A_TOOL_OF_THE_CHECKOUT
    + A_STEP_OF_CI
    + NEEDS_AN_ENGINE_AND_A_GPU
    + NEEDS_AN_ENGINE_BUT_HAS_A_DRY_RUN
    + NEEDS_A_GPU
)


def of(*kinds: str) -> list[str]:
    return [c for c in COMMANDS if any(re.fullmatch(kind, c) for kind in kinds)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_of_one_kind(command: str) -> None:
    assert sum(bool(re.fullmatch(kind, command)) for kind in KINDS) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_left_over(kind: str) -> None:
    assert of(kind)


@pytest.mark.parametrize("command", of(*IN_THE_TRANSCRIPT))
def test_it_is_in_the_transcript(command: str) -> None:
    # The transcript is of a machine without nvcc.
    assert command.removeprefix("DSV4_BUILD_CUDA=1 ") in [step.command for step in STEPS]


@pytest.mark.parametrize("command", of(*SMALLER_IN_THE_TRANSCRIPT))
def test_it_is_in_the_transcript_smaller_and_its_options_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = command.split(" --")[0]
    assert [step for step in STEPS if step.command.startswith(start)]
    with pytest.raises(SystemExit) as end:
        cli.main([*shlex.split(start)[1:], "--help"])
    assert end.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[\w-]+", command)) <= known


@pytest.mark.parametrize("command", of(*A_TOOL_OF_THE_CHECKOUT))
def test_it_runs_in_a_checkout_with_little_time(command: str, tree: Path) -> None:
    words = re.sub(r"--minutes \S+", "--minutes 0.02", command).split()
    assert words != command.split()
    python = [sys.executable, *words[1:], "--device", "cpu"]
    said = check(python, tree, {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}).stdout
    assert "0 failures; " in said or ", 0 faults" in said


@pytest.mark.parametrize("command", of(*A_STEP_OF_CI))
def test_ci_types_it(command: str) -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(rf"^(\.venv/bin/)?{command}\b", script, re.M)


@pytest.mark.parametrize("command", of(*NEEDS_AN_ENGINE_BUT_HAS_A_DRY_RUN))
def test_its_dry_run_starts_nothing_and_accepts_it(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before, dashes, engines = command.partition(" -- ")
    argv = [*shlex.split(before)[1:], "--dry-run", *dashes.split(), *engines.split()]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "A: DSV4_PLUGIN=0 " in said and "B: DSV4_PLUGIN=1 " in said and engines in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", of(*NEEDS_AN_ENGINE_AND_A_GPU))
def test_what_it_says_to_the_engine_exists(command: str) -> None:
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.match(r"DSV4_\w+=", word))
    envs.parse(settings)  # raises for a value that cannot be
    assert settings.keys() <= {variable.name for variable in envs.VARIABLES}
    # tests/engines/vllm and tests/engines/sglang have them beside the engines' own parsers.
    adapters = "".join(p.read_text() for p in (ROOT / "dsv4_plugin/engines").rglob("*.py"))
    options = re.findall(r"--plugin\b|--[\w.-]*dsv4[\w.-]*", command)
    assert [option for option in options if f'"{option}' not in adapters] == []


@pytest.mark.parametrize("command", of(*NEEDS_A_GPU))
def test_make_knows_it(command: str) -> None:
    check([*command.split(), "--dry-run", "PY=python3"], ROOT)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.sh")), ids=lambda p: p.name)
def test_a_script_of_the_examples_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
