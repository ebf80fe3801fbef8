"""What every command over servers takes, and the servers that follow from it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import UsageError
from dsv4_plugin.cli.shared.secrets import Secrets

__all__ = ["about", "add_common", "engine", "checked", "make_server", "place", "words"]

GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384)  # requests of a captured batch


def add_common(
    p: argparse.ArgumentParser, *, port: int, ready: float, kv_gib: float, max_model_len: int
) -> None:
    """Add the options of every command; the values are defaults."""
    add = p.add_argument
    add("--model", type=Path, required=True,
        help="as examples/make_tiny_v4.py or make_tiny_v41.py writes it")  # fmt: skip
    add("--json", type=outputs.file, required=True, help="the results")
    add("--ready", type=numbers.SECONDS, default=ready,
        help=f"seconds for the servers to start (default: {ready})")  # fmt: skip
    add("--kv-gib", type=numbers.POSITIVE, default=kv_gib,
        help=f"cache of each server (default: {kv_gib})")  # fmt: skip
    add("--max-model-len", type=numbers.LENGTH, default=max_model_len)
    add("--port", type=numbers.PORT, default=port, help="of the first server; the others follow")
    add(
        "--folder",
        type=outputs.folder,
        help="logs and traces (default: a temporary folder, removed)",
    )
    add("--vllm", type=words, metavar="COMMAND",
        help="what to run as vllm (default: the vLLM of this Python)")  # fmt: skip
    add("--commit", help="of the plugin, where neither git nor the version says it")
    add("serve", nargs="*", help="after --: further arguments of vllm serve, for every server")


def words(text: str) -> list[str]:
    """Split a text as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r} cannot be split: {error}") from error


def checked(a: argparse.Namespace, servers: int) -> Secrets:
    """Look whether the files and ports of a command can be used; returns its secrets.

    Raises:
        UsageError: they cannot.
    """
    if a.port + servers - 1 > 65_535:
        raise UsageError(f"--port {a.port}: {servers} servers need as many ports up to 65535")
    if a.folder is not None:
        outputs.make_folder("--folder", a.folder)
    return Secrets([os.environ], [a.argv, a.vllm or ()])


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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace"
    )
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
