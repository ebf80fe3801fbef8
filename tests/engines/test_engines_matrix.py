"""``dsv4-plugin doctor --engines``: releases that pip downloads, probed without an import."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from dsv4_plugin.cli import main as cli
from dsv4_plugin.cli.doctor import releases
from dsv4_plugin.engines.sglang import probe as sglang_sites
from dsv4_plugin.engines.shared import source

PAGED = ("topk_transform_paged", "topk_transform_512")
INDEXER = f"""
from kernels import {", ".join(PAGED)}
from kernels import {", ".join(name + "_v2" for name in PAGED)}
raise SystemExit("an engine was imported")
class C4IndexerBackendMixin:
    def forward_c4_indexer(self, x, c4_indexer, forward_batch): ...
"""
FILES = {
    "sglang/srt/server_args.py": "class ServerArgs:\n    def add_cli_args(parser): ...\n",
    "sglang/srt/layers/attention/dsv4/indexer.py": INDEXER,
    "sglang/srt/layers/attention/dsv4/kernel.so": "not for us",
}


def wheel(
    folder: Path, version: str, files: dict[str, str], name: str = "sglang", needs=""
) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip looks into."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_the_newest_and_a_named_release(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(index, "0.5.1", {"sglang/__init__.py": ""})
    wheel(index, "0.5.2", FILES)
    kept = tmp_path / "kept"
    arguments = ["doctor", "--engines", "sglang", "sglang==0.5.1", "--folder", str(kept)]
    assert cli.main([*arguments, "--json"]) == 1
    newest, old = json.loads(capsys.readouterr().out)
    assert (newest["version"], old["version"]) == ("0.5.2", "0.5.1")
    assert newest["seams"]["forward"]["where"] and newest["seams"]["topk.paged"]["where"]
    assert newest["seams"]["topk.dsa"]["why"] == f"{sglang_sites.DSA} is gone"
    assert not any(seam["where"] for seam in old["seams"].values())
    assert "sglang" not in sys.modules
    assert not list(kept.rglob("*.so")), "only Python files are unpacked"

    for path in index.iterdir():  # what was kept is not asked for again
        path.unlink()
    assert cli.main([*arguments[:2], "sglang==0.5.2", *arguments[4:]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sglang", "0.5.2"]
    assert ["forward", "found"] in [line.split() for line in lines]
    assert ["topk.dsa", "moved"] in [line.split() for line in lines]
    assert any(line.startswith("sglang 0.5.2, topk.dsa: ") for line in lines)


def test_nothing_is_kept_without_a_folder(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    wheel(index, "0.5.2", FILES)
    (found,) = releases.matrix(["sglang"])
    assert found["seams"]["flag"]["where"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_kernel_package_is_the_one_that_the_release_asks_for(index: Path) -> None:
    wheel(index, "0.1.1", {"tokenspeed/a.py": ""}, "tokenspeed",
          "Requires-Dist: tokenspeed-kernel==0.1.4\n")  # fmt: skip
    for version, text in (("0.1.4", "right"), ("0.1.9", "wrong")):
        wheel(index, version, {f"tokenspeed_kernel/{text}.py": ""}, "tokenspeed_kernel")
    folder = index.parent / "kept"
    (found,) = releases.matrix(["tokenspeed"], folder)
    assert found["error"] is None and found["version"] == "0.1.1"
    assert {p.name for p in folder.rglob("tokenspeed_kernel/*.py")} == {"right.py"}


def test_a_release_that_cannot_be_had_is_an_entry(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(index, "0.5.2", FILES)
    assert cli.main(["doctor", "--engines", "vllm==77", "sglang"]) == 1
    out = capsys.readouterr().out
    assert "pip cannot bring vllm==77 (ERROR: No matching distribution" in out
    assert "found" in out


@pytest.mark.parametrize("spec", ["", "VLLM", "nope==1", "vllm=0.33", "vllm==", "vllm==1;rm -rf"])
def test_a_wrong_spec_is_an_error_before_pip_runs(
    spec: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(releases, "_download", None)
    assert cli.main(["doctor", "--engines", spec]) == 2
    assert "ENGINE==VERSION" in capsys.readouterr().err


def test_a_folder_is_probed_as_it_is(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = releases.matrix([f"sglang@{tmp_path}"])
    assert found["seams"]["forward"]["where"] and found["error"] is None
    (none,) = releases.matrix([f"vllm@{tmp_path}"])
    assert none["error"] == f"there is no vllm in {tmp_path}"
    with pytest.raises(source.Missing, match="vllm is not there"), source.packages_in(tmp_path):
        source.find("vllm.anything")
    with pytest.raises(source.Missing, match="is not installed"):
        source.find("dsv4_nowhere.anything")
