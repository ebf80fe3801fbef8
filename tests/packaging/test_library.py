"""The wheel with the kernels: its tag, and the library's exports, needs and loading.

All is in one file, which ``pytest --dist loadfile`` gives to one worker, so that the wheel is built
once.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from kits.packaging_tools import ROOT, Wheel, check, expected_names, install

# vLLM 0.26 pins 0.1.10; vLLM 0.33 and SGLang 0.5.16-0.5.23 0.1.11; tokenspeed-kernel 0.1.4
# 0.1.13.post3. The last is whatever PyPI has in the range of pyproject.toml.
TVM_FFI = ["==0.1.10", "==0.1.11", "==0.1.13.post3", ">=0.1.10,<0.2"]


def tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exports(library: Path) -> list[str]:
    lines = tool("nm", "-D", "--defined-only", library).splitlines()
    return [line.split()[-1] for line in lines]


def test_cuda_wheel_is_for_one_platform_and_any_python(cuda_wheel: Wheel, tree: Path) -> None:
    assert re.fullmatch(r"py3-none-linux_(x86_64|aarch64)", cuda_wheel.tag)
    assert "Root-Is-Purelib: false" in cuda_wheel.read(".dist-info/WHEEL")
    assert set(cuda_wheel.names) == expected_names(cuda_wheel, tree) | {"dsv4_plugin/_C.so"}


def test_install_of_the_cuda_wheel(cuda_wheel: Wheel, tmp_path: Path) -> None:
    site = install(cuda_wheel, tmp_path / "site")
    assert (site / "dsv4_plugin" / "_C.so").stat().st_size > 100_000


def test_only_tvm_ffi_functions_are_exported(library: Path) -> None:
    exported = exports(library)
    assert [name for name in exported if not name.startswith("__tvm_ffi_")] == []
    # The library exports exactly the functions that the package calls.
    source = (ROOT / "dsv4_plugin/kernels/cuda.py").read_text()
    calls = re.findall(r'_(?:function|compiled)\("(\w+)"', source)
    assert calls and {f"__tvm_ffi_{name}" for name in calls} == set(exported)


def test_nothing_of_torch_tvm_ffi_or_cuda_is_linked(library: Path) -> None:
    dynamic = tool("readelf", "-d", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    system = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux-.*"
    assert needed and [name for name in needed if not re.fullmatch(system, name)] == []
    assert not re.search(r"R(UN)?PATH", dynamic)


def test_undefined_symbols_are_the_systems_or_tvm_ffis_c_api(library: Path) -> None:
    lines = tool("nm", "-D", "--undefined-only", library).splitlines()
    names = {
        line.split()[-1].split("@")[0] for line in lines if "@" not in line and " w " not in line
    }
    assert names, "the library calls tvm-ffi's C API"
    assert [n for n in names if not re.fullmatch(r"TVMFFI\w+", n)] == []


def test_no_path_of_the_build_environment_is_in_an_error(library: Path) -> None:
    assert b"/tvm_ffi/include/tvm/ffi" not in library.read_bytes()


PROBE = """
import sys
import torch, tvm_ffi
print(tvm_ffi.__version__, tvm_ffi.__file__)
function = tvm_ffi.load_module(sys.argv[1]).get_function("dsv4_topk")
def call(logits, k=512):
    rows = torch.ones(2, dtype=torch.int32)
    out = torch.full((2, 512), 7, dtype=torch.int32)
    try:
        function(logits, rows, out, None, None, None, k, 1, 64, False, None)
    except Exception as error:
        print(type(error).__name__, "|", str(error).splitlines()[0])
    else:
        print("no error")
    assert (out == 7).all()
call(torch.zeros(2, 8))
call(torch.zeros(2, 8, dtype=torch.float64))
call(torch.zeros(8))
for name in sys.argv[2:]:
    try:
        tvm_ffi.load_module(sys.argv[1]).get_function(name)(1, 2)
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("version", TVM_FFI)
def test_loads_and_raises_python_errors(library: Path, version: str, tmp_path: Path) -> None:
    functions = [name.removeprefix("__tvm_ffi_") for name in exports(library)]
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site]
    check([*pip, f"apache-tvm-ffi{version}"], tmp_path)
    done = check(
        [sys.executable, "-c", PROBE, library, *functions],
        tmp_path,
        {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""},
    )
    loaded, on_cpu, dtype, rank, *arity = done.stdout.splitlines()
    number, _, file = loaded.partition(" ")
    assert Path(file).is_relative_to(site)
    if version.startswith("=="):
        assert number == version[2:]
    # Each names the argument and what came.
    assert re.match(r"(ValueError|TypeError) \| .*logits.*(cpu|CUDA|cuda)", on_cpu), on_cpu
    assert re.match(r"TypeError \| .*logits.*float64", dtype), dtype
    assert re.match(r"ValueError \| .*logits", rank), rank
    assert arity == ["TypeError"] * len(functions)


