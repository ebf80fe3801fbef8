"""Shared by the tests of commands over servers: the model, and servers without a model."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

from kits.packaging_tools import ROOT

FAKE = f"{sys.executable} {ROOT / 'tests' / 'kits' / 'e2e_fake_server.py'}"


def free_ports(count: int) -> int:
    """The first of this many consecutive free ports."""
    for _ in range(200):
        with contextlib.ExitStack() as stack:
            first, *others = (stack.enter_context(socket.socket()) for _ in range(count))
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for i, other in enumerate(others, 1):
                    other.bind(("127.0.0.1", port + i))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError(f"no {count} free ports in a row")


def tiny_model(folder: Path, kind: str = "v4") -> Path:
    """The model that is served, in this folder."""
    maker = [sys.executable, ROOT / "examples" / f"make_tiny_{kind}.py", folder]
    subprocess.run([str(part) for part in maker], check=True)
    return folder
