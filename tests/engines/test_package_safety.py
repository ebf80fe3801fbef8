"""The package uses no network, no shell and no code from data, and writes no files of its own.

The tests read the source as a syntax tree. Then they run everything that serving needs under an
audit hook, which sees what a tree does not show.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.own_process import run_alone
from kits.packaging_tools import ROOT

PACKAGE = ROOT / "dsv4_plugin"
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_version.py")

NETWORK = {
    "aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "imaplib", "requests",
    "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "xmlrpc",
}  # fmt: skip
CODE_FROM_DATA = {"cloudpickle", "code", "codeop", "ctypes", "dill", "marshal", "pickle", "shelve"}
# Names whose call runs text, a shell, another program, or a compiler.
FORBIDDEN_CALLS = {
    "__import__", "eval", "exec", "execv", "execve", "execvp", "fork", "getoutput",
    "getstatusoutput", "load_inline", "popen", "posix_spawn", "spawnl", "spawnv", "system",
}  # fmt: skip
FORBIDDEN_DOTTED = {"torch.load", "torch.hub", "torch.compile", "torch.utils.cpp_extension"}
PROGRAMS = {"cli/doctor/releases.py": {"pip"}, "cli/checks/provenance.py": {"git", "nvidia-smi"}}
# `ab` starts servers that the user names: this folder alone may do that.
SERVERS = ("cli/ab/",)
# It asks them over HTTP, and so does `status`, by this one file.
ASK = (*SERVERS, "cli/shared/requests.py")
SERVER_NETWORK = {"http", "socket", "urllib"}
# Where the package writes files, and what names them.
WRITES = {
    "cli/doctor/releases.py": {"TemporaryDirectory", "mkdir", "extract", "touch"},  # --folder
    "status_file.py": {"mkdir", "write_text", "replace"},  # DSV4_STATUS_DIR
    "cli/ab/plot.py": {"savefig"},  # --plot
    "cli/ab/processes.py": {"mkdir", "open"},  # --out
    "cli/checks/results.py": {"unlink", "write_bytes"},  # --json, as it was before
    "cli/shared/outputs.py": {
        "mkdir",
        "open",
        "replace",
        "savefig",
        "unlink",
        "write_text",
    },  # --json, --out …
}
WRITERS = {
    "NamedTemporaryFile", "TemporaryDirectory", "copyfile", "copytree", "extract", "extractall",
    "makedirs", "mkdir", "mkdtemp", "mkstemp", "removedirs", "rename", "rmdir", "rmtree",
    "savefig", "symlink", "symlink_to", "touch", "truncate", "unlink", "write_bytes",
    "write_text",
}  # fmt: skip
DOTTED_WRITERS = {"os.remove", "os.replace", "torch.save"}
ENVIRONMENT = {
    "cli/doctor/report.py",
    "envs.py",
    "metrics.py",  # PROMETHEUS_MULTIPROC_DIR, read: which of its modes prometheus_client is in
    "engines/vllm/cli_option.py",  # what Ray copies into its actors
    "cli/ab/environment.py",  # what the servers and the client inherit
}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *reversed(parts)])


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(file: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, ast.Call))


@each_file
def test_no_network_and_no_code_from_data(file: Path) -> None:
    network = NETWORK - SERVER_NETWORK if name_of(file).startswith(ASK) else NETWORK
    found = [name for name in imports(file) if name.split(".")[0] in network | CODE_FROM_DATA]
    assert found == []
    for call in calls(file):
        name = dotted(call.func)
        assert name.split(".")[-1] not in FORBIDDEN_CALLS, f"line {call.lineno}: {name}"
        assert name != "compile", f"line {call.lineno}: the builtin"


@each_file
def test_no_compiler(file: Path) -> None:
    used = {dotted(n) for n in ast.walk(tree(file)) if isinstance(n, ast.Attribute)}
    used |= set(imports(file))
    assert not [n for n in used if any(f"{n}.".startswith(f"{b}.") for b in FORBIDDEN_DOTTED)]
    words = {
        n.value
        for n in ast.walk(tree(file))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    assert not words & {"nvcc", "gcc", "g++", "cc", "c++", "ninja", "make", "cmake"}


@each_file
def test_no_shell_and_known_programs_only(file: Path) -> None:
    runs = [name for name in imports(file) if name.split(".")[0] == "subprocess"]
    started = [c for c in calls(file) if dotted(c.func).startswith("subprocess.")]
    for call in started:  # never a shell, never a text: a list of arguments
        assert dotted(call.func) in ("subprocess.run", "subprocess.Popen")
        assert not [k for k in call.keywords if k.arg in ("shell", "executable", None)]
        assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)), "a string"
    if name_of(file).startswith(SERVERS):
        return
    if name_of(file) not in PROGRAMS:
        assert not runs and not started
        return
    assert started
    for call in started:
        assert dotted(call.func) == "subprocess.run"
        assert not [k for k in call.keywords if k.arg == "env"]
    text = file.read_text()
    assert all(f'"{program}"' in text for program in PROGRAMS[name_of(file)])


@each_file
def test_files_are_written_where_an_option_says(file: Path) -> None:
    found = set()
    for call in calls(file):
        last = dotted(call.func).split(".")[-1]
        if last == "open":
            modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
            modes += [k.value.value for k in call.keywords
                      if k.arg == "mode" and isinstance(k.value, ast.Constant)]  # fmt: skip
            if any(set(str(mode)) & set("wax+") for mode in modes):
                found.add("open")
        elif last in WRITERS or dotted(call.func) in DOTTED_WRITERS:
            found.add(last)
    assert found == WRITES.get(name_of(file), set())


@each_file
def test_the_environment_is_used_in_known_places(file: Path) -> None:
    uses = {dotted(n) for n in ast.walk(tree(file)) if isinstance(n, ast.Attribute)}
    touched = {n for n in uses if n.startswith(("os.environ", "os.getenv", "os.putenv"))}
    assert bool(touched) == (name_of(file) in ENVIRONMENT), touched


def test_every_list_names_files_that_exist() -> None:
    names = {name_of(file) for file in FILES}
    assert (set(PROGRAMS) | set(WRITES) | ENVIRONMENT) - names == set()


SERVING = """
import sys, os, tempfile
import torch, torch.library, torch._dynamo
try:
    import triton, tvm_ffi
