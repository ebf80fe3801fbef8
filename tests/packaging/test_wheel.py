"""The content of the wheels, and their tags."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from kits.packaging_tools import (
    ROOT,
    Wheel,
    build,
    check,
    expected_names,
    reachable,
    run,
    without_nvcc,
)


def test_pure_wheel_is_for_any_platform_and_holds_no_binary(pure_wheel: Wheel, tree: Path) -> None:
    assert pure_wheel.tag == "py3-none-any"
    assert "Root-Is-Purelib: true" in pure_wheel.read(".dist-info/WHEEL")
    assert set(pure_wheel.names) == expected_names(pure_wheel, tree)
    assert len(pure_wheel.names) == len(set(pure_wheel.names))


def test_a_file_is_shipped_if_an_engine_or_a_command_imports_it(
    pure_wheel: Wheel, tree: Path
) -> None:
    """From the entry points, the public names and ``python -m dsv4_plugin`` on."""
    roots = [value.partition(":")[0] for value in ENTRY_POINTS.values()]
    found = reachable(tree, [*roots, "dsv4_plugin.__main__"])
    shipped = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in pure_wheel.names
        if name.endswith(".py")
    }
    assert shipped - found - {"dsv4_plugin._version"} == set()
    assert found <= shipped


def test_what_nothing_imports_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "dsv4_plugin" / "sub"
    package.mkdir(parents=True)
    for name, text in {
        "../__init__.py": "LAZY = {'late': 'dsv4_plugin.late:function'}", "../late.py": "",
        "../main.py": "def f():\n    from dsv4_plugin.sub import a", "../alone.py": "",
        "__init__.py": "", "a.py": "import dsv4_plugin.sub.b", "b.py": "", "c.py": "",
    }.items():  # fmt: skip
        (package / name).write_text(text)
    assert reachable(tmp_path, ["dsv4_plugin.main"]) == {
        "dsv4_plugin", "dsv4_plugin.main", "dsv4_plugin.late", "dsv4_plugin.sub",
        "dsv4_plugin.sub.a", "dsv4_plugin.sub.b",
    }  # fmt: skip


def test_a_stale_library_does_not_leak_into_a_pure_wheel(
    sdist: Path, tmp_path: Path, pure_wheel: Wheel
) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (source / "dsv4_plugin" / "_C.so").write_bytes(b"stale")
    out = tmp_path / "out"
    wheel = Wheel(build(source, out, "--wheel", env={"DSV4_BUILD_CUDA": "0"}))
    assert wheel.tag == "py3-none-any"
    assert set(wheel.names) == set(pure_wheel.names)


def test_what_an_earlier_build_left_is_not_packed(tree: Path, tmp_path: Path) -> None:
    """Modules that were renamed since, and a library of a build with kernels."""
    source = tmp_path / "source"
    shutil.copytree(tree, source)
    for folder in ("lib", "lib.linux-x86_64-cpython-311"):
        old = source / "build" / folder / "dsv4_plugin"
        (old / "gone").mkdir(parents=True)
        for name in ("old.py", "gone/older.py", "_C.so"):
            (old / name).write_text("X = 1\n")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    check([*pip, "-w", tmp_path / "out", source], source, {"DSV4_BUILD_CUDA": "0"})
    (made,) = (tmp_path / "out").iterdir()
    wheel = Wheel(made)
    assert set(wheel.names) == expected_names(wheel, tree)


def test_sdist_holds_all_that_a_build_needs(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    wanted = {
        str(p.relative_to(tree))
        for folder in ("csrc", "dsv4_plugin", "tests")
        for p in (tree / folder).rglob("*")
        if p.is_file()
    }
    assert "csrc/exports.map" in wanted
    wanted |= {"LICENSE", "NOTICE", "README.md", "pyproject.toml"}
    assert wanted - names == set()
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc"))]


def test_metadata(pure_wheel: Wheel) -> None:
    metadata = pure_wheel.read(".dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Author: the dsv4_plugin authors" in metadata
    pythons = re.findall(r"^Classifier: .* :: Python :: (3\.\d+)$", metadata, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert pythons == sorted(set(re.findall(r"\bpython(3\.\d+):torch==", makefile)))
    requires = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
    assert {re.split(r"[<>=!~ ]", r)[0] for r in requires} == {"torch", "apache-tvm-ffi"}
    (torch,) = [r for r in requires if r.startswith("torch")]
    assert not re.search(r"<|==|~=", torch), f"{torch}: no upper pin, the engine chooses torch"


def test_version_comes_from_git(pure_wheel: Wheel, has_git: bool) -> None:
    version = pure_wheel.path.stem.split("-")[1]
    if not has_git:
        assert version == "0.1.0.dev0"  # fallback_version in pyproject.toml
        return
    head = check(["git", "rev-parse", "HEAD"], ROOT).stdout.strip()
    tags = check(["git", "tag", "--points-at", "HEAD"], ROOT).stdout.split()
    commit = re.search(r"\+g([0-9a-f]{7,})", version)
    assert version in {t.removeprefix("v") for t in tags} or (commit and head.startswith(commit[1]))


def test_a_tree_without_git_builds(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (source / "PKG-INFO").unlink()  # an archive of the repository has none
    (source / "dsv4_plugin" / "_version.py").unlink(missing_ok=True)
    wheel = build(source, tmp_path / "out", "--wheel", env={"DSV4_BUILD_CUDA": "0"})
    assert wheel.name == "dsv4_plugin-0.1.0.dev0-py3-none-any.whl"


def test_asking_for_kernels_without_a_compiler_says_what_to_do(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree]
    done = run(command, tree, without_nvcc() | {"DSV4_BUILD_CUDA": "1"})
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert not list(tmp_path.iterdir())
    for part in ("DSV4_BUILD_CUDA=1", "no nvcc", "CUDA_HOME", "DSV4_BUILD_CUDA=0"):
        assert part in said, said[-2000:]


def test_auto_without_a_compiler_builds_the_pure_wheel_and_says_so(
    tree: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree]
    done = check(command, tree, without_nvcc())
    assert "building without the CUDA kernels: no nvcc" in done.stdout + done.stderr
    (made,) = tmp_path.iterdir()
    assert Wheel(made).tag == "py3-none-any"


@pytest.mark.parametrize(
    ("variable", "value"), [("DSV4_BUILD_CUDA", "yes"), ("DSV4_CUDA_ARCHS", "hopper")]
)
def test_a_wrong_build_variable_is_named(
    tree: Path, tmp_path: Path, variable: str, value: str
) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, tree]
    done = run(command, tree, {variable: value})
    assert done.returncode != 0
    assert f"{variable} is '{value}'" in done.stdout + done.stderr


def test_the_pure_wheel_installs_and_imports(installed: Path, tmp_path: Path) -> None:
    code = (
        "import dsv4_plugin, sys; print(dsv4_plugin.__file__); print(dsv4_plugin.__version__);"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " {'torch', 'triton', 'tvm_ffi', 'numpy', 'vllm', 'sglang', 'tokenspeed'}))"
    )
    done = check([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(installed)})
    file, version, imported = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert version[0].isdigit()
    assert imported == "[]", "importing dsv4_plugin must stay light"


ENTRY_POINTS = {
    "vllm.general_plugins": "dsv4_plugin.engines.vllm:register",
    "sglang.srt.plugins": "dsv4_plugin.engines.sglang:register",
    "tokenspeed.plugins": "dsv4_plugin.engines.tokenspeed:register",
    "tokenspeed_kernel.plugins": "dsv4_plugin.engines.tokenspeed:register_kernels",
    "console_scripts": "dsv4_plugin.cli.main:main",
}


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_entry_points_are_found_and_load(installed: Path, tmp_path: Path, group: str) -> None:
    name = "dsv4-plugin" if group == "console_scripts" else "dsv4"
    code = (
        "from importlib.metadata import entry_points\n"
        f"eps = [e for e in entry_points(group={group!r}) if e.name == {name!r}]\n"
        f"assert {{e.value for e in eps}} == {{{ENTRY_POINTS[group]!r}}}, eps\n"
        "import dsv4_plugin; print(dsv4_plugin.__file__)\n"
        "function = eps[0].load()\n"
        "import sys\n"
        "heavy = {'torch', 'vllm', 'sglang', 'tokenspeed', 'tokenspeed_kernel'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert callable(function)\n"
    )
    done = check([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(installed)})
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_the_console_script_runs(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "dsv4-plugin"
    done = check([sys.executable, script, "--help"], tmp_path, {"PYTHONPATH": str(installed)})
    assert "doctor" in done.stdout


def test_an_editable_install_puts_the_library_beside_the_package(
    nvcc: str, tree: Path, tmp_path: Path
) -> None:
    # A stand-in kernel: this is about where the library goes.
    source = tmp_path / "source"
    check(
        ["git", "clone", "-q", tree, source]
        if (tree / ".git").is_dir()
        else ["cp", "-r", tree, source],
        tmp_path,
    )
    for name in ("pyproject.toml", "csrc/build.py"):
        (source / name).write_text((tree / name).read_text())
    for kernel in (source / "csrc" / "bindings").glob("*.cu"):
        kernel.unlink()
    stub = source / "csrc" / "bindings" / "stub.cu"
    stub.write_text('extern "C" int __tvm_ffi_stub() { return 0; }\n')
    (source / "README.md").touch()
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site]
    check([*pip, "-e", source], tmp_path, {"DSV4_BUILD_CUDA": "1"})
    assert (source / "dsv4_plugin" / "_C.so").is_file()
    assert not list(site.rglob("_C.so"))
