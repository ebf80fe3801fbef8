"""The reasons for which a test may be skipped (a pytest plugin).

A test marked ``gpu`` is left for a machine with a CUDA device. Every other skip means that
something is missing: under ``DSV4_CI=1`` it fails the run unless its reason starts with one of
:data:`ALLOWED_SKIPS`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest

NO_NVCC = "no nvcc here: the compiled wheel cannot be built"
ALLOWED_SKIPS = (NO_NVCC,)
NO_BROWSER = "no Chromium here: the site cannot be looked at"
LEFT_FOR_GPU = "needs a CUDA device: left for the GPU machine (make test-gpu)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail instead of leaving the tests marked gpu out where there is no CUDA device",
    )
    parser.addoption(
        "--results", type=Path, metavar="FILE", help="write machine, versions and counts there"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipPolicy(config), "dsv4-skip-policy")


class SkipPolicy:
    """Counts skipped tests, and fails the run for a skip that is not allowed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.strict = os.environ.get("DSV4_CI") == "1"
        self.left_for_gpu = 0
        self.skips: dict[str, list[str]] = {}

    @property
    def forbidden(self) -> dict[str, list[str]]:
        """Reason -> tests, for the reasons that are not allowed."""
        return {r: t for r, t in self.skips.items() if not r.startswith(ALLOWED_SKIPS)}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = [item for item in items if item.get_closest_marker("gpu")]
        if not marked or has_cuda():
            return
        if self.config.getoption("--require-gpu"):
            raise pytest.UsageError(
                f"--require-gpu: torch sees no CUDA device; {len(marked)} tests need one"
            )
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=LEFT_FOR_GPU))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report.nodeid, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report.nodeid, report.longrepr)

    def _note(self, nodeid: str, longrepr: object) -> None:
        reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason == LEFT_FOR_GPU:
            self.left_for_gpu += 1
        else:
            self.skips.setdefault(reason, []).append(nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # Workers of pytest-xdist report to the controller, which decides.
        if self.strict and self.forbidden and not hasattr(session.config, "workerinput"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        line = terminalreporter.write_line
        file = self.config.getoption("--results")
        if file is not None:
            from dsv4_plugin.cli.checks.timing import machine

            kinds = ("passed", "failed", "error", "skipped")
            reports = {k: terminalreporter.stats.get(k, []) for k in kinds}
            found = {
                "machine": machine(),
                "tests": {k: len(some) for k, some in reports.items()},
                "failures": sorted(r.nodeid for k in ("failed", "error") for r in reports[k]),
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
        if self.left_for_gpu:
            line(f"dsv4: {self.left_for_gpu} tests left for the GPU machine (make test-gpu)")
        for reason, tests in self.skips.items():
            bad = self.strict and reason in self.forbidden
            word = "FORBIDDEN SKIP" if bad else "skipped"
            line(f"dsv4: {word}, {len(tests)} tests: {reason}", red=bad, yellow=not bad)
            if bad:
                for test in tests:
                    line(f"dsv4:     {test}", red=True)


@functools.cache
def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
