"""The peers of a benchmark: kernels from a Python file, and figures recorded in another run."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4_plugin.cli.shared.run import UsageError, reading

__all__ = [
    "FORMS",
    "FORMS_OF",
    "OURS",
    "Call",
    "Peers",
    "is_vllm_choice",
    "load",
    "recorded",
    "seed_figures",
]

OURS = "dsv4"
SEED = Path(__file__).with_name("seed_vllm_40811.csv")
VLLM_COOPERATIVE_ROWS = 64  # vLLM 0.33 takes cooperative_topk up to here, persistent_topk above

# decode: (logits, lengths, k, out) → None; prefill: (logits, row_starts, row_ends, k, out) → None;
# paged: (logits, lengths, page_table, k, out) → None, pages of 64, `out` in pool slots.
# out is int32 [rows, k]; its indices count from the row's start, in any order.
# sglang_… and tokenspeed_…: an engine's own function, called as the engine calls it.
# logits: (q, cache, weights, lengths [batch, next_n], block_table, dtype) → logits;
# ragged_logits: (q, k, k_scale, weights, row_starts, row_ends, dtype) → logits, a column a key.
Call = Callable[..., Any]
Row = dict[str, Any]


# The functions of a peers file, by the form of what they return.
FORMS = {
    "decode": "available",
    "prefill": "available_prefill",
    "paged": "available_paged",
    "logits": "available_logits",
    "ragged_logits": "available_ragged_logits",
    "sglang_paged": "available_sglang_paged",
    "tokenspeed_decode": "available_tokenspeed_decode",
    "tokenspeed_dsv4_decode": "available_tokenspeed_dsv4_decode",
    "tokenspeed_prefill": "available_tokenspeed_prefill",
    "tokenspeed_gather": "available_tokenspeed_gather",
    "tokenspeed_read": "available_tokenspeed_read",
}
TOPK_FORMS = ("decode", "prefill", "paged")
FORMS_OF = {  # by benchmark
    "topk": TOPK_FORMS,
    "logits": ("logits", "ragged_logits"),
    "chain": ("logits", "decode"),
}
TORCH = "torch"


class Peers:
    """The kernels of other engines by name; a string in place of a function says why it is none."""

    def __init__(self, **forms: dict[str, Call | str]) -> None:
        self._calls = {
            form: {name: call for name, call in forms.get(form, {}).items() if callable(call)}
            for form in FORMS
        }
        every = {name: call for named in forms.values() for name, call in named.items()}
        self.missing = {name: why for name, why in every.items() if isinstance(why, str)}
        self._engine: dict[str, str] = {}  # of the kernels that an engine here has brought
        self.choices: dict[str, str] = {}  # engine -> the name of the top-k that it runs itself

    def add(self, engine: str, forms: dict[str, dict[str, Call | str]], choice: str | None) -> None:
        """Add what an installed engine has; what is there already keeps its name."""
        for form, named in forms.items():
            for name, call in named.items():
                if isinstance(call, str):
                    self.missing[name] = call
                elif name not in self._calls[form]:
                    self._calls[form][name] = call
                    self._engine[name] = engine
        if choice is not None:
            self.choices[engine] = choice

    def choice(self, engine: str, asked: str | None, usual: str) -> str:
        """Return the top-k that stands for an engine: ``asked``, ``usual``, or its own."""
        if asked is None and usual not in self._calls["decode"]:
            return self.choices.get(engine, usual)
        return asked or usual

    def chains(self, choices: Sequence[str]) -> list[tuple[str, str]]:
        """Return logits kernel and top-k of every chain: of one engine, or of a file and another.

        The top-k are the ``choices``; torch's goes with torch's logits only.
        """
        ends = {*choices, *self.choices.values()} if self.choices else set(choices)
        found = []
        for first in self._calls["logits"]:
            for last in self._calls["decode"]:
                engines = {self._engine.get(first), self._engine.get(last)}
                together = len(engines) == 1 or (None in engines and TORCH not in engines)
                if last in ends and together:
                    found.append((first, last))
        return found

    def __getitem__(self, form: str) -> dict[str, Call]:
        """Return the kernels of one of :data:`FORMS`."""
        return self._calls[form]


def load(file: Path | None, forms: Sequence[str] = TOPK_FORMS) -> Peers:
    """Load the kernels of ``forms`` from ``file``, which must have one of them."""
    if file is None:
        return Peers()
    module = _module(file)
    found = {form: FORMS[form] for form in forms if hasattr(module, FORMS[form])}
    if not found:
        names = " or ".join(f"{FORMS[form]}()" for form in forms)
        raise UsageError(f"--peers must be a file with a function {names}, got {file}")
    return Peers(**{form: getattr(module, name)() for form, name in found.items()})


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dsv4_bench_peers", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--peers must be a Python file, got {file}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise UsageError(
            f"--peers {file} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module


def recorded(file: Path) -> list[Row]:
    """Read cells that were measured in another run, marked as such.

    Columns: k, rows, columns, package, kernel, dtype, warm_us, cold_us (may be empty).
    """
    with reading(f"--against {file}", "file of recorded figures"):
        return _recorded(file)


def _recorded(file: Path) -> list[Row]:
    need = {"k", "rows", "columns", "package", "kernel", "dtype", "warm_us", "cold_us"}
    text = file.read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines())
    missing = need - set(reader.fieldnames or ())
    if missing:
        raise UsageError(
            f"--against must be a CSV with the columns {', '.join(sorted(need))}, got {file} "
            f"without {', '.join(sorted(missing))}"
        )
    return [
        {
            "suite": "decode",
            "dtype": line["dtype"],
            "k": int(line["k"]),
            "rows": int(line["rows"]),
            "columns": int(line["columns"]),
            "implementation": f"{line['package']} {line['kernel']}",
            "warm_us": float(line["warm_us"]) if line["warm_us"] else None,
            "cold_us": float(line["cold_us"]) if line["cold_us"] else None,
            "recorded": file.name,
        }
        for line in reader
    ]


def is_vllm_choice(row: Row, name: str) -> bool:
    """Whether a result is what vLLM 0.33 itself runs in this cell.

    ``name`` is the implementation that stands for it among the loaded peers.
    """
    if not row.get("recorded"):
        return row["implementation"] == name
    cooperative = row["rows"] <= VLLM_COOPERATIVE_ROWS
    return row["implementation"] == (
        f"vllm 0.33.0 {'cooperative' if cooperative else 'persistent'}_topk"
    )


def seed_figures() -> dict[tuple[int, int, int], float]:
    """Return the seed's speed-up of bfloat16 over float32 by (k, rows, columns)."""
    with SEED.open(newline="") as stream:
        lines = [line for line in stream if not line.startswith("#")]
    return {
        (int(line["k"]), int(line["rows"]), int(line["columns"])): float(line["speedup"])
        for line in csv.DictReader(lines)
    }
