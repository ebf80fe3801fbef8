"""The engines' own kernels for the calls that the adapters take, from the engines installed here.

Each is called as the engine calls it. What is not installed, or fails as it is imported, is named
with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsv4_plugin.cli.bench.peers import Call, Peers
from dsv4_plugin.cli.bench.upstream import sglang_peers
from dsv4_plugin.cli.bench.upstream.prepared import Maker, imported, release, tried
from dsv4_plugin.engines.tokenspeed import probe

__all__ = ["peers"]

# What TokenSpeed's runtime passes beside the arguments that the plugin's kernels take, too.
DSA = {"batch_invariant": False, "slot_order": "selection"}
NO_GATHER = "its prefill kernel reads the plane itself, there is no gather by slot"


def peers() -> Peers:
    """Return what is installed here of SGLang and TokenSpeed, by the forms of ``Peers``."""
    makers: dict[str, tuple[str, Maker | str]] = {
        "sglang_paged": ("sglang", sglang_peers.paged_with_raw),
        "tokenspeed_decode": ("tokenspeed", functools.partial(_facade, "dsa_decode_topk", **DSA)),
        "tokenspeed_dsv4_decode": (
            "tokenspeed",
            functools.partial(_facade, "dsv4_decode_topk", index_k_format="fp8_scaled"),
        ),
        "tokenspeed_prefill": ("tokenspeed", functools.partial(_facade, "dsa_prefill_topk", **DSA)),
        "tokenspeed_gather": ("tokenspeed", NO_GATHER),
        "tokenspeed_read": ("tokenspeed", _reader),
    }
    return Peers(**{form: _named(form, *made) for form, made in makers.items()})


def _named(form: str, engine: str, make: Maker | str) -> dict[str, Call | str]:
    call = "v2" if engine == "sglang" else form.removeprefix("tokenspeed_").replace("_", " ")
    installed = release(engine)
    if installed is None:
        return {f"{engine} {call}": "it is not installed here"}
    name = f"{installed} {call}"
    return {name: make} if isinstance(make, str) else tried(name, make)


def _facade(name: str, **more: Any) -> Callable[..., Any]:
    """Return a facade of TokenSpeed's registry, which chooses among TokenSpeed's own kernels.

    The plugin has registered none there, since nothing has asked for it in this process.
    """
    family = name.partition("_")[0]
    return functools.partial(getattr(imported(f"{probe.FACADES}.{family}"), name), **more)


def _reader() -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Return TokenSpeed's reader of the FP8 index cache, a loop over the slots."""
    read: Any = imported(probe.OPS).read_deepseek_v4_indexer_fp8_cache
    return read
