"""Build, install and inspect wheels, for the tests in ``tests/packaging``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST_INFO = [
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "licenses/NOTICE",
    "top_level.txt",
]


@dataclass(frozen=True)
class Wheel:
    path: Path

    @property
    def tag(self) -> str:
        """``python-abi-platform`` out of the file's name."""
        return "-".join(self.path.stem.split("-")[-3:])

    @property
    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.namelist()

    def read(self, suffix: str) -> str:
        (name,) = [n for n in self.names if n.endswith(suffix)]
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name).decode()


def run(
    command: Sequence[str | Path], cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command without a DSV4_* variable of this session, unless ``env`` has it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "PYTHONPATH"))}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
    )


def check(
    command: Sequence[str | Path], cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = run(command, cwd, env)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def without_nvcc() -> dict[str, str]:
    """A PATH with the compiler's folders taken out, and no CUDA_HOME."""
    folders = os.environ["PATH"].split(os.pathsep)
    kept = [f for f in folders if not os.path.exists(os.path.join(f, "nvcc"))]
    return {"PATH": os.pathsep.join(kept), "CUDA_HOME": ""}


def build(source: Path, out: Path, *args: str, env: dict[str, str] | None = None) -> Path:
    """Run ``python -m build`` as a user would and return the one file it made."""
    check([sys.executable, "-m", "build", "--outdir", out, *args, source], source, env)
    (made,) = out.iterdir()
    return made


def compiled(nvcc: str, name: str, folder: Path) -> Path:
    """Compile ``tests/packaging/NAME.cu``, a program over the headers that needs no GPU."""
    program = folder / name
    source = ROOT / "tests" / "packaging" / f"{name}.cu"
    headers = ROOT / "csrc" / "include"
    check([nvcc, "-std=c++17", "-arch=sm_90a", "-I", headers, source, "-o", program], folder)
    return program


def install(wheel: Wheel, target: Path) -> Path:
    """Install a wheel (nothing it depends on) into a folder for PYTHONPATH."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
    check([*pip, wheel.path], target.parent)
    return target


def reachable(tree: Path, roots: Sequence[str]) -> set[str]:
    """Return the modules of the package that the roots import, however deep, and their packages.

    An import inside a function counts, and so does a module's name as a string: what is loaded
    when it is needed is named like that.
    """
    files = {}
    for file in (tree / "dsv4_plugin").rglob("*.py"):
        name = ".".join(file.relative_to(tree).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = file
    found: set[str] = set()
    todo = list(roots)
    while todo:
        module = todo.pop()
        if module not in files or module in found:
            continue
        found.add(module)
        todo.append(module.rpartition(".")[0])
        for node in ast.walk(ast.parse(files[module].read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                todo.append(node.value.partition(":")[0])  # "module:function" too
    return found


def expected_names(wheel: Wheel, tree: Path) -> set[str]:
    """Modules, typing marker, written version, metadata: no more."""
    package = {str(p.relative_to(tree)) for p in (tree / "dsv4_plugin").rglob("*.py")}
    version = wheel.path.stem.split("-")[1]
    info = {f"dsv4_plugin-{version}.dist-info/{name}" for name in DIST_INFO}
    return package | {"dsv4_plugin/py.typed", "dsv4_plugin/_version.py"} | info
