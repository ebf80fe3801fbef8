"""The wheels: each is built once a session, from a copy of the tracked files."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT, Wheel, build, check, install, run
from kits.skip_policy import NO_NVCC


@pytest.fixture(scope="session")
def has_git() -> bool:
    """Whether this tree is a git checkout (a release tarball is not)."""
    return run(["git", "rev-parse", "HEAD"], ROOT).returncode == 0


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory, has_git: bool) -> Path:
    """A copy of the source tree without what earlier builds left in it."""
    target = tmp_path_factory.mktemp("source") / "dsv4"
    if not has_git:
        junk = shutil.ignore_patterns(".venv*", "build", "dist", "*.so", "__pycache__")
        shutil.copytree(ROOT, target, ignore=junk)
        return target
    target.mkdir()
    listed = check(["git", "ls-files", "-co", "--exclude-standard", "-z"], ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    # setuptools-scm asks git for the version and for the files of the sdist: a repository with
    # the same commit, whose index is the tree as it is now.
    check(["git", "init", "-q"], target)
    alternates = target / ".git" / "objects" / "info" / "alternates"
    common = check(["git", "rev-parse", "--git-common-dir"], ROOT).stdout.strip()
    alternates.write_text(f"{(ROOT / common / 'objects').resolve()}\n")
    head = check(["git", "rev-parse", "HEAD"], ROOT).stdout.strip()
    check(["git", "update-ref", "HEAD", head], target)
    check(["git", "add", "-A"], target)
    return target


@pytest.fixture(scope="session")
def pure_wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """What a machine without a compiler builds."""
    out = tmp_path_factory.mktemp("pure")
    return Wheel(build(tree, out, "--wheel", env={"DSV4_BUILD_CUDA": "0"}))


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("sdist"), "--sdist")


@pytest.fixture(scope="session")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not found:
        pytest.skip(NO_NVCC)
    return found


@pytest.fixture(scope="session")
def cuda_wheel(nvcc: str, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The wheel with the kernels, built from the sdist: so csrc is known to be in there."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked, filter="data")
    (source,) = unpacked.iterdir()
    out = tmp_path_factory.mktemp("cuda")
    return Wheel(build(source, out, "--wheel", env={"DSV4_BUILD_CUDA": "1"}))


@pytest.fixture(scope="session")
def library(cuda_wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``_C.so`` out of the wheel."""
    out = tmp_path_factory.mktemp("library")
    with zipfile.ZipFile(cuda_wheel.path) as archive:
        return Path(archive.extract("dsv4_plugin/_C.so", out))


@pytest.fixture(scope="session")
def installed(pure_wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(pure_wheel, tmp_path_factory.mktemp("installed") / "site")