except ImportError:
    pass
seen = []
def hook(event, arguments):
    if event.split(".")[0] in ("socket", "subprocess", "pickle", "ftplib", "urllib", "http"):
        seen.append((event, str(arguments)[:200]))
    elif event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "os.remove",
                   "os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"):
        seen.append((event, str(arguments)[:200]))
    elif event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append((event, str(path)))
sys.dont_write_bytecode = True
sys.addaudithook(hook)

import dsv4_plugin
from dsv4_plugin import gather_indexer_cache, read_indexer_cache, topk
from dsv4_plugin.engines import sglang, tokenspeed, vllm
for engine in (vllm, sglang, tokenspeed):
    engine.register()
tokenspeed.register_kernels()
cache = torch.zeros(4, 64 * 132, dtype=torch.uint8)
read_indexer_cache(cache, torch.tensor([1, -1]))
gather_indexer_cache(cache, torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 100]))
topk(torch.randn(3, 1000), torch.tensor([1000, 3, 0]), 512)
from dsv4_plugin import status
from dsv4_plugin.cli.doctor import report as doctor
status()
doctor.run(as_json=True)
print("SEEN", seen)
"""


def test_serving_opens_no_connection_starts_no_program_and_writes_no_file(tmp_path: Path) -> None:
    out = run_alone(SERVING, tmp_path, DSV4_PLUGIN="1", DSV4_LOG="debug")
    assert out.splitlines()[-1] == "SEEN []", out[-3000:]


def test_a_value_of_the_environment_is_never_run(tmp_path: Path) -> None:
    """A shell command in every variable: it is a wrong value, and is not executed."""
    mark = tmp_path / "ran"
    code = (
        "from dsv4_plugin import envs\nfrom dsv4_plugin.cli.doctor import report as doctor\n"
        "import os, sys\n"
        "for v in envs.VARIABLES: os.environ[v.name] = sys.argv[1] if sys.argv[1:] else VALUE\n"
        "from dsv4_plugin.engines import sglang, tokenspeed, vllm\n"
        "for engine in (vllm, sglang, tokenspeed): engine.register()\n"
        "assert doctor.run() == 2\n"
    ).replace("VALUE", repr(f"$(touch {mark}); `touch {mark}`; touch {mark}"))
    out = run_alone(code, tmp_path)
    assert "WRONG" in out and not mark.exists()


def test_no_file_carries_the_copyright_of_others() -> None:
    """The licence is in LICENSE and NOTICE; a header would mean foreign code."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py")]
    kinds = (".py", ".cu", ".cuh", ".h", ".sh", ".toml")
    mark = re.compile(r"SPDX-License|Copyright\s+(\(c\)|©|\d{4})|All rights reserved", re.I)
    own = Path(__file__).relative_to(ROOT).as_posix()
    found = [n for n in names if n.endswith(kinds) and n != own and (ROOT / n).is_file()
             and mark.search((ROOT / n).read_text(errors="replace"))]  # fmt: skip
    assert found == []
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_security_page_is_short_and_names_what_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(lines) <= 10
    for path in re.findall(r"`(tests/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for option in ("--json", "--plot", "--trace", "--folder"):
        assert f"`{option}`" in text
