"""The peers of a benchmark: kernels from a Python file, and those of installed engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4_plugin.cli.shared.run import UsageError

__all__ = ["FORMS_OF", "Call", "Peers", "load"]

# decode: (logits, lengths, k, out) → None; prefill: (logits, row_starts, row_ends, k, out) → None;
# paged: (logits, lengths, page_table, k, out) → None, with pages of 64 and pool slots in `out`.
# out is int32 [rows, k]; its indices count from the row's start, in any order.
# logits: (q, cache, weights, lengths [batch, next_n], block_table, dtype) → logits;
# ragged_logits: (q, k, k_scale, weights, row_starts, row_ends, dtype) → logits, a column per key.
Call = Callable[..., Any]

TOPK_FORMS = ("decode", "prefill", "paged")
FORMS_OF = {  # by benchmark
    "topk": TOPK_FORMS,
    "logits": ("logits", "ragged_logits"),
    "chain": ("logits", "decode"),
}
TORCH = "torch"


class Peers:
    """The kernels of other engines by name; in place of a function, why it is missing."""

    def __init__(self, **forms: dict[str, Call | str]) -> None:
        self._calls = {
            form: {name: call for name, call in named.items() if callable(call)}
            for form, named in forms.items()
        }
        every = {name: call for named in forms.values() for name, call in named.items()}
        self.missing = {name: why for name, why in every.items() if isinstance(why, str)}
        # engine by kernel, for the kernels of an installed engine
        self._engine: dict[str, str] = {}
        self.choices: dict[str, str] = {}  # engine -> the name of the top-k that it runs itself

    def add(self, engine: str, forms: dict[str, dict[str, Call | str]], choice: str | None) -> None:
        """Add the kernels of an installed engine; a kernel that is already there keeps its name."""
        for form, named in forms.items():
            calls = self._calls.setdefault(form, {})
            for name, call in named.items():
                if isinstance(call, str):
                    self.missing[name] = call
                elif name not in calls:
                    calls[name] = call
                    self._engine[name] = engine
        if choice is not None:
            self.choices[engine] = choice

    def choice(self, engine: str, asked: str | None, usual: str) -> str:
        """Return the top-k that stands for an engine: ``asked``, ``usual``, or its own."""
        if asked is None and usual not in self["decode"]:
            return self.choices.get(engine, usual)
        return asked or usual

    def chains(self, choices: Sequence[str]) -> list[tuple[str, str]]:
        """Return logits kernel and top-k of each chain: of one engine, or of a file and another.

        The top-k are the ``choices``; torch's top-k goes only with torch's logits.
        """
        ends = {*choices, *self.choices.values()} if self.choices else set(choices)
        found = []
        for first in self["logits"]:
            for last in self["decode"]:
                engines = {self._engine.get(first), self._engine.get(last)}
                together = len(engines) == 1 or (None in engines and TORCH not in engines)
                if last in ends and together:
                    found.append((first, last))
        return found

    def __getitem__(self, form: str) -> dict[str, Call]:
        """Return the kernels of a form; none where nothing has any."""
        return self._calls.get(form, {})


def _function(form: str) -> str:
    """Return the function of a peers file that has the kernels of a form."""
    return "available" if form == "decode" else f"available_{form}"


def load(file: Path | None, forms: Sequence[str] = TOPK_FORMS) -> Peers:
    """Load the kernels of ``forms`` from ``file``, which must have at least one form."""
    if file is None:
        return Peers()
    module = _module(file)
    found = {form: _function(form) for form in forms if hasattr(module, _function(form))}
    if not found:
        names = " or ".join(f"{_function(form)}()" for form in forms)
        raise UsageError(f"--peers must be a file with a function {names}, got {file}")
    return Peers(**{form: getattr(module, name)() for form, name in found.items()})


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dsv4_bench_peers", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--peers must be a Python file, got {file}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file can raise anything
        raise UsageError(
            f"--peers {file} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module
