"""A vLLM server as a child process: start, wait, read its log, stop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.server.client import Client
from benchmarks.server.vllm_side import COPY, OPTIONS
from dsv4_plugin.cli.shared.run import held

__all__ = ["MODEL", "VLLM", "Server", "ServerError"]

MODEL = "v4"
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
HOST = "127.0.0.1"
SIDE = "benchmarks.server.vllm_side:register"
CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")
GRAPHS = re.compile(r"Graph capturing finished in .* took (-?[\d.]+) GiB")
# What the prefix cache keeps of the sliding windows: the end of a prompt, and not a piece of every
# 256 tokens. Those pieces are ten times what a context itself takes, and push it out. 0.33 does so
# by itself, and warns that it does not know the variable.
CACHING = {"VLLM_PREFIX_CACHE_RETENTION_INTERVAL": "0"}
TOLD = re.compile(
    r"dsv4|graph captur|Graph capturing|KV cache size|Model loading took|init engine|"
    r"took .* seconds|Using .* backend|Available KV|WARNING.*(?:topk|indexer)",
    re.I,
)
WRONG = re.compile(r"ERROR|Error|Traceback|raise |assert|CUDA out of memory")


class ServerError(RuntimeError):
    """A server did not start, or is gone."""


class Server:
    """One server and its folder.

    Args:
        name: how it is called in the results.
        environment: variables on top of this process's.
        model: folder of the model, as examples/make_tiny_v4.py or make_tiny_v41.py writes it.
        folder: for its log, traces and status; made anew.
        port: where it listens.
        arguments: further arguments of ``vllm serve``.
        command: what stands for ``vllm``.
    """

    def __init__(
        self,
        name: str,
        environment: Mapping[str, str],
        model: Path,
        folder: Path,
        port: int,
        arguments: Sequence[str] = (),
        command: Sequence[str] = VLLM,
    ) -> None:
        self.name, self.environment = name, dict(environment)
        self.folder, self.log = folder, folder / "serve.log"
        self.traces = folder / "traces"
        self.client = Client(HOST, port, MODEL)
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": str(self.traces),
            "torch_profiler_with_stack": False,
            "torch_profiler_use_gzip": False,
            "torch_profiler_dump_cuda_time_total": False,
            "ignore_frontend": True,
        }
        self.arguments = [
            "serve", str(model.absolute()), "--served-model-name", MODEL,
            "--host", HOST, "--port", str(port),
            "--load-format", "dummy", "--kv-cache-dtype", "fp8",
            "--profiler-config", json.dumps(profiler), *arguments,
        ]  # fmt: skip
        self.command = [*command, *self.arguments]
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.ready_s: float | None = None
        self.captured: list[dict[str, float]] = []  # memory when it began to serve

    def start(self, weights: bool = True) -> None:
        """Start it; :meth:`wait` says when it serves."""
        side = self.folder / "path"
        info = side / "dsv4_e2e-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        # The engine's processes import this folder from the checkout, and the plugin from where it
        # is installed.
        (side / "benchmarks").symlink_to(Path(__file__).resolve().parents[1])
        self.traces.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-e2e\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\ndsv4_e2e = {SIDE}\n")
        (self.folder / OPTIONS).write_text(json.dumps({"weights": weights, "fast_start": True}))
        environment = {**CACHING, **os.environ, **self.environment, "E2E_DIR": str(self.folder)}
        environment["PYTHONPATH"] = os.pathsep.join(
            p for p in (str(side), environment.get("PYTHONPATH", "")) if p
        )
        if allowed := environment.get("VLLM_PLUGINS"):
            environment["VLLM_PLUGINS"] = f"{allowed},dsv4_e2e"
        self.started = time.monotonic()
        with self.log.open("wb") as out, held():  # no server is started and not remembered
            self.process = subprocess.Popen(
                self.command,
                env=environment,
                cwd=self.folder,  # the plugin that is installed, not one in the folder at hand
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def wait(self, deadline: float) -> None:
        """Wait until it answers ``/health``.

        Raises:
            ServerError: it ended, or ``deadline`` (of ``time.monotonic``) passed; with the log.
        """
        while True:
            if not self.alive():
                raise ServerError(f"{self.name} ended while starting\n{self.errors()}")
            with contextlib.suppress(OSError):
                if self.client.get("/health") == 200:
                    self.ready_s = round(time.monotonic() - self.started, 1)
                    self.captured = self.memory()
                    return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready in time\n{self.errors()}")
            time.sleep(0.25)

    def stop(self, grace_s: float = 10) -> None:
        """End it and what it started."""
        process, self.process = self.process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)

    def copy_contexts(self, on: bool) -> None:
        """Let long prompts be copied instead of computed, or no longer."""
        flag = self.folder / COPY
        if on:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)

    @property
    def copies(self) -> bool:
        """Whether copying is on; the server turns it off where it fails."""
        return (self.folder / COPY).exists()

    def lines(self, pattern: re.Pattern[str], most: int = 40, width: int = 400) -> list[str]:
        """Return the log's last lines that match."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return []
        return [line[:width] for line in text.splitlines() if pattern.search(line)][-most:]

    def cache_tokens(self) -> int | None:
        """Return how many tokens the cache holds, as the log says, or None where it does not."""
        found = [m[1] for line in self.lines(CACHE) if (m := CACHE.search(line))]
        return int(found[-1].replace(",", "")) if found else None

    def errors(self) -> str:
        """Return what the log says went wrong, or its end."""
        return "\n".join(self.lines(WRONG) or self.lines(re.compile("."), 20))

    def status(self) -> list[dict[str, Any]]:
        """Return ``dsv4_plugin.status()`` of each of its processes with the model."""
        return self._told("status")

    def memory(self) -> list[dict[str, float]]:
        """Return what torch has of the GPU in each of these processes, in GiB."""
        return self._told("memory")

    def _told(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(p.read_text()) for p in sorted(self.folder.glob(f"{name}-*.json"))]

    def graphs_gib(self) -> float | None:
        """Return the memory of the captured graphs, as the log says, or None."""
        found = [m[1] for line in self.lines(GRAPHS) if (m := GRAPHS.search(line))]
        return float(found[-1]) if found else None

    def about(self) -> dict[str, Any]:
        """Return what the results say of this server."""
        return {
            "environment": self.environment,
            "arguments": [a.replace(str(self.folder), "FOLDER") for a in self.arguments],
            "ready_s": self.ready_s,
            "memory": {
                "graphs_gib": self.graphs_gib(),
                "serving": self.captured,
                "end": self.memory(),
            },
            "status": self.status(),
            "log": self.lines(TOLD),
        }
