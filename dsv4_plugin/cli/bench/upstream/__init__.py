"""The kernels of the engines that are installed here, as peers of the benchmarks.

There is one file per engine, with

* ``name()``: the name of its kernels, with its release; None if it is not installed,
* ``FORMS``: its kernels of each form (:mod:`dsv4_plugin.cli.bench.peers`): the end of a kernel's
  name, and the function that makes the kernel, or a text that says why there is none,
* ``CHOICE``: the end of the name of the top-k that the engine runs itself; None for no engine.

Every kernel says which function of the engine it calls, and how the engine itself calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsv4_plugin.cli.bench import peers
from dsv4_plugin.cli.bench.peers import Call, Peers
from dsv4_plugin.cli.bench.upstream import flashinfer_peers, sglang_peers, torch_peers, vllm_peers
from dsv4_plugin.cli.bench.upstream.prepared import Maker, tried
from dsv4_plugin.cli.shared import choices

__all__ = ["ENGINES", "choice", "kernels", "load"]

ENGINES = dict(
    zip(choices.ENGINES, (vllm_peers, sglang_peers, flashinfer_peers, torch_peers), strict=True)
)


def kernels(engine: str, form: str) -> dict[str, Call | str]:
    """Return an engine's kernels of a form by name; a text says why a kernel is missing."""
    module = ENGINES[engine]
    name = module.name()
    if name is None:
        return {engine: "it is not installed here"}
    forms: dict[str, tuple[tuple[str, Maker | str], ...]] = module.FORMS
    found: dict[str, Call | str] = {}
    for end, make in forms[form]:
        found |= {name + end: make} if isinstance(make, str) else tried(name + end, make)
    return found


def choice(engine: str) -> str | None:
    """Return the name of the top-k that an engine runs itself; None if there is none."""
    module = ENGINES[engine]
    name, end = module.name(), module.CHOICE
    return None if name is None or end is None else name + end


def load(engines: Sequence[str], forms: Sequence[str], file: Path | None, *, of: str) -> Peers:
    """Return the peers of the forms ``of`` a benchmark: the file's, and the engines' of ``forms``.

    ``forms`` are those of the measured cells. The output names an engine's missing kernels for
    these forms only. If the file and an engine use the same name, the file's kernel keeps it.
    """
    found = peers.load(file, peers.FORMS_OF[of])
    for engine in dict.fromkeys(engines):
        found.add(engine, {form: kernels(engine, form) for form in forms}, choice(engine))
    return found
