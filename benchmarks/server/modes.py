"""vLLM's modes, without the plugin and with it: ``python -m benchmarks.server.modes``.

Every mode is a pair of servers with the same arguments. They do what the servers of the drills do
(:mod:`.drills`) with nothing broken: each answers all requests, says in one clear line for each
kind of layer who serves, and counts the calls that the expected side served. The answers of both
are compared, and so are the two answers of each to the same prompt. With random weights neither
must be equal: bfloat16 scores select other keys, and vLLM's own kernels may add up in another order
from call to call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.server import drills, model
from benchmarks.server.client import at_once, random_prompt
from benchmarks.server.server import Server
from benchmarks.server.vllm_drills import SCORED
from benchmarks.tool import tool

__all__ = ["MODES", "Mode", "main", "parser"]

_HITS = re.compile(r"^vllm:prefix_cache_hits_total\{.*\} ([\d.e+]+)$", re.M)
SHARED = 4096  # tokens of the prompts that share their beginning


@dataclass(frozen=True)
class Mode:
    """One mode.

    Attributes:
        name: the name of the mode, and of its server with the plugin.
        arguments: the arguments of both servers.
        environment: further variables of the server with the plugin.
        kinds: the kinds of model that have this mode, with the names of :mod:`.model`; none: all.
        pair: whether the mode has a server without the plugin; otherwise the first mode's is taken.
        cached: whether prompts are sent again that share their beginning with others.
    """

    name: str
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    pair: bool = True
    cached: bool = False


def _speculative(name: str, method: str, tokens: int, kind: str) -> Mode:
    """Return a mode with drafts; its graphs are of 1 to 16 requests."""
    rows = tokens + 1
    sizes = [str(rows * n) for n in (1, 2, 4, 8, 16)]
    given = f'{{"method": "{method}", "num_speculative_tokens": {tokens}}}'
    arguments = ("--speculative-config", given, "--cudagraph-capture-sizes", *sizes)
    return Mode(name, arguments, kinds=(kind,))


MODES = (
    Mode("default"),
    Mode("fp32", environment={"DSV4_TOPK": "fp32"}, pair=False),
    Mode("eager", ("--enforce-eager",)),
    Mode("piecewise", ("-cc.cudagraph_mode=PIECEWISE",)),
    Mode("full", ("-cc.cudagraph_mode=FULL_DECODE_ONLY",)),
    _speculative("mtp", "mtp", 1, model.V4),
    _speculative("mtp3", "mtp", 3, model.V4),
    _speculative("dspark", "dspark", 5, model.V41),
    Mode("prefix", ("--max-num-batched-tokens", "2048"), cached=True),
)


def _share(server: Server) -> None:
    """Send prompts that share their beginning with one that was sent before, all at once.

    Raises:
        RuntimeError: a request failed, or vLLM counted no hit in its prefix cache.
    """
    start = random_prompt(SHARED, 7)
    server.client.complete(start, 2)
    more = [start + random_prompt(n, 700 + n) for n in (40, 300, 2500, 5000)]
    fresh = [random_prompt(n, 800 + n) for n in (600, 3000, 9000)]
    at_once(lambda prompt: server.client.complete(prompt, drills.TOKENS), [*more, *fresh])
    found = _HITS.findall(server.client.read("/metrics").decode())
    if not any(map(float, found)):
        raise RuntimeError(f"the prefix cache had {found or 'no'} hits")


def _pair(mode: Mode) -> list[drills.Drill]:
    """Return the servers of a mode."""
    off = f"{mode.name}_off" if mode.pair else f"{MODES[0].name}_off"
    one = partial(
        drills.Drill, arguments=mode.arguments, upstream=False, base=off, kinds=mode.kinds,
        act=_share if mode.cached else None, same=False,
    )  # fmt: skip
    said = " ".join(mode.arguments) or "the default"
    # In float32 ``auto`` may leave every call of these lengths to vLLM (``aside``).
    served = ("topk.decode|topk.decode.aside", "topk.prefill|topk.prefill.aside", "gather")
    dtype = mode.environment.get("DSV4_TOPK", r"\w+")
    with_it = one(
        mode.name, f"nothing: {said}", rf"top-k: {dtype} by cuda", counts=served,
        environment={"DSV4_PLUGIN": "1", **mode.environment},
    )  # fmt: skip
    if not mode.pair:
        return [with_it]
    without = one(
        off, f"nothing: {said}, without the plugin", "DSV4_PLUGIN=0: nothing is patched",
        environment={"DSV4_PLUGIN": "0"}, never=SCORED,
    )  # fmt: skip
    return [without, with_it]


SERVERS = tuple(server for mode in MODES for server in _pair(mode))
parser = partial(drills.parser, "benchmarks.server.modes", __doc__, {"vllm": SERVERS})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every server did what is expected of it."""
    return tool(parser(), drills.run, argv)


if __name__ == "__main__":
    sys.exit(main())
