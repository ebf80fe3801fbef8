"""The options of every command over servers, and the servers that follow from them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.server.engines import ENGINES, Engine
from benchmarks.server.model import Model
from benchmarks.server.server import Server
from dsv4_plugin.cli.ab import environment
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engines import split
from dsv4_plugin.cli.shared import numbers, outputs
from dsv4_plugin.cli.shared.run import UsageError
from dsv4_plugin.cli.shared.secrets import Secrets

__all__ = ["about", "add_common", "engine", "checked", "make_server", "place"]


def add_common(
    p: argparse.ArgumentParser, *, port: int, ready: float, kv_gib: float, max_model_len: int,
    engines: Iterable[str] = ENGINES,
) -> None:  # fmt: skip
    """Add the options of every command; the values are defaults. ``engines`` can be chosen."""
    add = p.add_argument
    add("--model", type=Path, required=True,
        help="a folder that a script of examples/ (make_tiny_v4.py …) wrote")  # fmt: skip
    add("--json", type=outputs.file, required=True, help="the results file")
    add("--ready", type=numbers.SECONDS, default=ready,
        help=f"the most seconds for the servers to start (default: {ready})")  # fmt: skip
    add("--engine", choices=tuple(engines), default="vllm", help="default: vllm")
    add("--tensor-parallel-size", "--tp-size", type=numbers.COUNT, default=1, dest="gpus",
        metavar="N", help="GPUs of each server; all servers share them (default: 1)")  # fmt: skip
    add("--kv-gib", type=numbers.real(most=1e9), default=kv_gib,
        help=f"cache of each server, on each GPU (vLLM; default: {kv_gib})")  # fmt: skip
    add("--kv-tokens", type=numbers.LENGTH,
        help="cache of each server in tokens (SGLang, TokenSpeed; default: one request of "
        "--max-model-len and a chunk of each other)")  # fmt: skip
    add("--max-model-len", type=numbers.LENGTH, default=max_model_len)
    add("--port", type=numbers.PORT, default=port, help="port of the first server; others follow")
    add(
        "--folder",
        type=outputs.folder,
        help="folder for logs and traces (default: a temporary folder that is removed)",
    )
    add(
        "--server-command",
        type=partial(split, option="--server-command"),
        metavar="COMMAND",
        help="command that gets the model and the arguments (default: the engine's in this Python)",
    )
    add("--commit", help="commit of the plugin, if neither git nor the version names it")
    add("serve", nargs="*", help="after --: further arguments for every server")


def checked(a: argparse.Namespace, servers: int) -> Secrets:
    """Check whether the files and ports of a command can be used; return its secrets.

    Raises:
        UsageError: they cannot.
    """
    if a.port + servers - 1 > 65_535:
        raise UsageError(f"--port {a.port}: {servers} servers need as many ports up to 65535")
    if a.folder is not None:
        outputs.make_folder("--folder", a.folder)
    return Secrets([os.environ], [a.argv, a.server_command or ()])


@contextlib.contextmanager
def place(a: argparse.Namespace) -> Iterator[Path]:
    """Return the folder of the logs: ``--folder``, or a temporary one that is removed."""
    with tempfile.TemporaryDirectory(prefix="dsv4-e2e-") as temporary:
        yield (a.folder or Path(temporary)).absolute()


def engine(a: argparse.Namespace) -> Engine:
    """Return the engine of a run."""
    return ENGINES[a.engine]


def make_server(
    a: argparse.Namespace,
    folder: Path,
    position: int,
    name: str,
    variables: Mapping[str, str],
    arguments: Sequence[str],
    *,
    served: Model,
    requests: int,
    share: float,
    console: Console,
    weights: bool = True,
) -> Server:
    """Return one server of a run, and empty its folder.

    ``position`` chooses its port. It takes ``requests`` at once and a ``share`` of a GPU's memory.
    ``arguments`` come last.
    """
    place, of = folder / name, engine(a)
    given = [
        *of.arguments(served, place / "traces", a, requests, share),
        *([of.parallel, str(a.gpus)] if a.gpus > 1 else []),
        *arguments,
    ]
    return Server(
        name, of, variables, a.model, place, a.port + position, given, console,
        a.server_command or (), weights,
    )  # fmt: skip


def about(a: argparse.Namespace) -> dict[str, Any]:
    """Return machine and versions."""
    machine = environment.machine()
    machine |= environment.versions(
        sys.executable, os.environ, "torch", "triton", engine(a).shipped.distribution
    )
    if a.commit:
        machine["commit"] = a.commit
    return {"machine": machine, "gpus": a.gpus}
