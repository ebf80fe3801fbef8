"""A server that streams tokens as vLLM (/v1/completions) and SGLang (/generate) do, and can fail.

    python fake_server.py [anything] --port N [options]

With ``DSV4_PLUGIN=1`` it behaves like a worker with the plugin: it has the plugin's counters,
status file and log line. It writes REPEATED to its log for each prompt that comes twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="*")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--first-ms", type=float, default=4.0)
parser.add_argument("--token-ms", type=float, default=2.0)
parser.add_argument("--gain", type=float, default=1.0, help="of the times, with the plugin")
parser.add_argument("--compile", type=int, default=0, help="so many requests are slow at first")
parser.add_argument("--start-s", type=float, default=0.0)
parser.add_argument("--die-at-start", type=int, help="exit code")
parser.add_argument("--never-healthy", action="store_true")
parser.add_argument("--die-at-request", type=int, default=0)
parser.add_argument("--fail-at-request", type=int, default=0)
parser.add_argument("--engage", default="both", choices=("both", "log", "never", "failure"))
parser.add_argument("--stubborn", action="store_true", help="ends by SIGKILL only")
parser.add_argument("--children", action="store_true", help="one in its session, one in another")
arguments = parser.parse_args()

lock = threading.Lock()
requests = 0
seen: set[str] = set()
on = os.environ.get("DSV4_PLUGIN") == "1" and arguments.engage != "never"


def say(text: str) -> None:
    print(text, flush=True)


def engage() -> None:
    """What a worker does at its first calls."""
    from dsv4_plugin.engines.shared import adapter
    from dsv4_plugin.state import state

    if arguments.engage != "log":
        state.count("topk.decode")
    if arguments.engage == "failure" and requests == 3:
        adapter.current().switch_off("topk", RuntimeError("no kernel image"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known: dict[str, Any] = {
            "/health": {},
            "/version": {"version": "9.9.9"},
            "/v1/models": {"data": [{"id": "tiny", "root": "tiny"}]},
            "/server_info": {"version": "9.9.9", "internal_states": [{}]},
        }
        if self.path == "/health" and arguments.never_healthy:
            self.answer(503, {})
        elif self.path in known:
            self.answer(200, known[self.path])
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        global requests
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        native = self.path == "/generate"
        if not native and self.path != "/v1/completions":
            self.answer(404, {})
            return
        with lock:
            requests += 1
            number = requests
            prompt = str(body.get("prompt") or body.get("text") or body.get("input_ids"))
            if prompt in seen:
                say(f"REPEATED {prompt[:60]}")
            seen.add(prompt)
        if number == arguments.die_at_request:
            say("RuntimeError: an illegal memory access")
            os._exit(7)
        if number == arguments.fail_at_request:
            self.answer(500, {"error": "out of pages"})
            return
        if on:
            engage()
        self.stream(body, native, number)

    def stream(self, body: Any, native: bool, number: int) -> None:
        factor = (arguments.gain if on else 1.0) / 1000
        tokens = body["sampling_params"]["max_new_tokens"] if native else body["max_tokens"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(arguments.first_ms * factor + (0.1 if number <= arguments.compile else 0))
        text = ""
        for i in range(tokens):
            time.sleep(arguments.token_ms * factor if i else 0)
            text += " w1"
            if native:
                meta = {"completion_tokens": i + 1, "finish_reason": None}
                self.event({"text": text, "output_ids": [1] * (i + 1), "meta_info": meta})
            else:
                self.event({"choices": [{"index": 0, "text": " w1"}]})
        if not native:
            given = len(str(body["prompt"]).split())
            usage = {"prompt_tokens": given, "completion_tokens": tokens}
            self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()


say(f"fake server of {arguments.model}, DSV4_PLUGIN={os.environ.get('DSV4_PLUGIN')}")
if arguments.stubborn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if arguments.children:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
time.sleep(arguments.start_s)
if arguments.die_at_start is not None:
    for i in range(50):
        say(f"line {i}")
    say("ValueError: no such model")
    sys.exit(arguments.die_at_start)
if on:
    import logging

    from dsv4_plugin import log

    log.configure("info")
    log.once(logging.INFO, "dsv4 active in vLLM 9.9.9, decode: bf16 by cuda on bf16 logits")


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


try:
    Server((arguments.host, arguments.port), Handler).serve_forever()
except KeyboardInterrupt:
    say("interrupted: ending")
    sys.exit(0)
