"""Every path, module and command that a page names exists in the repository."""

from __future__ import annotations

import fnmatch
import functools
import re
import subprocess
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT

from dsv4_plugin.cli.main import COMMANDS

PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("benchmarks", "csrc", "docs", "dsv4_plugin", "examples", "tests", ".ci")
MADE = {"dsv4_plugin/_C.so"}  # by the build
# Below a folder of the repository, or a source file by its name alone.
PATH = re.compile(
    rf"(?<![\w/.<>-])(?:(?:{'|'.join(map(re.escape, FOLDERS))})/[\w.<>*{{}},/-]*[\w>}}*]"
    r"|(?:[\w<>*]+/)*[\w<>*]+\.(?:cuh|cu|py|sh)\b)(?!\()"
)
MODULE = re.compile(r"\bpython -m ((?:benchmarks|dsv4_plugin|tests)[\w.]*)")
COMMAND = re.compile(r"(?:^|`|&& |\$ )dsv4-plugin ([a-z]+)\b", re.M)


@functools.cache
def known() -> frozenset[str]:
    """All files and folders of the repository, by their full paths and by every end of these."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split() if done.returncode == 0 else []
    if not names:  # a copy without git
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file()]
    paths = {*names, *(parent.as_posix() for name in names for parent in Path(name).parents)}
    return frozenset("/".join(p.split("/")[i:]) for p in paths for i in range(p.count("/") + 1))


def missing(text: str) -> list[str]:
    """Return the paths of a text that do not exist. ``<x>`` and ``*`` stand for anything."""
    found = set(PATH.findall(text.replace("../", "")))
    return sorted(path for path in found if not all(map(exists, expanded(path))))


def expanded(path: str) -> list[str]:
    """Expand ``a/{b,c}``."""
    brace = re.search(r"\{([^{}]*)\}", path)
    if brace is None:
        return [path]
    parts = [path[: brace.start()] + part + path[brace.end() :] for part in brace[1].split(",")]
    return [one for part in parts for one in expanded(part)]


def exists(path: str) -> bool:
    path = path.rstrip("/.")
    if path in known() or path in MADE:
        return True
    if Path(path).stem.isupper():  # FILE.py: the reader's own
        return True
    pattern = re.sub(r"<[^>]*>", "*", path)
    return "*" in pattern and any(fnmatch.fnmatchcase(name, pattern) for name in known())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_path_of_a_page_exists(page: Path) -> None:
    text = page.read_text().replace("--peers peers.py", "")  # the reader's own
    assert missing(text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_module_and_command_of_a_page_exists(page: Path) -> None:
    text = page.read_text()
    for name in MODULE.findall(text):
        path = name.rstrip(".").replace(".", "/")
        assert {f"{path}.py", f"{path}/__main__.py"} & known(), name
    assert set(COMMAND.findall(text)) <= set(COMMANDS)


def test_a_path_that_is_gone_is_noticed() -> None:
    gone = ["csrc/gone.cuh", "csrc/{bindings,gone}", "dsv4_plugin/gone.py", "gone.py", "tests/gone"]
    text = "".join(f"[x](../{path}) and `{path}`, " for path in gone)
    assert missing(text) == gone
    text = "`csrc/{bindings,include}/`, `probe.py`, `engines/<engine>/probe.py`, `reference*.py`"
    assert missing(text) == []
