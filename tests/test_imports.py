"""The imports between folders go in one direction, without a circle, inside functions too."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT

PACKAGE = ROOT / "dsv4_plugin"

# A room may import the rooms before it in this list, and itself; what is not listed is an error.
# The longest name that fits a module is its room.
ROOMS = [
    "dsv4_plugin._version",
    "dsv4_plugin.version",
    "dsv4_plugin.errors",
    "dsv4_plugin.envs",
    "dsv4_plugin.log",
    "dsv4_plugin.processes",
    "dsv4_plugin.metrics",
    "dsv4_plugin.status_file",
    "dsv4_plugin.state",
    "dsv4_plugin.kernels",
    "dsv4_plugin.ops",
    "dsv4_plugin",  # the public names
    "dsv4_plugin.facts",
    "dsv4_plugin.engines.shared",
    "dsv4_plugin.engines.vllm",
    "dsv4_plugin.engines.sglang",
    "dsv4_plugin.engines.tokenspeed",
    "dsv4_plugin.engines",  # what looks at the three from outside
    "dsv4_plugin.cli.shared",  # options, outputs and the one end of every command
    "dsv4_plugin.cli.checks",  # inputs, oracles, timing, results: what commands measure with
    "dsv4_plugin.cli.plots",
    "dsv4_plugin.cli.doctor",
    "dsv4_plugin.cli.ab",
    "dsv4_plugin.cli.bench",
    "dsv4_plugin.cli.recall",
    "dsv4_plugin.cli",  # the command line, which knows them by name
    "dsv4_plugin.__main__",
]
# Rooms side by side: the engines do not import each other, nor do the commands.
APART = (
    {f"dsv4_plugin.engines.{engine}" for engine in ("vllm", "sglang", "tokenspeed")},
    {f"dsv4_plugin.cli.{name}" for name in ("doctor", "ab", "bench", "recall")},
)
# Heavy modules that a command loads only when it runs.
HEAVY = {"torch", "triton", "numpy", "matplotlib", "tvm_ffi", "vllm", "sglang", "tokenspeed"}


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    fitting = [r for r in ROOMS if module == r or module.startswith(r + ".")]
    room = max(fitting, key=len)
    # The package's own room is its __init__ alone.
    assert room != "dsv4_plugin" or module == room, f"{module} has no room"
    return room


def imports(module: str) -> Iterator[tuple[int, str]]:
    """The modules of the package that a module imports, with the line."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if inner in MODULES else str(node.module))
        for name in names:
            if name.split(".")[0] in ("dsv4_plugin", "benchmarks", "kits", "tests"):
                yield node.lineno, name


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_comes_before_it(module: str) -> None:
    room, wrong = room_of(module), []
    for line, name in imports(module):
        if name not in MODULES and name != "dsv4_plugin._version":
            wrong.append(f"line {line}: {name} is not of the package")
            continue
        other = room_of(name)
        later = ROOMS.index(other) > ROOMS.index(room)
        if later or (other != room and any({other, room} <= apart for apart in APART)):
            wrong.append(f"line {line}: {name} belongs to {other}")
    assert wrong == []


def test_no_circle() -> None:
    graph = {m: {name for _, name in imports(m) if name in MODULES and name != m} for m in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


# Names of the command line that only the drivers use, and why they are in the package.
ONLY_DRIVERS = {"dsv4_plugin.cli.shared.run": {"held"}}  # it needs the signal handler of this file


@functools.cache
def uses() -> list[tuple[str, set[str], set[str], set[str], set[str]]]:
    """Of every module: its name, the names that it reads, its imports, attributes and strings."""
    found = []
    for module, file in MODULES.items():
        nodes = list(ast.walk(ast.parse(file.read_text())))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        found.append((
            module,
            {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)},
            {f"{node.module}.{alias.name}" for node in froms for alias in node.names},
            {node.attr for node in nodes if isinstance(node, ast.Attribute)},
            {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)},
        ))  # fmt: skip
    return found


def is_used(module: str, name: str) -> bool:
    """Whether the package uses a name: in its module, imported, or as ``module.name``."""
    return any(
        (other == module and name in read)
        or f"{module}.{name}" in imported
        # As a string: what is loaded when it is needed.
        or (other != module and name in attributes and (module in imported or module in strings))
        for other, read, imported, attributes, strings in uses()
    )


def exported_by(module: str) -> set[str]:
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_what_a_command_exports_is_used_in_the_package() -> None:
    """What only tests and drivers use belongs to tests/kits or benchmarks."""
    commands = [module for module in MODULES if room_of(module).startswith("dsv4_plugin.cli")]
    unused = {
        module: left
        for module in commands
        if (left := {name for name in exported_by(module) if not is_used(module, name)})
    }
    assert unused == ONLY_DRIVERS


def private_names(module: str) -> set[str]:
    """The functions, classes and constants of a module that are its own."""
    found: set[str] = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_a_private_name_is_used_in_its_module() -> None:
    unused = {module: left for module, read, *_ in uses() if (left := private_names(module) - read)}
    assert unused == {}


WALKS = {  # of CONTRIBUTING.md
    "a logits tensor": [
        "engines.vllm.install", "engines.vllm.wrappers", "engines.shared.fallback", "ops.topk",
        "ops.dispatch", "kernels.cuda",
    ],
    "DSV4_TOPK": [
        "engines.vllm.policy", "engines.shared.logits", "engines.shared.decision", "ops.dispatch",
        "envs",
    ],
    "bench topk": [
        "cli.main", "cli.bench.command", "cli.bench.topk.command", "cli.bench.suites",
        "cli.bench.cells", "cli.checks.timing",
    ],
}  # fmt: skip


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_has_no_way_back_up(walk: str) -> None:
    """No stop imports, on whatever way, one that comes before it."""
    stops = [f"dsv4_plugin.{stop}" for stop in WALKS[walk]]
    for at, stop in enumerate(stops):
        reached, new = set(), {stop}
        while new:
            reached |= new
            new = {n for m in new for _, n in imports(m) if n in MODULES} - reached
        assert not reached & set(stops[:at]), stop


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["no-such-command"], []])
def test_the_command_line_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from dsv4_plugin.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
