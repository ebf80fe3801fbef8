"""`dsv4-plugin status`: the files of a server's processes, or its /metrics."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from dsv4_plugin import metrics, processes
from dsv4_plugin.cli.main import main
from dsv4_plugin.cli.shared import statuses

SERVED = {"topk.decode": 4, "topk.decode.upstream": 1}


def status(folder: Path, pid: int | None = None, **fields: Any) -> None:
    pid = pid or os.getpid()
    about = {"pid": pid, "node": processes.NODE, "engine": "vLLM 0.33.0", "plugin": "0.1"}
    about |= {"started": processes.started(pid), "counters": SERVED, "failures": {}, "seams": {}}
    (folder / f"{processes.NODE}-{pid}.json").write_text(json.dumps(about | fields))


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    def asked(*arguments: object) -> tuple[int, str]:
        code = main(["status", *map(str, arguments)])
        got = capsys.readouterr()
        return code, got.out + got.err

    return asked


def test_a_server_at_work(tmp_path: Path, ask: Any) -> None:
    status(tmp_path)
    code, said = ask(tmp_path)
    assert code == 0
    one, verdict = said.splitlines()
    assert f"process {os.getpid()} vLLM 0.33.0 0.1: plugin: topk.decode 4" in one
    assert one.endswith("engine: topk.decode.upstream 1")
    assert verdict == "dsv4-plugin: engaged in 1 of 1 processes"


def test_calls_that_auto_leaves_to_the_engine_count_as_served(tmp_path: Path, ask: Any) -> None:
    status(tmp_path, counters={"topk.decode.aside": 3, "topk.decode.upstream": 1})
    code, said = ask(tmp_path)
    assert code == 0 and "plugin: no call; engine: topk.decode.aside 3" in said
    assert said.endswith("engaged in 1 of 1 processes\n")


@pytest.mark.parametrize(
    ("fields", "arguments", "says"),
    [
        ({"counters": {"topk.decode.aside": 0}}, [], "engaged in 0 of 1 processes"),
        ({"counters": {"topk.decode.upstream": 3}}, [], "engaged in 0 of 1 processes"),
        ({}, ["--workers", "2"], "engaged in 1 of 2 processes"),
        ({"failures": {"topk": "RuntimeError: x"}}, [], "switched off: process"),
        ({"node": processes.NODE, "started": 1.0}, [], "no process has a status"),
    ],
)
def test_a_server_that_is_not_as_it_should_be(
    fields: dict[str, Any], arguments: list[str], says: str, tmp_path: Path, ask: Any
) -> None:
    status(tmp_path, **fields)
    code, said = ask(tmp_path, *arguments)
    assert code == 1 and says in said


def test_as_json(tmp_path: Path, ask: Any) -> None:
    status(tmp_path)
    (tmp_path / "half.json").write_text('{"pid": ')
    code, said = ask(tmp_path, "--json")
    document = json.loads(said)
    assert code == 0 and document["engaged"] is True
    assert [p["counters"] for p in document["processes"]] == [SERVED]


@pytest.mark.parametrize("where", ["nowhere", "http://127.0.0.1:1"])
def test_what_is_not_there(where: str, ask: Any) -> None:
    code, said = ask(where)
    assert code == 2 and where in said and len(said.splitlines()) == 1


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server whose /metrics are those that vLLM's front end would make from the files."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics._Files(tmp_path))

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(prometheus_client.generate_latest(registry))

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_address(tmp_path: Path, address: str, ask: Any) -> None:
    assert ask(address)[0] == 1
    seams = {"topk.decode": {"engaged": True}, "gather": {"engaged": False}}
    status(tmp_path, seams=seams)
    for where in (address, f"{address}/metrics"):
        code, said = ask(where)
        assert code == 0 and "engaged in 1 of 1" in said and "topk.decode 4" in said
    code, said = ask(address, "--json")
    assert json.loads(said)["processes"][0]["seams"] == seams
    assert ask(f"{address}/elsewhere")[0] == 2
    status(tmp_path, failures={"topk": 'broken "here"'})
    code, said = ask(address)
    assert code == 1 and "topk was switched off" in said


def test_what_is_no_metric_of_the_plugin() -> None:
    text = 'vllm:x{a="b"} 1.0\n# HELP dsv4_calls x\ndsv4_calls{node="n",pid="1",name="a"} 2.0\n'
    assert statuses.of_metrics(text) == [
        {"node": "n", "pid": "1", "counters": {"a": 2}, "failures": {}, "seams": {}}
    ]
