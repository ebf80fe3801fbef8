"""What both engines share: variants of the settings, one measured call, how an answer is judged."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

import dsv4_plugin
from benchmarks.engines.forward.variants import VARIANTS
from benchmarks.engines.part import Row, eager_us
from dsv4_plugin.cli.bench.logits.chain import shared
from dsv4_plugin.cli.checks.timing import time_graph
from dsv4_plugin.envs import VARIABLES
from dsv4_plugin.state import state

__all__ = [
    "ForwardSide",
    "agreement",
    "measured",
    "settings",
    "stands_in",
    "use",
]


class ForwardSide:
    """What the driver asks of either engine, and both answer alike."""

    def head(self, document: Row) -> Iterator[str]:
        """Give what is said before the parts are run."""
        yield (f"{document['version']} on {document['machine'].get('gpu', 'no GPU')}, started in "
               f"{document['start_s']} s; stood in for: "
               f"{', '.join(document['stands_in'])}")  # fmt: skip

    def engaged(self) -> contextlib.AbstractContextManager[None]:
        """Return what the parts run in: nothing, the engine loads the plugin itself."""
        return contextlib.nullcontext()

    def tables(self, results: list[Row]) -> list[str]:
        """Return no tables: ``benchmarks.tables`` makes them of the file."""
        return []


def settings(values: Mapping[str, str], device: str) -> None:
    """Put the plugin's settings of a variant into the environment, and no others."""
    for variable in VARIABLES:
        os.environ.pop(variable.name, None)
    if values:
        os.environ.update({"DSV4_PLUGIN": "1", "DSV4_STRICT": "1", **values})
        if device == "cpu":
            os.environ["DSV4_BACKEND"] = "torch"


def use(variant: str, forget: Callable[[], None], device: str) -> None:
    """Put a variant's settings in force; ``forget`` makes the adapter decide anew."""
    settings(VARIANTS[variant], device)
    forget()


def stands_in(known: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Return what is not the engine's own, with the modules that are empty."""
    return {**known, **dict.fromkeys(modules, "an empty module: nothing of it is called")}


def agreement(off: torch.Tensor | None, found: torch.Tensor) -> Row:
    """Return how far an answer agrees with ``off``, the engine's without the plugin, if any."""
    if off is None:
        return {}
    mean, worst = shared(off, found)
    return {"agreement": round(mean, 6), "agreement_worst": round(worst, 6)}


def measured(
    call: Callable[[], Any],
    soil: Callable[[], Any],
    answer: Callable[[], torch.Tensor],
    judge: Callable[[torch.Tensor], Row],
    arguments: argparse.Namespace,
    *,
    graph: bool = True,
    plugin: bool = True,
) -> tuple[Row, torch.Tensor]:
    """Call eagerly and judge; capture, replay and compare; time. Returns the row and the answer.

    ``answer`` gives the sorted set that the outputs hold now. A replay must leave the same.
    """
    state.counters.clear()
    soil()
    call()
    first = answer().clone()
    row: Row = {"graph": False, "us": None, **judge(first)}
    row["counters"] = dict(dsv4_plugin.status()["counters"])
    if arguments.device != "cuda":
        row["us"] = round(eager_us(call, "cpu"), 3)
        return row, first
    if graph:
        held = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(held):
            call()
        soil()
        held.replay()
        torch.cuda.synchronize()
        row["same_in_graph"] = torch.equal(answer(), first)
        row["graph"] = True
        row["us"] = round(
            time_graph([call], launches=arguments.launches, replays=arguments.replays), 3
        )
    else:
        row["us"] = round(eager_us(call, "cuda"), 3)
    if plugin and not row.get("same_in_graph", True):
        row["right"] = False
    return row, first
