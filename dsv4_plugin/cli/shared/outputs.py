"""The files that a command writes: checked before its work begins, complete at any moment.

:func:`file`, :func:`plot` and :func:`folder` are types for argparse. :func:`apart` checks all files
of a command line together. A file is written beside its place and then moved there. So a reader
never sees half a file, even if the command is killed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4_plugin.cli.shared.run import UsageError

__all__ = [
    "PLOTS", "apart", "check_plot", "file", "folder", "is_stream", "make_folder", "plot", "save",
    "text_of", "write",
]  # fmt: skip

PLOTS = (".png", ".svg", ".pdf")
OPTIONS = ("json", "plot", "trace")  # the options, of all commands, that name a file to write


def file(text: str) -> Path:
    """Read the name of a file that will be written.

    Raises:
        UsageError: the file cannot be written.
    """
    path = Path(text)
    if why := _refused(path):
        raise UsageError(f"cannot be written: {why}")
    return path


def plot(text: str) -> Path:
    """Read the name of a plot: like :func:`file`, and its form is known and matplotlib is there."""
    path = Path(text)
    check_plot(path)
    return file(text)


def check_plot(path: Path) -> None:
    """Check the form of a plot, and that matplotlib can be loaded.

    Raises:
        UsageError: the form is not known, or matplotlib cannot be loaded.
    """
    if path.suffix not in PLOTS:
        raise UsageError(f"must end in one of {', '.join(PLOTS)}, got {path}")
    require()


def require() -> None:
    """Load matplotlib for drawing into files.

    Raises:
        UsageError: matplotlib is not installed or cannot be loaded.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise UsageError(f"needs matplotlib, which needs {error.name}") from error
        raise UsageError(
            "needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    except Exception as error:
        raise UsageError(
            f"needs matplotlib, which cannot be loaded ({type(error).__name__}: {error})"
        ) from error


def folder(text: str) -> Path:
    """Read the name of a folder that exists or that :func:`make_folder` can make."""
    path = Path(text)
    there = path.absolute()
    try:
        while not there.exists() and not there.is_symlink():
            there = there.parent
        why = (
            None
            if there.is_dir() and os.access(there, os.W_OK | os.X_OK)
            else (
                f"nothing can be written in {there}" if there.is_dir() else f"{there} is no folder"
            )
        )
    except (OSError, ValueError) as error:
        why = _said(error)
    if why:
        raise UsageError(f"cannot be used: {why}")
    return path


def make_folder(option: str, path: Path) -> Path:
    """Make a folder, and try to write in it.

    Raises:
        UsageError: the folder cannot be made, or a file cannot be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        why = _refused(path / ".dsv4-probe")
    except (OSError, ValueError) as error:
        why = _said(error)
    if why:
        raise UsageError(f"{option} {path} cannot be used: {why}")
    return path


def apart(arguments: argparse.Namespace) -> None:
    """Check that no file of a command line is written twice, or written and read.

    Raises:
        UsageError: two options name the same file, and one of them is written.
    """
    seen: dict[Path, str] = {}
    for written in (True, False):
        for name, path in _paths(arguments):
            if (name in OPTIONS) != written or is_stream(path):
                continue
            other = seen.setdefault(path.resolve(), name) if written else seen.get(path.resolve())
            if other not in (None, name):
                raise UsageError(f"{path} is named twice: for {other} and for {name}")


def _paths(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for name, value in vars(arguments).items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, Path):
                yield name, each


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, which is written once, in place."""
    try:
        return path.exists() and not path.is_file() and not path.is_dir()
    except OSError:
        return False


def write(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees half of it.

    Raises:
        OSError: it cannot be written.
    """
    if is_stream(path):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()
    part = _part(target)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _refused(path: Path) -> str | None:
    """Return why a file cannot be written; it tries, and leaves no file."""
    try:
        if path.is_dir():
            return f"{path} is a folder"
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        if is_stream(path):
            if path.is_char_device():  # writes a blank before the document: /dev/full takes no byte
                with path.open("ab", buffering=0) as device:
                    device.write(b"\n")
            return None if os.access(path, os.W_OK) else "Permission denied"
        target = path.resolve()
        new = not target.exists()
        for each in (target, _part(target)):
            with each.open("ab"):
                pass
        _part(target).unlink()
        if new:
            target.unlink()
    except (OSError, ValueError) as error:
        return _said(error)
    return None


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def text_of(document: Any) -> str:
    """Return a results document as JSON; its rows (``results``), if any, come last, a line each."""
    rows = isinstance(document.get("results"), list)
    head = {name: value for name, value in document.items() if not (rows and name == "results")}
    text = json.dumps(head, indent=1, default=str).removesuffix("\n}")
    if rows:
        lines = ",\n  ".join(json.dumps(row, default=str) for row in document["results"])
        text += f',\n "results": [\n  {lines}\n ]' if lines else ',\n "results": []'
    return text + "\n}\n"


def save(figure: Any, file: Path) -> None:
    """Write a figure; the same figure gives the same SVG, so a commit shows real changes only."""
    import matplotlib
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "dsv4"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
