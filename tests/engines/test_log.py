"""Each line of the plugin appears once, whenever and however the engine sets up logging."""

from __future__ import annotations

from pathlib import Path

import pytest
from kits.own_process import run_alone

BEGIN = """
import logging, logging.config, sys
from dsv4_plugin import log
H = {"handlers": {"h": {"class": "logging.StreamHandler"}}}
log.configure("info")  # register()
log.once(logging.INFO, "before")
"""
END = """
log.say(logging.ERROR, "a part failed")
log.configure("info")  # the first layer
log.once(logging.INFO, "after")
log.say(logging.DEBUG, "not at this level")
"""
ENGINES = {
    "nothing": "",
    "basicConfig": "logging.basicConfig(level=logging.INFO)",
    "basicConfig of warnings": "logging.basicConfig(level=logging.WARNING)",
    "basicConfig twice": "logging.basicConfig(); logging.basicConfig(force=True)",
    "taken away again": "logging.basicConfig(); logging.getLogger().handlers.clear()",
    "dictConfig": 'logging.config.dictConfig({"version": 1, "root": {"handlers": ["h"]}, **H})',
    "dictConfig without a root": 'logging.config.dictConfig({"version": 1})',
    "dictConfig that names ours": 'logging.config.dictConfig({"version": 1, '
    '"loggers": {"dsv4_plugin": {"level": "INFO"}}})',
    "dictConfig with a handler for ours": 'logging.config.dictConfig({"version": 1, "loggers": '
    '{"dsv4_plugin": {"handlers": ["h"], "propagate": False}}, "root": {"handlers": ["h"]}, **H})',
    "fileConfig": "logging.config.fileConfig('engine.ini')",
    "a handler for nothing": "logging.getLogger().addHandler(logging.NullHandler())",
    "a logger of its own": "h = logging.getLogger('engine'); h.propagate = False; "
    "h.addHandler(logging.StreamHandler())",
    "stderr replaced": "sys.stderr = sys.stdout",
}
INI = """
    [loggers]
    keys=root
    [handlers]
    keys=h
    [formatters]
    keys=
    [logger_root]
    handlers=h
    [handler_h]
    class=StreamHandler
    args=()
"""


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_each_line_comes_once(tmp_path: Path, engine: str) -> None:
    out = run_alone(f"{BEGIN}\n{engine}\n{END}", tmp_path, {"engine.ini": INI})
    for line in ("before", "a part failed", "after"):
        assert out.count(line) == 1, out
    assert "not at this level" not in out
    assert "before" in out.splitlines()[0] and "[dsv4]" in out.splitlines()[0]


@pytest.mark.parametrize("stderr", ["None", "open('gone', 'w'); sys.stderr.close()"])
def test_a_line_that_cannot_be_written_ends_nothing(tmp_path: Path, stderr: str) -> None:
    out = run_alone(f"{BEGIN}\nsys.stderr = {stderr}\n{END}\nprint('alive')", tmp_path)
    assert out.splitlines()[-1] == "alive"


def test_a_traceback_comes_with_it(tmp_path: Path) -> None:
    code = BEGIN + "try: 1 / 0\nexcept Exception: log.exception('100 % broken')"
    out = run_alone(code, tmp_path)
    assert "ERROR" in out and "100 % broken" in out and "ZeroDivisionError" in out
