"""Two ranks over gloo: a program of the cases, run in two processes at a time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin.engines.shared.row_shard import Shard

__all__ = ["compared", "digest", "only", "run_two"]


def only(cut: Shard | None, empty: int) -> Shard | None:
    """Give all rows to the other rank than ``empty``."""
    if cut is None:
        return None
    first, last = cut.bounds[0], cut.bounds[-1]
    return Shard(cut.group, (first, (last, first)[not empty], last))


def compared(alone: Sequence[torch.Tensor], both: Sequence[torch.Tensor]) -> dict[str, bool]:
    """Return whether the indices of one rank alone and of two are the same, and their sets."""
    pairs = list(zip(alone, both, strict=True))
    return {
        "same": all(torch.equal(a, b) for a, b in pairs),
        "same_sets": all(torch.equal(a.sort(1).values, b.sort(1).values) for a, b in pairs),
    }


def digest(rows: torch.Tensor) -> str:
    """Return what tells the rows of one rank from those of another in a report."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


def run_two(program: str | None, folder: Path) -> list[Any]:
    """Run ``program RANK FILE OUT`` as ranks 0 and 1; returns what each wrote to its ``OUT``.

    The ranks meet in ``FILE``. A rank has no variable of the plugin or of pytest.
    """
    assert program is not None
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "PYTEST_"))}
    outs = [folder / f"{rank}.json" for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), folder / "meet", out],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, out in enumerate(outs)
    ]  # fmt: skip
    try:
        for one in started:
            said, _ = one.communicate(timeout=300)
            assert one.returncode == 0, said[-6000:]
    finally:
        for one in started:
            one.kill()
    return [json.loads(out.read_text()) for out in outs]
