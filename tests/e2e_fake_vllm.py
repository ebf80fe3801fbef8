"""Stands for ``vllm serve`` in the tests of the runner: the same answers over HTTP, no model.

FAKE_MS      milliseconds a token
FAKE_OTHER   a position at which the token differs from other servers'
FAKE_DIES    end at once, with this message
FAKE_FAILS   to copy contexts
FAKE_CACHE   tokens the cache holds, as its log says
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KERNELS = [
    ("_compress_insert_indexer", 3.0),
    ("FillFunctor<int>", 1.0),
    ("fp8_paged_mqa_logits", 4.0),
]


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def trace(topk: float) -> dict[str, Any]:
    events, now = [], 0.0
    for _ in range(9 * 3):
        for name, dur in [*KERNELS, ("dsv4::topk_kernel", topk)]:
            events.append({"cat": "kernel", "name": name, "ts": now, "dur": dur, "args": {}})
            now += dur + 1
    return {"traceEvents": events}


class Server(ThreadingHTTPServer):
    request_queue_size = 64


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args: object) -> None:
        pass

    def line(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path == "/stop_profile":
            folder = Path(json.loads(option("--profiler-config"))["torch_profiler_dir"])
            (folder / f"rank0.{time.time_ns()}.pt.trace.json").write_text(json.dumps(trace(MS)))
        self.send_response(200)
        self.end_headers()
        if self.path != "/v1/completions":
            return
        assert body["model"] == option("--served-model-name") and body["temperature"] == 0
        if "FAKE_FAILS" in os.environ:
            (Path(os.environ["E2E_DIR"]) / "copy").unlink(missing_ok=True)
        for i in range(body["max_tokens"]):
            time.sleep(MS / 1000)
            token = (sum(body["prompt"]) + i + (i == OTHER)) % 1000
            choice: dict[str, Any] = {"text": "x"}
            if body.get("return_token_ids"):
                choice["token_ids"] = [token]
            self.line({"choices": [choice], "usage": {"completion_tokens": i + 1}})
        self.line({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")


MS = float(os.environ.get("FAKE_MS", "1"))
OTHER = int(os.environ.get("FAKE_OTHER", "-1"))

if __name__ == "__main__":
    assert sys.argv[1] == "serve"
    if "FAKE_DIES" in os.environ:
        sys.exit(f"RuntimeError: {os.environ['FAKE_DIES']}")
    from importlib.metadata import entry_points

    found = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "dsv4_e2e"]
    print("INFO dsv4 stands in, beside", found, flush=True)
    if "FAKE_CACHE" in os.environ:
        print(f"INFO GPU KV cache size: {int(os.environ['FAKE_CACHE']):,} tokens", flush=True)
    print("INFO dsv4: plugins allowed:", os.environ.get("VLLM_PLUGINS"), flush=True)
    status = Path(os.environ["E2E_DIR"]) / f"status-{os.getpid()}.json"
    status.write_text(json.dumps({"host": "fake", "counters": {"topk.decode": 2}}))
    Server(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
