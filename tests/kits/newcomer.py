"""The console blocks of a page, and a fresh environment that runs them."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MARK = "\x1e"  # between what one command says and the next


@dataclass(frozen=True)
class Step:
    """A command, the output that the page shows, and the line of the command."""

    command: str
    shown: str
    line: int


def console(page: str) -> list[Step]:
    """Return the commands of the ```console blocks: ``$ command``, then what it prints."""
    steps: list[Step] = []
    for block in re.finditer(r"^```console\n(.*?)^```", page, re.M | re.S):
        line = page[: block.start()].count("\n") + 2
        for part in filter(None, re.split(r"^(?=\$ )", block[1], flags=re.M)):
            command, _, shown = part.partition("\n")
            assert command.startswith("$ "), f"line {line}: a console block begins with a command"
            steps.append(Step(command[2:], shown, line))
            line += part.count("\n")
    return steps


def shell(markdown: str) -> list[str]:
    """Return the commands of the ``` blocks without a language: comments off, lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.M | re.S)
    text = "".join(body for language, body in blocks if not language)
    lines = text.replace("\\\n", " ").splitlines()
    commands = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    return [command for command in commands if command]


def fresh(folder: Path) -> Path:
    """Make a virtual environment that has pip and this environment's torch, and nothing else.

    The files of torch and of its requirements are linked and not downloaded again.
    """
    venv.create(folder / "venv", with_pip=True)
    lent = folder / "lent"
    lent.mkdir()
    for distribution in closure("torch"):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (lent / top).is_symlink():
                (lent / top).symlink_to(target)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (site / "lent_torch.pth").write_text(f"{lent}\n")
    return folder / "venv"


def closure(name: str) -> Iterator[metadata.Distribution]:
    """Yield a distribution and all it requires that is installed, extras left out."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen or name in ("pip", "dsv4-plugin"):
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        yield distribution
        todo += [
            match[0]
            for requirement in distribution.requires or ()
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement))
        ]


def type_in(
    steps: list[Step], environment: Path, folder: Path, env: dict[str, str]
) -> list[tuple[int, str]]:
    """Run the commands in one bash, in ``folder``; return exit code and output of each."""
    lines = ["exec 2>&1"]
    for step in steps:
        # The exit code is kept, so that the page can show `echo $?`.
        lines += [step.command, f"rc=$?; printf '{MARK}%s{MARK}' $rc; (exit $rc)"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "PYTHON"))}
    kept |= env | {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    kept["PATH"] = f"{environment / 'bin'}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=kept,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    parts = done.stdout.split(MARK)
    assert len(parts) == 2 * len(steps) + 1, f"the shell ended early:\n{done.stdout[-4000:]}"
    return [(int(code), said) for said, code in zip(parts[:-1:2], parts[1::2], strict=True)]
