"""Shared by both engines: variants of the settings, one measured call, the check of an answer."""

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
    """The interface to the driver that both engines share."""

    def head(self, document: Row) -> Iterator[str]:
        """Return the lines that are printed before the parts run."""
        yield (f"{document['version']} on {document['machine'].get('gpu', 'no GPU')}, started in "
               f"{document['start_s']} s; stood in for: "
               f"{', '.join(document['stands_in'])}")  # fmt: skip

    def engaged(self) -> contextlib.AbstractContextManager[None]:
        """Return an empty context for the parts, because the engine loads the plugin itself."""
        return contextlib.nullcontext()

    def tables(self, results: list[Row]) -> list[str]:
        """Return no tables: ``benchmarks.tables`` makes them from the file."""
        return []


def settings(values: Mapping[str, str], device: str) -> None:
    """Put the plugin's settings of a variant into the environment, and remove all others."""
    for variable in VARIABLES:
        os.environ.pop(variable.name, None)
    if values:
        os.environ.update({"DSV4_PLUGIN": "1", "DSV4_STRICT": "1", **values})
        if device == "cpu":
            os.environ["DSV4_BACKEND"] = "torch"


def use(variant: str, forget: Callable[[], None], device: str) -> None:
    """Put a variant's settings in force; ``forget`` makes the adapter decide again."""
    settings(VARIANTS[variant], device)
    forget()


def stands_in(known: Mapping[str, str], modules: Iterable[str]) -> dict[str, str]:
    """Return the replaced parts of the engine, with the empty modules."""
    return {**known, **dict.fromkeys(modules, "an empty module: nothing of it is called")}


def agreement(off: torch.Tensor | None, found: torch.Tensor) -> Row:
    """Return how far an answer agrees with ``off``, the answer without the plugin, if given."""
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
    """Call eagerly and check; capture, replay and compare; time. Return the row and the answer.

    ``answer`` returns the sorted set that the outputs hold now. A replay must give the same set.
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
