"""What every command over servers takes, and the servers that follow from it."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.server import measure
from benchmarks.server.model import Model
from benchmarks.server.server import VLLM, Server

__all__ = ["about", "add_common", "engine", "make_server", "number", "parsed", "place"]

UNITS = {"k": 1024, "m": 1024 * 1024}
GRAPHS = (1, 2, 4, 8, 16, 32, 64)  # requests of a captured batch


def number(text: str) -> int:
    """Return ``64K`` as 65536."""
    unit = UNITS.get(text[-1:].lower())
    return int(text[:-1]) * unit if unit else int(text)


def add_common(
    p: argparse.ArgumentParser, *, port: int, ready: float, kv_gib: float, max_model_len: int
) -> None:
    """Add the options of every command; the values are defaults."""
    add = p.add_argument
    add("--model", type=Path, required=True,
        help="as examples/make_tiny_v4.py or make_tiny_v41.py writes it")  # fmt: skip
    add("--json", type=Path, required=True, help="the results")
    add("--ready", type=float, default=ready,
        help=f"seconds for the servers to start (default: {ready})")  # fmt: skip
    add("--kv-gib", type=float, default=kv_gib,
        help=f"cache of each server (default: {kv_gib})")  # fmt: skip
    add("--max-model-len", type=number, default=max_model_len)
    add("--port", type=int, default=port, help="of the first server; the others follow")
    add("--folder", type=Path, help="logs and traces (default: a temporary folder, removed)")
    add("--vllm", type=shlex.split, metavar="COMMAND",
        help="what to run as vllm (default: the vLLM of this Python)")  # fmt: skip
    add("--commit", help="of the plugin, where neither git nor the version says it")
    add("serve", nargs="*", help="after --: further arguments of vllm serve, for every server")


def parsed(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and look whether its files can be used."""
    a = p.parse_args(argv)
    if not (a.model / "config.json").exists():
        p.error(f"--model {a.model}: no config.json there")
    a.json.parent.mkdir(parents=True, exist_ok=True)
    return a


@contextlib.contextmanager
def place(a: argparse.Namespace) -> Iterator[Path]:
    """Give the folder of the logs: ``--folder``, or one that goes."""
    with tempfile.TemporaryDirectory(prefix="dsv4-e2e-") as temporary:
        yield (a.folder or Path(temporary)).absolute()


def engine(
    a: argparse.Namespace, model: Model, *, max_num_seqs: int, memory_share: float
) -> list[str]:
    """Return the arguments of ``vllm serve`` that all servers of a run have."""
    sizes = [str(n) for n in GRAPHS if n <= max_num_seqs]
    return [
        *model.arguments,
        "--max-model-len", str(a.max_model_len),
        "--max-num-seqs", str(max_num_seqs),
        "--max-num-batched-tokens", str(measure.CHUNK),
        "--kv-cache-memory-bytes", str(int(a.kv_gib * 2**30)),
        "--gpu-memory-utilization", f"{memory_share:.2f}",
        "--seed", "0", "--cudagraph-capture-sizes", *sizes,
    ]  # fmt: skip


def make_server(
    a: argparse.Namespace,
    folder: Path,
    position: int,
    name: str,
    environment: Mapping[str, str],
    arguments: Sequence[str],
) -> Server:
    """Return one server of a run, the ``position`` its port; its folder is emptied."""
    own = folder / name
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    port = a.port + position
    return Server(name, environment, a.model, own, port, arguments, a.vllm or VLLM)


def about(commit: str | None) -> dict[str, Any]:
    """Return machine and versions; asked of a child, so that this process takes no GPU memory."""
    code = (
        "import json; from dsv4_plugin.cli.checks.timing import machine; "
        "print(json.dumps(machine()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    try:
        machine = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        machine = {"error": done.stderr[-500:]}
    try:
        machine["vllm"] = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        machine["vllm"] = None
    if commit:
        machine["commit"] = commit
    return {"machine": machine}
