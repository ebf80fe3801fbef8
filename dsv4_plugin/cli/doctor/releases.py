"""``dsv4-plugin doctor --engines``: the seams in releases that are not installed.

pip downloads the wheels without their dependencies, and nothing is built or run. The command
unpacks their Python files, and the probes of the adapters read them. So no engine is imported or
installed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.checks.progress import Progress
from dsv4_plugin.cli.shared import screen
from dsv4_plugin.engines.shared import source

__all__ = ["ENGINES", "SpecError", "matrix", "probe", "render"]

# engine -> (its distributions, the module whose look() finds its seams)
ENGINES = {
    "vllm": (("vllm",), "dsv4_plugin.engines.vllm.probe"),
    "sglang": (("sglang",), "dsv4_plugin.engines.sglang.probe"),
    "tokenspeed": (("tokenspeed", "tokenspeed-kernel"), "dsv4_plugin.engines.tokenspeed.probe"),
}
_SPEC = re.compile(r"(?P<engine>[a-z]+)(==(?P<version>[\w.+!-]+)|@(?P<place>.+))?")

Data = dict[str, Any]


class SpecError(ValueError):
    """The text is not the name of a release."""


def matrix(
    specs: Iterable[str],
    folder: Path | None = None,
    found: list[Data] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Data]:
    """Probe releases: ``engine``, ``engine==version`` or ``engine@folder of its packages``.

    Args:
        specs: the releases; without a version, the newest one that pip finds for this Python.
        folder: where wheels and their Python files are kept; None: they are not kept.
        found: the list that is filled and returned, so that an interrupted caller still has it.
        say: gets a line after each release, with the time left.

    Returns:
        One entry per release: ``engine``, ``version``, ``seams`` (name -> where, why), ``error``,
        and ``complete``, which is false if the release was not read to its end.

    Raises:
        SpecError: a spec has none of the three forms, or its engine is not known.
    """
    found = [] if found is None else found
    wanted = [_parsed(spec) for spec in specs]
    found += [
        {"engine": engine, "version": version or place, "seams": {}, "error": "interrupted",
         "complete": False}
        for engine, version, place in wanted
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dsv4-engines-") as scratch:
        root = Path(scratch) if folder is None else folder
        progress = Progress(say)
        progress.start(len(wanted))
        for number, parts in enumerate(wanted):
            found[number] = _release(*parts, root) | {"complete": True}
            progress.done(f"{found[number]['engine']} {found[number]['version']}")
    return found


def _parsed(spec: str) -> tuple[str, str | None, str | None]:
    match = _SPEC.fullmatch(spec)
    if not match or match["engine"] not in ENGINES:
        raise SpecError(
            f"a release is ENGINE, ENGINE==VERSION or ENGINE@FOLDER with one of "
            f"{', '.join(ENGINES)}, got {spec!r}"
        )
    return match["engine"], match["version"], match["place"]


def _release(engine: str, version: str | None, place: str | None, root: Path) -> Data:
    data: Data = {"engine": engine, "version": version or place, "seams": {}, "error": None}
    try:
        if place is None:
            place, data["version"] = _unpacked(engine, version, root)
        data["seams"] = probe(engine, Path(place))
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, source.Missing) as error:
        data["error"] = str(error)
    return data


def probe(engine: str, folder: Path) -> Data:
    """Return the seams of the engine whose packages lie in ``folder``: name -> where, why.

    Raises:
        Missing: the engine is not in the folder.
    """
    if not (folder / engine).is_dir():
        raise source.Missing(f"there is no {engine} in {folder}")
    look = importlib.import_module(ENGINES[engine][1]).look
    with source.packages_in(folder):
        return source.shown(look())


def _unpacked(engine: str, version: str | None, root: Path) -> tuple[str, str]:
    """Download a release and unpack its Python files; return the folder and the version."""
    first, *more = ENGINES[engine][0]
    target = root / f"{engine}-{version}"
    if version and (target / ".complete").exists():
        return str(target), version
    wheel = _download(f"{first}=={version}" if version else first, root / "wheels")
    version = wheel.name.split("-")[1]
    target = root / f"{engine}-{version}"
    needs = _unzip(wheel, target)
    for name in more:  # the version that the release asks for
        wanted = next((n for n in needs if re.match(rf"{name}\b(?!-)", n.replace("_", "-"))), name)
        _unzip(_download(wanted.partition(";")[0].replace(" ", ""), root / "wheels"), target)
    (target / ".complete").touch()
    return str(target), version


def _download(requirement: str, folder: Path) -> Path:
    """Let pip download one wheel; an sdist is not taken, because it would have to be built."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary", ":all:", "--ignore-requires-python", "--disable-pip-version-check",
            "--dest", str(folder), requirement,
        ],
        capture_output=True, encoding="utf-8", errors="replace", timeout=1800,
    )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise OSError(f"pip cannot bring {requirement} ({(said or ['no reason given'])[-1]})")
    new = set(folder.iterdir()) - before
    name = re.split(r"[^\w-]", requirement)[0].replace("-", "_")
    wheels = sorted(new or folder.glob(f"{name}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise OSError(f"pip brought no wheel of {requirement}")
    return wheels[-1]


def _unzip(wheel: Path, target: Path) -> list[str]:
    """Unpack the Python files of a wheel; return its requirements."""
    needs: list[str] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                archive.extract(name, target)
            elif name.endswith(".dist-info/METADATA"):
                text = archive.read(name).decode(errors="replace")
                needs = re.findall(r"^Requires-Dist: (.+)$", text, re.M)
    return needs


def render(releases: list[Data]) -> str:
    """Return the matrix as text: a table per engine, then why each missing seam is missing."""
    lines: list[str] = []
    for engine in dict.fromkeys(data["engine"] for data in releases):
        some = [data for data in releases if data["engine"] == engine]
        names = list(dict.fromkeys(name for data in some for name in data["seams"]))
        lines += screen.table(
            [engine, *(str(data["version"]) for data in some)],
            [[name, *(_cell(data, name) for data in some)] for name in names],
            right=False,
        )
        for data in some:
            if data["error"]:
                lines.append(f"{engine} {data['version']}: {data['error']}")
            for name, seam in data["seams"].items():
                if not seam["where"]:
                    lines.append(f"{engine} {data['version']}, {name}: {seam['why']}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(data: Data, name: str) -> str:
    if data["error"]:
        return "?"
    return "found" if data["seams"].get(name, {}).get("where") else "moved"
