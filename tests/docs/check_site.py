"""``make check-site``: opens the built site in a browser, at the width of a desktop and of a phone.

    python tests/docs/check_site.py build/site

The check fails in these cases: a page is wider than the screen, or a part of it that does not
scroll in its own box is; code or a table is cut off on a desktop; a link, an anchor or a picture
leads nowhere; a page loads something from another site. The browser is a Chromium on ``PATH`` or
``$BROWSER`` (Debian: ``chromium-headless-shell``). The check follows no links to other sites.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WIDTHS = (390, 1400)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SECONDS = 180
CHECK = Path(__file__).with_suffix(".html")


class Site(ThreadingHTTPServer):
    """Serves the site on the loopback address, with the page that measures it; keeps its report."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))
        # A page's address is the one that links have: a folder stands for its index.html.
        self.pages = sorted("/" + re.sub(r"(^|/)index\.html$", r"\1", file) for file in files)
        self.report: dict[str, Any] | None = None
        self.done = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))


class Handler(SimpleHTTPRequestHandler):
    """Serves the site's files and ``/check_site.html``, which gets its tasks and posts a report."""

    server: Site

    def do_GET(self) -> None:
        """Serve a file of the site, or a file of the check."""
        if self.path == "/check_site.html":
            self._send(CHECK.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/check_site.json":
            asked = {"pages": self.server.pages, "widths": WIDTHS}
            self._send(json.dumps(asked).encode(), "application/json")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Take the report."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.report = json.loads(body)
        self._send(b"", "text/plain")
        self.server.done.set()

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the report names the files that are missing."""


def browser() -> str | None:
    """Return the path of a Chromium, or None."""
    names = (os.environ.get("BROWSER"), *BROWSERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def check(folder: Path, program: str) -> dict[str, Any]:
    """Return ``{"problems": [text, …], "links": count, "pages": count}`` of a site."""
    server = Site(folder)
    if not server.pages:
        return {"problems": [f"no page in {folder}"], "links": 0, "pages": 0}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="dsv4-site-", ignore_cleanup_errors=True) as profile:
        command = [
            program, "--headless", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--window-size=1600,1000", "--remote-debugging-port=0", f"--user-data-dir={profile}",
            # Chromium has no sandbox for root, nor in most containers; it opens this site only.
            "--no-sandbox", f"http://127.0.0.1:{server.server_port}/check_site.html",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + SECONDS
            while not server.done.wait(0.2) and process.poll() is None:
                if time.monotonic() > until:
                    break
        finally:
            # Not the first process alone: Debian's is a script, and the browser has several.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    server.shutdown()
    server.server_close()
    if server.report is None:
        end = f"{program} gave no report in {SECONDS} s, or ended: {process.returncode}"
        return {"problems": [end], "links": 0, "pages": len(server.pages)}
    return {**server.report, "pages": len(server.pages)}


def main() -> int:
    """Check the site named on the command line; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s FOLDER")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    program = browser()
    if program is None:
        parser.error("no Chromium on PATH and none in $BROWSER (apt-get install chromium)")
    began = time.monotonic()
    report = check(folder, program)
    for problem in report["problems"]:
        print(problem)
    sizes = " and ".join(map(str, WIDTHS))
    print(
        f"{report['pages']} pages at {sizes} pixels, {report['links']} links: "
        f"{len(report['problems'])} problems ({time.monotonic() - began:.0f} s)"
    )
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
