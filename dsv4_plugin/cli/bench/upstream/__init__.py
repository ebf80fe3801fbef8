"""The kernels of the engines that are installed here, as peers of the benchmarks.

One file an engine. Each has ``kernels(form)``, which returns kernels by name in the conventions of
:mod:`dsv4_plugin.cli.bench.topk.peers`, or, in place of a function, why there is none. Every
function says which one of the engine it calls, and how the engine calls it itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dsv4_plugin.cli.bench.topk import peers
from dsv4_plugin.cli.bench.topk.peers import Call, Peers
from dsv4_plugin.cli.bench.upstream import flashinfer_peers, sglang_peers, torch_peers, vllm_peers
from dsv4_plugin.cli.shared import choices
from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["ENGINES", "engines_only", "load", "split"]

ENGINES = dict(
    zip(choices.ENGINES, (vllm_peers, sglang_peers, flashinfer_peers, torch_peers), strict=True)
)


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


def load(engines: Sequence[str], forms: Sequence[str], file: Path | None, *, of: str) -> Peers:
    """Return the peers of the forms ``of`` a benchmark: the file's, and the engines' of ``forms``.

    ``forms`` are those of the cells that are measured: what an engine has not got is said of these
    only. A kernel of the file has the name where both have it.
    """
    found = peers.load(file, peers.FORMS_OF[of])
    for engine in engines:
        module = ENGINES[engine]
        named: dict[str, dict[str, Call | str]] = {form: module.kernels(form) for form in forms}
        found.add(engine, named, module.choice())
    return found
