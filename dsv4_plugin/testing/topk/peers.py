"""The peers of the top-k: kernels from a Python file, and figures recorded in another run."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dsv4_plugin.testing.topk import UsageError

__all__ = ["OURS", "Call", "Peers", "is_vllm_choice", "load", "recorded", "seed_figures"]

OURS = "dsv4"
SEED = Path(__file__).with_name("seed_vllm_40811.csv")
VLLM_COOPERATIVE_ROWS = 64  # vLLM 0.33 takes cooperative_topk up to here, persistent_topk above

# decode: (logits, lengths, k, out) → None; prefill: (logits, row_starts, row_ends, k, out) → None;
# paged: (logits, lengths, page_table, k, out) → None, pages of 64, `out` in pool slots.
# out is int32 [rows, k]; its indices count from the row's start, in any order.
Call = Callable[..., Any]
Row = dict[str, Any]


class Peers:
    """The kernels of other engines by name; a string in place of a function says why it is none."""

    def __init__(
        self,
        decode: dict[str, Call | str],
        prefill: dict[str, Call | str],
        paged: dict[str, Call | str] | None = None,
    ) -> None:
        self.decode = {name: call for name, call in decode.items() if not isinstance(call, str)}
        self.prefill = {name: call for name, call in prefill.items() if not isinstance(call, str)}
        paged = paged or {}
        self.paged = {name: call for name, call in paged.items() if not isinstance(call, str)}
        every = {**decode, **prefill, **paged}
        self.missing = {name: why for name, why in every.items() if isinstance(why, str)}


def load(file: Path | None) -> Peers:
    """Load ``file``: ``available()`` returns the decode kernels, two more functions others."""
    if file is None:
        return Peers({}, {})
    module = _module(file)
    if not hasattr(module, "available"):
        raise UsageError(f"--peers must be a file with a function available(), got {file}")
    prefill = module.available_prefill() if hasattr(module, "available_prefill") else {}
    paged = module.available_paged() if hasattr(module, "available_paged") else {}
    return Peers(module.available(), prefill, paged)


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("dsv4_bench_peers", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--peers must be a Python file, got {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(file: Path) -> list[Row]:
    """Read cells that were measured in another run, marked as such.

    Columns: k, rows, columns, package, kernel, dtype, warm_us, cold_us (may be empty).
    """
    need = {"k", "rows", "columns", "package", "kernel", "dtype", "warm_us", "cold_us"}
    try:
        text = file.read_text()
    except OSError as error:
        raise UsageError(f"--against cannot be read: {error}") from error
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
