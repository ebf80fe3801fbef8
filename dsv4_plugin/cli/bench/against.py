"""What ``--against`` names: engines whose kernels are here, and files of recorded figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dsv4_plugin.cli.shared.choices import ENGINES
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["engines_only", "split"]


def split(words: Iterable[str]) -> tuple[list[str], list[Path]]:
    """Return the engines and the files that ``--against`` names, each once.

    Raises:
        UsageError: a word is neither an engine nor looks like a file.
    """
    engines: list[str] = []
    files: list[Path] = []
    for word in words:
        for part in [word] if Path(word).is_file() else word.split(","):
            if part in ENGINES:
                engines.append(part)
            elif part.endswith(".csv") or "/" in part or Path(part).is_file():
                files.append(Path(part))
            else:
                raise UsageError(
                    f"--against must be of {', '.join(ENGINES)}, with commas between, or a CSV "
                    f"file of recorded figures, got {part!r}"
                )
    return list(dict.fromkeys(engines)), list(dict.fromkeys(files))


def engines_only(words: Iterable[str]) -> list[str]:
    """Return the engines that ``--against`` names, for a benchmark that compares with no file.

    Raises:
        UsageError: as :func:`split`, or a word is a file.
    """
    engines, files = split(words)
    if files:
        raise UsageError(f"--against FILE.csv is for bench topk, got {files[0]}")
    return engines
