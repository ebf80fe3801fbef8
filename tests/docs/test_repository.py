"""The whole tree: no file contains a path of a machine, and the documents match the code."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT

TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".cu",
    ".cuh",
    ".h",
    ".sh",
    ".map",
    ".in",
    ".jsonl",
    "",
}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split() if done.returncode == 0 else []
    files = [ROOT / n for n in names] or [p for p in ROOT.rglob("*") if ".venv" not in str(p)]
    return [p for p in files if p.is_file() and p.suffix in TEXT]


def test_no_path_of_one_machine_is_committed() -> None:
    # A leading slash and a folder that people keep their work in; /usr and /dev are everybody's.
    pattern = re.compile(r"(?<![\w.$}/])/(work|root|home|Users|tmp/[a-z])[/\w]*")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert found == []


def test_the_package_says_where_each_new_tensor_lives() -> None:
    """An engine makes the GPU the default device while it builds its model."""
    makers = {"arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"}
    package = ROOT / "dsv4_plugin"
    silent = []
    for path in sorted(package.rglob("*.py")):
        if package / "cli" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr) in {("torch", m) for m in makers}
                and "device" not in {keyword.arg for keyword in node.keywords}
            ):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr}")
    assert silent == []


def readme() -> str:
    return (ROOT / "README.md").read_text()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_of_the_documents_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    used = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", "\n".join(code_of(text))))
    assert used, f"{document} shows no make command"
    assert used - make_targets() == set()


def code_of(markdown: str) -> list[str]:
    """The code blocks and the code spans of a Markdown text."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", markdown, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))
    return blocks + spans


def test_the_readme_has_the_two_commands_of_a_newcomer() -> None:
    code = "\n".join(code_of(readme()))
    assert "make demo" in code and "make test" in code


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("make lint", "make test", "make demo"):
        assert re.search(rf"^{command}\b", script, re.M), command


def test_make_shows_every_target() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = set(re.findall(r"^\s+make ([a-z-]+)", done.stdout, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony and shown == set(phony[1].split()) - {"engines-env", "vllm-env"}
