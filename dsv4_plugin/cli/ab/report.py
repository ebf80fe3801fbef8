"""The summary of a run's figures, and the printed table."""

from __future__ import annotations

import statistics
from typing import Any

from dsv4_plugin.cli.ab.intervals import LEVEL, ratio
from dsv4_plugin.cli.ab.metrics import METRICS
from dsv4_plugin.cli.shared import screen

__all__ = ["FIGURE", "closing", "lines", "summarise"]

Row = dict[str, Any]
FIGURE = "TPOT mean"  # the declared figure if --figure names no other


def summarise(document: Row) -> list[Row]:
    """Return one row for each workload and each metric that every run has.

    Runs of the same half of a pair are averaged. A side's mean and standard deviation, the ratio
    and its interval are over the pairs. If nothing shows that the plugin was at work in one side
    only, a figure of B is "higher" or "lower", not better or worse.
    """
    rows = []
    unproven = _unproven(document)
    for load in document["design"]["workloads"]:
        runs = [run for run in document["runs"] if run["workload"] == load]
        for metric in METRICS:
            if not all(metric.name in run["metrics"] for run in runs):
                continue
            halves: dict[tuple[str, int], list[float]] = {}
            for run in runs:
                key = run["side"], run["pair"]
                halves.setdefault(key, []).append(run["metrics"][metric.name])
            pairs = sorted({pair for _, pair in halves})
            a, b = ([statistics.fmean(halves[side, p]) for p in pairs] for side in "AB")
            r = ratio(a, b)
            better = (r.value > 1) == metric.higher_is_better
            words = ("higher", "lower") if unproven else ("better", "worse")
            up = r.value > 1 if unproven else better
            rows.append({
                "workload": load, "metric": metric.name, "unit": metric.unit,
                "a": a, "b": b,
                "a_mean": statistics.fmean(a), "a_sd": statistics.stdev(a),
                "b_mean": statistics.fmean(b), "b_sd": statistics.stdev(b),
                "ratio": r.value, "low": r.low, "high": r.high,
                "verdict": words[not up] if r.decided else "undecided",
            })  # fmt: skip
    return rows


def lines(document: Row) -> list[str]:
    """Return the table and the notes that belong to it."""
    about, design = document["machine"], document["design"]
    declared = document.get("figure", FIGURE)
    text = [
        "",
        f"{about['gpu'] or 'no NVIDIA GPU'}, driver {about['driver']}, {about['date']}, "
        f"dsv4-plugin {about['plugin']} ({about['commit'][:10]})",
    ]
    for side in "AB":
        text += _side(side, document)
    for load in design["workloads"]:
        rows = [row for row in document["summary"] if row["workload"] == load]
        text += [
            "",
            f"{load}: {design['pairs']} pairs x {design['runs']} run(s)"
            + _same_texts(load, document),
        ]
        text += screen.table(
            ["", "A", "± sd", "B", "± sd", "B/A", f"{LEVEL:.0%} interval", "B is"],
            [_cells(row, row["metric"] == declared) for row in rows],
        )
    text += [
        "",
        f"B/A: geometric mean over the pairs; interval: Student's t on logarithms, "
        f"{design['pairs'] - 1} degrees of freedom. One in twenty such intervals is wrong.",
        f"The figure that was declared before the run is {declared}. A verdict in parentheses "
        "is for another figure and is not corrected for the number of figures.",
        "The interval includes the differences between starts." if design["mode"] == "restart"
        else "The interval does not include the differences between starts.",
    ]  # fmt: skip
    text += [f"note: {warning}" for warning in document["warnings"]]
    return [*text, "", *closing(document)]


def closing(document: Row) -> list[str]:
    """Return one sentence per workload about the declared figure; it ends the report."""
    design, unproven = document["design"], _unproven(document)
    text = []
    for row in document["summary"]:
        if row["metric"] != document.get("figure", FIGURE):
            continue
        mean, low, high = (f"{100 * (row[name] - 1):+.1f}" for name in ("ratio", "low", "high"))
        said = "undecided"
        if row["verdict"] != "undecided":
            less = row["ratio"] < 1
            said = (
                ("faster" if less else "slower")
                if row["unit"] == "ms"
                else ("less" if less else "more")
            )
        if unproven:
            said = (
                f"{'undecided' if said == 'undecided' else 'differs'}, and what ran is UNVERIFIED"
            )
        where = f"{row['workload']}: " if len(design["workloads"]) > 1 else ""
        text.append(
            f"{where}{row['metric']} {mean} % [{low}, {high}], {design['pairs']} pairs: {said}"
        )
    return text


def _unproven(document: Row) -> bool:
    """Whether only the user's word says what ran in a server."""
    return any("UNVERIFIED" in warning for warning in document["warnings"])


def _cells(row: Row, declared: bool) -> list[str]:
    """Return a row of the printed table."""
    means = [f"{row[name]:.2f}" for name in ("a_mean", "a_sd", "b_mean", "b_sd")]
    verdict = row["verdict"]
    return [
        f"{row['metric']} {row['unit']}", *means, f"{row['ratio']:.3f}",
        f"{row['low']:.3f} … {row['high']:.3f}", verdict if declared else f"({verdict})",
    ]  # fmt: skip


def _side(side: str, document: Row) -> list[str]:
    about = document["sides"][side]
    environ = " ".join(f"{n}={v}" for n, v in about["asked_env"].items())
    served = sorted({s["version"] or "unknown" for s in document["servers"] if s["side"] == side})
    found = about.get("versions") or {}
    shown = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "dsv4-plugin") if found.get(name)
    )
    return [
        f"{side}: {document['engine']} {', '.join(served)}{', ' + shown if shown else ''}: "
        f"{environ} {' '.join(about['command'] or [about['url'] or ''])}",
        f"   plugin: {about['engagement']['summary']}",
    ]


def _same_texts(load: str, document: Row) -> str:
    runs = [r for r in document["runs"] if r["workload"] == load and "same_texts" in r]
    if not runs:
        return ""
    same, of = sum(r["same_texts"] for r in runs), sum(r["completed"] for r in runs)
    return f"; {same} of {of} generated texts are the same in A and B"