def test_make_gives_the_wheel_the_manylinux_tag_of_its_symbols(
    cuda_wheel: Wheel, library: Path, tmp_path: Path
) -> None:
    """``make manylinux``: the oldest glibc that has what the library needs."""
    shutil.copy2(cuda_wheel.path, tmp_path)
    check(["make", "-s", "manylinux", f"PY={sys.executable}", f"DIST={tmp_path}"], ROOT)
    (made,) = tmp_path.iterdir()
    wheel = Wheel(made)
    found = re.fullmatch(r"py3-none-manylinux_2_(\d+)_(x86_64|aarch64)", wheel.tag)
    assert found, wheel.tag
    assert f"Tag: {wheel.tag}\n" in wheel.read(".dist-info/WHEEL")
    needed = re.findall(r"\bGLIBC_2\.(\d+)\b", tool("readelf", "-V", "-W", library))
    assert int(found[1]) >= max(map(int, needed))
    files = {name for name in wheel.names if not name.endswith("/")}
    assert files == set(cuda_wheel.names), "nothing is bundled"
    with zipfile.ZipFile(made) as archive:
        assert archive.read("dsv4_plugin/_C.so") == library.read_bytes()


def test_make_leaves_a_wheel_without_a_library_alone(pure_wheel: Wheel, tmp_path: Path) -> None:
    shutil.copy2(pure_wheel.path, tmp_path)
    check(["make", "-s", "manylinux", f"PY={sys.executable}", f"DIST={tmp_path}"], ROOT)
    assert [p.name for p in tmp_path.iterdir()] == [pure_wheel.path.name]


def code_bytes(library: Path, folder: Path) -> dict[str, int]:
    """Return the bytes of each kernel's machine code, by mangled name."""
    triton = importlib.util.find_spec("triton")
    assert triton and triton.origin, "triton, which torch brings, has cuobjdump"
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    subprocess.run(
        [cuobjdump, "-xelf", "all", library], cwd=folder, check=True, capture_output=True
    )
    found = {}
    for cubin in folder.glob("*.cubin"):
        with cubin.open("rb") as stream:
            for section in ELFFile(stream).iter_sections():
                if section.name.startswith(".text."):
                    found[section.name.removeprefix(".text.")] = section["sh_size"]
    return found


def first_call(folder: Path, kernel: str) -> int:
    """Return where the first out-of-line function of a kernel begins: before it is the rest."""
    found = []
    for cubin in folder.glob("*.cubin"):
        with cubin.open("rb") as stream:
            symbols = ELFFile(stream).get_section_by_name(".symtab")
            found += [s["st_value"] for s in symbols.iter_symbols() if f"${kernel}$" in s.name]
    return min(found)


def test_no_kernel_has_outgrown_what_a_launch_fetches(library: Path, tmp_path: Path) -> None:
    """A launch loads 64 KB of a kernel's code; in a server the kernel waits for code beyond them.

    Of the top-k's kernels some 40 KB are rare parts, which lie last (docs/notes/topk.md).
    """
    sizes = code_bytes(library, tmp_path)
    topk = {name: size for name, size in sizes.items() if "11topk_kernel" in name}
    # Two numbers of threads, alone or in clusters; rows and candidates of three dtypes; the guess.
    candidates = [name for name in topk if "13CandidateForm" in name]
    (guess,) = [name for name in topk if "7RowFormELb1E" in name]
    assert (len(topk), len(candidates)) == (25, 12), sorted(topk)
    # It has the other way as well, which comes after all that a good guess needs.
    assert sizes.pop(guess) > 112 * 1024 and first_call(tmp_path, guess) <= 64 * 1024
    assert {name: size for name, size in sizes.items() if size > 112 * 1024} == {}
