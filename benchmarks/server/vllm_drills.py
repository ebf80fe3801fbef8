"""The drills of vLLM."""

from __future__ import annotations

import json
from functools import partial

from benchmarks.server import model
from benchmarks.server.drill import (
    SHADOW,
    Drill,
    capability,
    failing,
    fault,
    off,
    serving,
    without_library,
)
from benchmarks.server.server import Server

__all__ = ["DRILLS", "SCORED"]

_TOPK = ("topk.decode", "topk.prefill")
SCORED = (*_TOPK, "logits.plugin")
_ALL = (*SCORED, "gather")
_SLEEPS = {"VLLM_SERVER_DEV_MODE": "1"}


def _sleep(server: Server, level: int) -> None:
    """Put the engine to sleep and wake it up. Level 2 does not restore the weights."""
    server.client.read(f"/sleep?level={level}", {})
    if not json.loads(server.client.read("/is_sleeping"))["is_sleeping"]:
        raise RuntimeError("it does not sleep after /sleep")
    server.client.read("/wake_up", {})


def _candidates(op: str) -> Drill:
    """Return the drill in which an op of two-level selection fails."""
    return failing(
        op, op, ("topk.decode.upstream",), ("candidates.consumer",), kinds=(model.V41,)
    )  # fmt: skip


DRILLS = (
    off("--plugin dsv4", SCORED),
    serving("on", "nothing: the plugin serves", _ALL),
    capability(_ALL),
    without_library(SCORED),
    Drill(
        "seam", "a function of vLLM's that is patched has other parameters",
        r"the engine's own code stays at topk\.prefill \(.*top_k_per_row_prefill", fault("seam"),
        counts=("gather",), never=SCORED,
    ),
    failing("topk", "the top-k", ("topk.decode.upstream", "gather"), _TOPK),
    failing("logits", "the logits kernel", ("topk.decode.upstream", "gather"), ("topk.decode",)),
    failing(
        "gather", "the gather of the keys", (*_TOPK, "gather.upstream"), ("gather",), "gather",
        upstream=False,
    ),
    serving(
        "shadow",
        "nothing: vLLM's selection runs beside the plugin's in float32, on the same scores",
        _TOPK, SHADOW, dtype="fp32", shadow=("decode", "prefill"),
    ),
    serving(
        "sleep", "nothing: the engine sleeps (level 1) and wakes up between two rounds",
        _ALL, _SLEEPS, ("--enable-sleep-mode",), act=partial(_sleep, level=1),
    ),
    serving(
        "sleep2", "nothing: the engine sleeps at level 2, where the shadow's counters must survive",
        _TOPK, {**SHADOW, **_SLEEPS}, ("--enable-sleep-mode",), "fp32",
        shadow=("decode", "prefill"), act=partial(_sleep, level=2), same=False,
    ),
    serving(
        "candidates", "nothing: the plugin serves the source of the candidates and its consumers",
        (*_ALL, "candidates.source", "candidates.consumer"), never=("candidates.source.engine",),
        kinds=(model.V41,),
    ),
    Drill(
        "candidate_seam", "vLLM's selection of candidate blocks has other parameters",
        r"top-k: the engine's \(.*_select_candidate_blocks takes \(anything\)",
        fault("candidate_seam"), never=("candidates.source", "candidates.consumer"),
        upstream=False, kinds=(model.V41,),
    ),
    *map(_candidates, ("block_maxima", "select_blocks", "candidate_select")),
)  # fmt: skip
