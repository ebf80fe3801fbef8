"""The status of the workers in vLLM's ``/metrics``: in the registry that vLLM itself serves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
from case_calls import BATCHES

import dsv4_plugin
from dsv4_plugin import metrics
from dsv4_plugin.engines.vllm import register, unregister

MIXED = BATCHES["mixed"]


@pytest.fixture
def served(engine, monkeypatch, tmp_path):
    """Register as a server that was started with ``DSV4_STATUS_DIR``; return what it serves."""
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    unregister()
    monkeypatch.setenv("DSV4_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    register()

    def lines():
        text = generate_latest(get_prometheus_registry()).decode()
        return [line for line in text.splitlines() if line.startswith("dsv4_")]

    return lines


def labels(key, name, pid=None):
    found = {"node": platform.node(), key: name, "pid": pid or os.getpid()}
    return "{" + ",".join(f'{k}="{found[k]}"' for k in sorted(found)) + "}"


def other(tmp_path, pid, **more):
    report = {
        "node": platform.node(), "pid": pid, "plugin": "0.1", "failures": {},
        "counters": {"gather": 4},
        "seams": {"gather": {"where": "x", "engaged": True, "why": None}}, **more,
    }  # fmt: skip
    (tmp_path / f"other-{pid}.json").write_text(json.dumps(report))


def test_what_a_worker_did_is_served(served, run, engine):
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    assert b"dsv4" not in generate_latest(get_prometheus_registry())
    run(engine.problem(**MIXED))
    lines = served()
    assert f"dsv4_calls{labels('name', 'topk.decode')} 1.0" in lines
    assert f"dsv4_seam_engaged{labels('seam', 'topk.prefill')} 1.0" in lines
    off = [line for line in lines if line.startswith("dsv4_switched_off")]
    assert off == [f"dsv4_switched_off{labels('part', 'any')} 0.0"]
    assert f"dsv4_info{labels('version', dsv4_plugin.__version__)} 1.0" in lines


def test_a_part_that_failed_is_served(served, run, engine, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("dsv4_plugin.topk", broken)
    run(engine.problem(**MIXED), model="deepseek_v32")
    lines = served()
    for part in ("topk", "any"):
        assert f"dsv4_switched_off{labels('part', part)} 1.0" in lines
    assert f"dsv4_seam_engaged{labels('seam', 'topk.decode')} 0.0" in lines
    assert f"dsv4_calls{labels('name', 'topk.decode.upstream')} 1.0" in lines


def test_other_processes_count_while_they_live(served, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        other(tmp_path, child.pid)
        assert f"dsv4_calls{labels('name', 'gather', child.pid)} 4.0" in served()
    finally:
        child.communicate(b"\n")
    assert served() == []
    other(tmp_path, os.getpid(), started=1)  # an id that is another process's by now
    assert served() == []
    other(tmp_path, child.pid, node="another-machine")
    assert len(served()) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"node": "x", "pid": "?"}'])
def test_a_file_of_another_form_spoils_nothing(served, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    other(tmp_path, os.getpid())
    assert len(served()) == 4


def test_a_folder_that_cannot_be_listed_spoils_nothing(served, monkeypatch):
    def refuse(self, pattern):
        raise PermissionError(self)

    monkeypatch.setattr("pathlib.Path.glob", refuse)
    assert served() == []


def test_twice_is_once_and_it_can_be_taken_back(served, tmp_path):
    other(tmp_path, os.getpid())
    register()
    assert len(served()) == 4
    unregister()
    assert served() == []


def test_without_the_setting_nothing_is_registered(engine, monkeypatch):
    from vllm.v1.metrics import prometheus

    before = dict(prometheus.REGISTRY._collector_to_names)
    register()
    assert dict(prometheus.REGISTRY._collector_to_names) == before
    assert metrics._collector is None


# As the worker of a server with several front ends: prometheus_client chooses when it is imported.
WORKER = """
import sys
from dsv4_plugin.state import Seam, state
assert "prometheus_client" not in sys.modules
state.engine = "vLLM 9.9"
state.seams["gather"] = Seam("gather", "somewhere")
for _ in range(5):
    state.count("gather")
state.fail("topk", "no kernel image")
"""


def test_with_several_front_ends_the_multi_process_registry_has_it(engine, monkeypatch, tmp_path):
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    folder = tmp_path / "prometheus"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    monkeypatch.setenv("DSV4_STATUS_DIR", str(tmp_path / "status"))
    subprocess.run([sys.executable, "-c", WORKER], check=True)
    text = generate_latest(get_prometheus_registry()).decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("dsv4_"))
    found = {key.partition("{")[0]: float(value) for key, value in values.items()}
    ones = dict.fromkeys(("dsv4_seam_engaged", "dsv4_switched_off", "dsv4_info"), 1.0)
    assert found == {"dsv4_calls": 5.0} | ones
    assert all(f'node="{platform.node()}"' in key and 'pid="' in key for key in values)
    assert list((tmp_path / "status").glob("*.json"))


def test_without_prometheus_client_a_worker_goes_on(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics.publish({"node": "n", "counters": {"gather": 1}, "seams": {}, "failures": {}})
    assert list(tmp_path.iterdir()) == []
