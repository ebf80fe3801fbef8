"""The kernels of the engines that are installed here, as peers of the benchmarks.

One file an engine. Each has ``kernels(form)``, which returns kernels by name in the conventions of
:mod:`dsv4_plugin.cli.bench.peers`, or, in place of a function, why there is none. Every
function says which one of the engine it calls, and how the engine calls it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsv4_plugin.cli.bench import peers
from dsv4_plugin.cli.bench.peers import Call, Peers
from dsv4_plugin.cli.bench.upstream import flashinfer_peers, sglang_peers, torch_peers, vllm_peers
from dsv4_plugin.cli.shared import choices

__all__ = ["ENGINES", "load"]

ENGINES = dict(
    zip(choices.ENGINES, (vllm_peers, sglang_peers, flashinfer_peers, torch_peers), strict=True)
)


def load(engines: Sequence[str], forms: Sequence[str], file: Path | None, *, of: str) -> Peers:
    """Return the peers of the forms ``of`` a benchmark: the file's, and the engines' of ``forms``.

    ``forms`` are those of the cells that are measured: what an engine has not got is said of these
    only. A kernel of the file has the name where both have it.
    """
    found = peers.load(file, peers.FORMS_OF[of])
    for engine in dict.fromkeys(engines):
        module = ENGINES[engine]
        named: dict[str, dict[str, Call | str]] = {form: module.kernels(form) for form in forms}
        found.add(engine, named, module.choice())
    return found
