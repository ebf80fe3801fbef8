"""Run code in a separate Python process, for tests of imports and registration."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_alone(code: str, folder: Path, files: dict[str, str] | None = None, **env: str) -> str:
    """Run ``code`` in ``folder``, which comes first on its path and gets ``files``.

    Returns what it printed, and fails if it did not end well. No ``DSV4_*`` variable is set but
    those of ``env``.
    """
    for name, text in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}
    environ["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, **env},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
