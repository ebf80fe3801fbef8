"""The status of the workers in an engine's ``/metrics``, if ``DSV4_STATUS_DIR`` asks for it.

Workers count calls, and a front end in another process serves ``/metrics``. prometheus_client has
two ways to join them, and each engine uses one. Both are public, so no engine is patched.

* ``PROMETHEUS_MULTIPROC_DIR`` is set (SGLang with ``--enable-metrics``, TokenSpeed with its
  metrics, vLLM with several API servers): a worker sets gauges of its own, and the front end merges
  them (:func:`publish`).
* It is not set (vLLM with one API server): the front end reads the files of ``DSV4_STATUS_DIR``
  (:func:`expose`). A stat logger would be another way in vLLM. The plugin does not use it, because
  its entry point turns statistics on for everyone who has this package installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4_plugin import envs, log, processes
from dsv4_plugin.errors import SettingError

__all__ = ["METRICS", "expose", "publish", "wanted", "withdraw"]

# metric -> its help text, and the label that names what a value belongs to
METRICS = {
    "dsv4_calls": (
        "Python calls at a seam of dsv4_plugin; under CUDA graphs calls at capture, none at replay."
        " At least half of the true number",
        "name",
    ),
    "dsv4_seam_engaged": ("1 where dsv4_plugin serves a seam of the engine, else 0", "seam"),
    "dsv4_switched_off": (
        '1 for a part of dsv4_plugin that failed and serves no more; part "any" is always there',
        "part",
    ),
    "dsv4_info": ("1 for each process in which dsv4_plugin serves, with its version", "version"),
}
_gauges: dict[str, Any] = {}
_collector: _Files | None = None


def _samples(report: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield metric, label and value of one process."""
    for name, number in report["counters"].items():
        yield "dsv4_calls", name, float(number)
    for name, seam in report["seams"].items():
        yield "dsv4_seam_engaged", name, float(seam["engaged"])
    yield "dsv4_switched_off", "any", float(bool(report["failures"]))
    for part in report["failures"]:
        yield "dsv4_switched_off", part, 1.0
    yield "dsv4_info", report["plugin"], 1.0


def publish(report: dict[str, Any]) -> None:
    """Set the gauges of this process; the multi-process mode adds its ``pid``.

    It runs when a status file is written, which is seldom, and touches no device.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    try:
        import prometheus_client
    except ImportError:
        log.debug("PROMETHEUS_MULTIPROC_DIR is set, and there is no prometheus_client")
        return
    for metric, (text, label) in METRICS.items():
        if metric not in _gauges:
            _gauges[metric] = prometheus_client.Gauge(
                metric, text, ["node", label], multiprocess_mode="liveall"
            )
    for metric, name, value in _samples(report):
        _gauges[metric].labels(report["node"], name).set(value)


def wanted() -> bool:
    """Whether ``DSV4_STATUS_DIR`` is set; False also if its value is wrong."""
    try:
        return bool(envs.value("status_dir"))
    except SettingError:
        return False


def expose(module: Any) -> None:
    """Put the files of ``DSV4_STATUS_DIR`` into the registry that vLLM serves.

    The plugin calls this once ``vllm.v1.metrics.prometheus`` is imported, never earlier.
    prometheus_client chooses its mode when it is first imported, and vLLM must be the one that
    imports it.
    """
    global _collector
    if _collector is None and wanted():
        folder = envs.value("status_dir")
        collector = _Files(Path(folder))
        module.REGISTRY.register(collector)
        _collector = collector
        log.debug(f"metrics: {', '.join(METRICS)} from the files of {folder}")


def withdraw(module: Any) -> None:
    """Take the files out of the registry again."""
    global _collector
    if _collector is not None:
        module.REGISTRY.unregister(_collector)
        _collector = None


class _Files:
    """A collector of prometheus_client; it leaves out a file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> list[Any]:
        """Return no metric names, so that registering reads no file."""
        return []

    def collect(self) -> list[Any]:
        """Return the metrics of the processes that still run."""
        from prometheus_client.core import GaugeMetricFamily

        families = {
            metric: GaugeMetricFamily(metric, text, labels=["node", label, "pid"])
            for metric, (text, label) in METRICS.items()
        }
        for metric, labels, value in self.samples():
            families[metric].add_metric(labels, value)
        return [family for family in families.values() if family.samples]

    def samples(self) -> list[tuple[str, list[str], float]]:
        """Return metric, labels and value from every file of a process that still runs."""
        found: list[tuple[str, list[str], float]] = []
        for report in processes.reports(self.folder):
            try:
                node, pid = str(report["node"]), str(int(report["pid"]))
                found += [(m, [node, name, pid], value) for m, name, value in _samples(report)]
            except Exception:  # the file is not the plugin's
                continue
        return found
