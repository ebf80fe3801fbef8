"""The setuptools commands that compile ``csrc`` into ``dsv4_plugin/_C.so`` and pack a wheel.

One binary serves every Python, torch and CUDA 12/13 that an engine has: it exports ``__tvm_ffi_*``
functions, links the CUDA runtime statically, and links nothing of torch, tvm-ffi or the driver. So
the wheel has the tag ``py3-none-<platform>``. Without a compiler the tag is ``py3-none-any``, and
the plugin runs on Triton and torch.

The build reads:

``DSV4_BUILD_CUDA``
    ``auto`` (default): compile if there is an nvcc for the wanted architectures.
    ``1``: it is an error if nvcc is missing or does not fit. ``0``: never compile.
``DSV4_CUDA_ARCHS``
    Comma-separated architectures, default ``90a``.
``CUDA_HOME``
    Where to look for ``bin/nvcc`` before ``PATH``.
``MAX_JOBS``
    How many nvcc run at once, default the number of cores.

The build must not import torch: an isolated build environment does not have the engine's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

CSRC = Path("csrc")  # The build runs in the project's root, so that messages have short paths.
MODULE = "dsv4_plugin._C"
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]
LINK_FLAGS = ["-shared", "-cudart=static", f"-Xlinker=--version-script={CSRC / 'exports.map'}"]


class Toolchain:
    """An nvcc and the architectures it must compile for; ``unmet`` says why it cannot be used."""

    def __init__(self) -> None:
        self.archs = [a.strip() for a in _environ("DSV4_CUDA_ARCHS", "90a").split(",") if a.strip()]
        bad = [a for a in self.archs if not re.fullmatch(r"\d{2,3}[af]?", a)]
        if bad or not self.archs:
            raise SetupError(
                f"DSV4_CUDA_ARCHS is {os.environ['DSV4_CUDA_ARCHS']!r}; it lists architectures "
                "such as '90a' or '90a,100a'"
            )
        self.nvcc, self.unmet = self._find()

    def _find(self) -> tuple[str, str | None]:
        if not sys.platform.startswith("linux"):
            return "", f"the kernels are built on Linux, this is {sys.platform}"
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
        nvcc = nvcc or shutil.which("nvcc")
        if nvcc is None:
            return "", "no nvcc in $CUDA_HOME/bin or on PATH"
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
        if listed.returncode != 0:
            return nvcc, f"`{nvcc} --list-gpu-code` failed: {listed.stderr.strip()}"
        known = set(listed.stdout.split())
        # The list does not have the suffixed targets; an nvcc that knows sm_90 knows sm_90a.
        missing = [a for a in self.archs if f"sm_{a.rstrip('af')}" not in known]
        if missing:
            return nvcc, f"{nvcc} does not know {', '.join('sm_' + a for a in missing)}"
        return nvcc, None

    def compile(self, sources: list[Path], output: Path, temp: Path) -> None:
        """Compile ``sources`` and link them into the shared object ``output``."""
        temp.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        includes = [f"-I{CSRC / 'include'}"]
        for path in _tvm_ffi():
            # Errors name their source file; the name must not be in a build environment that is
            # gone.
            includes += [f"-isystem={path}", f"-Xcompiler=-ffile-prefix-map={path}=tvm_ffi"]
        objects = [temp / f"{s.stem}.o" for s in sources]
        commands = [
            [self.nvcc, *COMPILE_FLAGS, *targets, *includes, "-c", str(s), "-o", str(o)]
            for s, o in zip(sources, objects, strict=True)
        ]
        jobs = max(1, min(len(commands), int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, commands))
        _run([self.nvcc, *LINK_FLAGS, *targets, *map(str, objects), "-o", str(output)])


def toolchain() -> Toolchain | None:
    """Return the compiler to use, or ``None`` for a pure wheel, as ``DSV4_BUILD_CUDA`` says."""
    wish = _environ("DSV4_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SetupError(f"DSV4_BUILD_CUDA is {wish!r}; it can be 'auto', '0', '1'")
    if wish == "0":
        return None
    found = Toolchain()
    if found.unmet is None:
        return found
    if wish == "1":
        raise SetupError(
            f"DSV4_BUILD_CUDA=1, but {found.unmet}. Install the CUDA toolkit (12.4 or newer) and "
            "put nvcc on PATH or set CUDA_HOME; or build without the CUDA kernels: "
            "DSV4_BUILD_CUDA=0."
        )
    print(f"dsv4: building without the CUDA kernels: {found.unmet}", file=sys.stderr)
    return None


class BdistWheel(bdist_wheel):
    """Declares the extension if it can be compiled, and tags the wheel for its content."""

    def initialize_options(self) -> None:
        """Decide here, because an editable build asks for the tag before it runs ``build``."""
        super().initialize_options()
        if toolchain() is not None:
            sources = sorted(str(p) for p in (CSRC / "bindings").glob("*.cu"))
            if not sources:
                raise SetupError(f"no {CSRC}/bindings/*.cu: this source tree is not complete")
            self.distribution.ext_modules = [Extension(MODULE, sources)]

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3 and any ABI; a platform only if a binary is inside."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class BuildPy(build_py):
    """Removes from the build folder what an earlier build of another version left there.

    setuptools packs everything in it: a module that was renamed since, or, in a wheel without
    kernels, an older library.
    """

    def run(self) -> None:
        """Copy the modules, and remove files that this build did not make."""
        super().run()
        if self.editable_mode:
            return
        made = {Path(name).resolve() for name in self.get_outputs(include_bytecode=False)}
        if self.distribution.ext_modules:
            compiled = self.get_finalized_command("build_ext").get_outputs()
            made |= {Path(name).resolve() for name in compiled}
        root = Path(self.build_lib)
        for package in {name.partition(".")[0] for name in self.packages or ()}:
            for file in (root / package).rglob("*"):
                if (file.is_file() or file.is_symlink()) and file.resolve() not in made:
                    file.unlink()


class BuildExt(build_ext):
    """Runs nvcc instead of the C compiler; names the result ``_C.so``, without an ABI in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return ``dsv4_plugin/_C.so``: it is a tvm-ffi library, not a Python extension module."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile one extension; a failure is an error, so a platform wheel always has its .so."""
        found = toolchain()
        if found is None:
            raise SetupError(f"{ext.name} was declared, but no compiler for it is there any more")
        output = Path(self.get_ext_fullpath(ext.name))
        found.compile([Path(s) for s in ext.sources], output, Path(self.build_temp) / "dsv4")


def _environ(name: str, default: str) -> str:
    return os.environ.get(name, "").strip().lower() or default


def _tvm_ffi() -> list[str]:
    try:
        from tvm_ffi import libinfo
    except ImportError as error:
        raise SetupError(
            "apache-tvm-ffi is not in the build environment; `pip install apache-tvm-ffi==0.1.10`, "
            "or build with isolation, which installs it"
        ) from error
    return list(dict.fromkeys([libinfo.find_include_path(), libinfo.find_dlpack_include_path()]))


def _run(command: list[str]) -> None:
    print("dsv4:", shlex.join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise CompileError(
            f"failed: {shlex.join(command)}\nDSV4_BUILD_CUDA=0 builds without the CUDA kernels."
        )
