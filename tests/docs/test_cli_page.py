"""The page "Command line" describes exactly the existing commands and options."""

from __future__ import annotations

import argparse
import importlib
import re

import pytest
from kits.packaging_tools import ROOT

from dsv4_plugin.cli.bench import command as bench
from dsv4_plugin.cli.main import COMMANDS

PAGE = (ROOT / "docs" / "cli.md").read_text()
HEAD, *PARTS = re.split(r"^## ", PAGE, flags=re.M)
SECTIONS = {part.partition("\n")[0]: part for part in PARTS}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a command and of its own commands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options, action.choices.values()))
    return found


def test_every_command_has_a_section_and_a_row() -> None:
    assert list(SECTIONS) == re.findall(r"^\| \[`(\w+)`\]\(#\1\) ", HEAD, re.M)
    assert set(SECTIONS) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_section_has_an_example_and_options_that_exist(command: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    section = SECTIONS[command]
    assert re.search(rf"^```\ndsv4-plugin {command}\b", section, re.M)
    lines = [line.partition(" -- ")[0] for line in section.splitlines()]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(lines)))
    assert named and named <= options(parser)


def test_bench_has_a_row_for_each_thing_it_times() -> None:
    shown = re.findall(r"^\| `bench (\w+)", SECTIONS["bench"], re.M)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(shown) == set(action.choices)
