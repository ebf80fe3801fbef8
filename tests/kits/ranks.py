"""Two ranks over gloo: a program of the cases, run in two processes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_two"]


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
