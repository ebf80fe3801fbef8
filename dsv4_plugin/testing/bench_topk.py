"""``dsv4-plugin bench topk``: the exact top-k over a grid, beside the peers that can be loaded.

Each cell is checked before it is timed: an implementation whose answer is not the k largest scores
is marked ``exact: false`` and kept in the table. *Warm*: the same scores at every launch, as in
serving, where the previous kernel has just written them. *Cold*: a rotation over more memory than
the L2 holds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin import topk
from dsv4_plugin.testing.inputs import scores
from dsv4_plugin.testing.timing import time_graph

__all__ = ["COLUMNS", "KS", "ROWS", "load_peers", "measure", "summary"]

KS = (512, 1024, 2048)
ROWS = (1, 8, 32, 64, 128)
COLUMNS = (8192, 16_384, 32_768, 65_536, 131_072, 256_000)
COLD_BYTES = 150 << 20
OURS = "dsv4"

# (logits, lengths, k, out) → None
TopkCall = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], None]
Row = dict[str, Any]


def load_peers(file: Path | None) -> dict[str, TopkCall | str]:
    """Return the peers by name; a string in place of a function says why one is missing.

    ``file`` is a Python file with ``available() -> dict`` of such functions, for kernels whose
    engine is not installed as a package.
    """
    if file is None:
        return {}
    spec = importlib.util.spec_from_file_location("dsv4_bench_peers", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--peers must be a Python file, got {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.available()


def _ours(logits: torch.Tensor, lengths: torch.Tensor, k: int, out: torch.Tensor) -> None:
    topk(logits, lengths, k, out=out, backend="cuda")


def _exact(logits: torch.Tensor, k: int, out: torch.Tensor) -> bool:
    """Whether ``out`` holds k different columns with the k largest scores of full rows."""
    index = out.long()
    if int(index.min()) < 0 or int(index.max()) >= logits.shape[1]:
        return False
    if bool((index.sort(1).values.diff(dim=1) == 0).any()):
        return False
    got = logits.gather(1, index).float().sort(1).values
    return torch.equal(got, logits.float().topk(k, dim=1).values.sort(1).values)


def _cell(call: TopkCall, held: list[torch.Tensor], k: int) -> Row:
    rows, columns = held[0].shape
    lengths = torch.full((rows,), columns, dtype=torch.int32, device="cuda")
    out = torch.full((rows, k), -1, dtype=torch.int32, device="cuda")
    call(held[0], lengths, k, out)
    torch.cuda.synchronize()
    exact = _exact(held[0], k, out)
    calls = [lambda x=x: call(x, lengths, k, out) for x in held]
    launches = max(20, min(64, len(held)))
    return {
        "warm_us": round(time_graph(calls[:1], launches=40, replays=11), 3),
        "cold_us": round(time_graph(calls, launches=launches, replays=7), 3),
        "exact": exact,
    }


def measure(
    progress: Callable[[str], None],
    peers: dict[str, TopkCall | str],
    *,
    ks: Sequence[int] = KS,
    rows: Sequence[int] = ROWS,
    columns: Sequence[int] = COLUMNS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    kind: str = "normal",
) -> list[Row]:
    """Time every implementation in every cell that it takes."""
    for name, peer in peers.items():
        if isinstance(peer, str):
            progress(f"{name} is not compared: {peer}")
    calls: dict[str, TopkCall] = {OURS: _ours}
    calls |= {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    table: list[Row] = []
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        for r in rows:
            for c in columns:
                copies = max(2, min(64, -(-COLD_BYTES // (r * c * dtype.itemsize))))
                first = scores(kind, r, c, dtype, device="cuda")
                held = [first, *(first.clone() for _ in range(copies - 1))]
                for k in ks:
                    shown = []
                    for name, call in calls.items():
                        try:
                            cell = _cell(call, held, k)
                        except Exception as error:  # outside what this peer takes
                            torch.cuda.synchronize()
                            if name == OURS:
                                raise
                            progress(f"  {name} refuses {short} {r} x {c}, k {k}: {error}"[:160])
                            continue
                        table.append({"dtype": short, "k": k, "rows": r, "columns": c,
                                      "implementation": name, **cell})  # fmt: skip
                        mark = "" if cell["exact"] else "!"
                        shown.append(f"{name} {cell['warm_us']:.2f}{mark}")
                    progress(f"{short:8s} k {k:4d} {r:4d} x {c:6d}  {'  '.join(shown)}")
                del held, first
    return table


def summary(table: list[Row], field: str = "warm_us") -> list[str]:
    """Say for each dtype how ours compares with the best peer of every cell.

    bfloat16 is held against the best peer of any dtype, float32 against the best of float32.
    """
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in table):
        ratios: dict[tuple[int, int, int], float] = {}
        for row in table:
            if row["implementation"] != OURS or row["dtype"] != dtype:
                continue
            cell = (row["k"], row["rows"], row["columns"])
            others = [
                other[field]
                for other in table
                if other["implementation"] != OURS
                and (other["k"], other["rows"], other["columns"]) == cell
                and (dtype == "bfloat16" or other["dtype"] == dtype)
            ]
            if others:
                ratios[cell] = row[field] / min(others)
        if ratios:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            cell, worst = max(ratios.items(), key=lambda item: item[1])
            lines.append(
                f"{dtype} {field}: ours / best peer, geometric mean {mean:.3f} over "
                f"{len(ratios)} cells; worst {worst:.3f} at k {cell[0]}, {cell[1]} x {cell[2]}"
            )
    return lines
