"""Forked children start from zero and wait for nothing; a reused id is another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kits.own_process import run_alone

from dsv4_plugin import processes

# A thread of the parent holds each lock nearly all the time, while the main thread forks.
FORK = """
import os, signal, sys, threading, time
from dsv4_plugin.state import state
from dsv4_plugin.engines.shared import import_hooks

def busy(): {busy}

def loop():
    while True: busy()

for _ in range(5): state.count("topk.decode")
state.peak("logits.saved_mib", 7.0)
state.failures["gather"] = "switched off"
threading.Thread(target=loop, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends it where it waits
        {child}
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print("fine")
"""
COUNTS = """
        assert not state.counters and not state.peaks and state.failures["gather"]
        state.count("topk.decode"); state.peak("logits.saved_mib", 1.0)
        assert state.counters == {"topk.decode": 1}, state.counters
        assert state.peaks == {"logits.saved_mib": 1.0}
"""
IMPORTS = """
        import_hooks.after_import("sched", lambda module: done.append(module.scheduler))
        done = []
        import sched
        assert done == [sched.scheduler]
"""


@pytest.mark.parametrize(
    ("busy", "child"),
    [
        ("state.fail('topk', 'only to have the file written')", COUNTS),
        ("state.peak('a', time.time())", COUNTS),
        ("import_hooks.after_import('never.there', print); import_hooks.forget('x')", IMPORTS),
    ],
    ids=["the status file", "the counters", "the import hook"],
)
def test_a_fork_while_a_thread_is_at_it(tmp_path: Path, busy: str, child: str) -> None:
    code = FORK.format(busy=busy, child=child.strip())
    out = run_alone(code, tmp_path, DSV4_STATUS_DIR=str(tmp_path / "status"))
    assert out.splitlines()[-1] == "fine"
    reports = [json.loads(file.read_text()) for file in (tmp_path / "status").glob("*.json")]
    counts = [r["counters"] for r in reports]
    assert counts.count({"topk.decode": 1}) == 20 * (child is COUNTS)
    assert len(counts) == len({r["pid"] for r in reports}) == 1 + 20 * (child is COUNTS)


SHADOW = """
import os, torch
from dsv4_plugin.engines.shared import shadow, shadow_report
from dsv4_plugin.state import status
ours = torch.arange(4, dtype=torch.int32)[None]
shadow.prepare(torch.device("cpu"), "decode")
shadow.watch("decode", ours, lambda scratch: scratch.copy_(ours))
parents = shadow.kept["decode", torch.device("cpu")]
mirror, parents.mirror = parents.mirror, None  # a child cannot read what the parent pinned
if os.fork() == 0:
    assert not status()["shadow"], status()
    shadow.watch("decode", ours, lambda scratch: scratch.copy_(ours))
    assert status()["shadow"]["decode"]["rows"] == 1
    assert shadow_report._thread.is_alive()
    os._exit(0)
parents.mirror = mirror
print(os.wait()[1])
"""


def test_the_shadow_of_a_forked_child(tmp_path: Path) -> None:
    assert "0" in run_alone(SHADOW, tmp_path, DSV4_SHADOW="1").splitlines()


def test_when_a_process_began() -> None:
    began = processes.started(os.getpid())
    assert began is not None and began == processes.started(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        later = processes.started(child.pid)
        assert later is not None and later >= began
    finally:
        child.communicate(b"\n")
    assert processes.started(child.pid) is None
    assert processes.started("no id") is None


@pytest.mark.parametrize(
    ("report", "alive"),
    [
        ({}, True),
        ({"started": None}, True),  # of a machine without /proc
        ({"started": 1}, False),  # the id is another process's by now
        ({"pid": 2**22 + 1}, False),
        ({"pid": None}, False),
        ({"node": "another", "started": 1}, True),
    ],
)
def test_which_processes_are_alive(report: dict[str, Any], alive: bool) -> None:
    whole = {"node": processes.NODE, "pid": os.getpid(), "started": processes.started(os.getpid())}
    assert processes.alive({**whole, **report}) is alive


def test_a_name_of_a_process_may_hold_anything(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from dsv4_plugin import processes\n"
        "before = processes.started(os.getpid())\n"
        "Path('/proc/self/comm').write_bytes(b') 1 (\\xff 2')\n"
        "print(before == processes.started(os.getpid()), before)"
    )
    assert run_alone(code, tmp_path).startswith("True ")
