"""An HTTP server around TokenSpeed's ``Engine``: ``python -m benchmarks.server.tokenspeed_front``.

``tokenspeed serve`` needs a gateway that speaks OpenAI's protocol and cannot say when each token
came. This module takes the same options and answers requests of the form of SGLang's ``/generate``
(:mod:`.engines`): token ids in, a stream of token ids out. It has nothing else of a server.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Front", "main"]

# Token ids only. The mode "auto" needs a file of the published model that renders chats.
TOKEN_IDS = ("--skip-tokenizer-init", "--tokenizer-mode", "slow")
PROFILED = ("output_dir", "activities", "with_stack", "record_shapes")


class Front(ThreadingHTTPServer):
    """Answers for one ``Engine``."""

    request_queue_size = 64
    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Any) -> None:
        super().__init__(address, _Handler)
        self.engine = engine

    def generate(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Return the chunks of an answer. TokenSpeed's cache has no salts: they change nothing."""
        found: Iterator[dict[str, Any]] = self.engine.generate(
            input_ids=body["input_ids"], sampling_params=body["sampling_params"], stream=True
        )
        return found

    def profile(self, body: dict[str, Any] | None) -> None:
        """Begin a profile with these options; end it if there are none."""
        manager = self.engine.tokenizer_manager
        if body is None:
            self.engine.llm.run(manager.stop_profile())
            return
        options = {name: body[name] for name in PROFILED if name in body}
        self.engine.llm.run(manager.start_profile(**options))


class _Handler(BaseHTTPRequestHandler):
    server: Front

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path in ("/start_profile", "/stop_profile"):
            self.server.profile(body if self.path == "/start_profile" else None)
        self.send_response(200)
        self.end_headers()
        if self.path == "/generate":
            try:
                for chunk in self.server.generate(body):
                    self._send(chunk)
            except Exception as error:  # the client gets it, and the server goes on
                self._send({"error": f"{type(error).__name__}: {error}"})

    def _send(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: %s\n\n" % json.dumps(data, default=str).encode())


def main() -> None:
    """Start the engine with the options of ``tokenspeed serve``, and then answer requests."""
    runtime = "tokenspeed.runtime"
    options: Any = importlib.import_module(f"{runtime}.utils.server_args")
    engines: Any = importlib.import_module(f"{runtime}.entrypoints.engine")
    arguments = options.prepare_server_args([*sys.argv[1:], *TOKEN_IDS])
    engine = engines.Engine(server_args=arguments)
    Front((arguments.host, arguments.port), engine).serve_forever()


if __name__ == "__main__":  # the engine's processes import this module too
    main()
