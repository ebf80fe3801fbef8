"""Whether the plugin was at work in a server, from its processes' counters and its log line.

If B ran the engine's own code like A, an A/B would measure noise and call it a result.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv4_plugin.cli.ab import Refused
from dsv4_plugin.cli.ab.servers import Server
from dsv4_plugin.cli.shared import statuses

__all__ = ["Evidence", "judge", "look"]

# The line that the adapters log (engines/shared/adapter.py, tokenspeed/readers.py).
_ACTIVE = re.compile(r"dsv4 active in ")
_OF_PLUGIN = re.compile(r"\bdsv4\b", re.IGNORECASE)
SHOWN = 5  # lines of the log in an error


@dataclass
class Evidence:
    """``processes``: status files of running processes; ``lines``: the log's ``active`` lines."""

    processes: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)

    @property
    def engaged(self) -> list[dict[str, Any]]:
        """The processes in which the plugin served a call."""
        return [p for p in self.processes if statuses.served(p)]

    @property
    def failures(self) -> list[str]:
        """The parts that were switched off after an error."""
        return statuses.failures(self.processes)

    def summary(self) -> str:
        """Return one line that says what was found."""
        if self.engaged:
            counts = [
                f"process {p.get('pid')}: "
                + ", ".join(f"{name} {n}" for name, n in sorted(p["counters"].items()))
                for p in self.engaged
            ]
            return f"at work in {len(self.engaged)} process(es); " + "; ".join(counts)
        if self.lines:
            return "only the log says that the plugin is at work"
        return "nothing shows the plugin at work" if self.looked_at else "not checked"

    def mixed(self) -> list[str]:
        """Name the kinds of calls that the engine's own code partly served."""
        found = []
        for p in self.engaged:
            counters = p["counters"]
            for name in statuses.served(p):
                if counters.get(f"{name}.upstream", 0):
                    found.append(f"some calls of {name} went to the engine's own code")
            asked = {"logits.plugin", "logits.bf16"} & set(statuses.served(p))
            if asked and counters.get("logits.upstream"):
                found.append("some logits were the engine's, in float32")
        return list(dict.fromkeys(found))

    def as_data(self) -> dict[str, Any]:
        """Return the evidence for the results file."""
        return {**asdict(self), "summary": self.summary()}


def look(server: Server) -> Evidence:
    """Collect the evidence about a server."""
    evidence = Evidence()
    if server.status is not None:
        evidence.looked_at.append("status files")
        evidence.processes = statuses.of_folder(server.status)
    if server.log is not None and server.log.is_file():
        evidence.looked_at.append("log")
        with server.log.open(errors="replace") as lines:
            for line in lines:
                if not _OF_PLUGIN.search(line):
                    continue
                told = server.secrets.text(line.strip())[:500]
                (evidence.lines if _ACTIVE.search(line) else evidence.said).append(told)
    return evidence


def judge(
    server: Server, expect: str, *, workers: int = 1, trust: bool = False
) -> tuple[Evidence, list[str]]:
    """Compare the evidence with what this side is meant to be, ``on`` or ``off``.

    ``trust`` takes the user's word if there is no evidence or nowhere to look. It does not override
    evidence. Returns the evidence, and warnings for the report.

    Raises:
        Refused: the evidence contradicts it, or nothing shows that it is so.
    """
    evidence = look(server)
    name = f"server {server.name}"
    if evidence.failures:
        raise Refused(f"{name}: a part of the plugin failed: {'; '.join(evidence.failures)}")
    if expect == "off":
        if evidence.engaged or evidence.lines:
            seen = evidence.summary() + "".join(f"\n    {s}" for s in evidence.lines[:SHOWN])
            raise Refused(f"{name} is meant to run without the plugin: {seen}")
        if evidence.looked_at:
            return evidence, []
        if trust:
            return evidence, [f"{server.name}: that the plugin is off is UNVERIFIED"]
        raise Refused(
            f"nothing can show whether {name} runs without the plugin: name its status folder "
            f"(--status-dir-{server.name.lower()}) or its log (--log-{server.name.lower()}), or "
            "give --trust-engagement"
        )
    if len(evidence.engaged) >= workers:
        return evidence, [f"{server.name}: {text}" for text in evidence.mixed()]
    if evidence.engaged:
        raise Refused(
            f"{name}: the plugin is at work in {len(evidence.engaged)} processes, and --workers "
            f"is {workers}: {evidence.summary()}"
        )
    if evidence.lines and server.status is None:
        return evidence, [
            f"{server.name}: the log says that the plugin engaged; no counter shows that it ran"
        ]
    if trust:
        return evidence, [f"{server.name}: that the plugin is at work is UNVERIFIED"]
    why = (
        "is the plugin installed in that Python, switched on, and named in VLLM_PLUGINS or "
        "SGLANG_PLUGINS if that is set? Are the prompts long enough to reach the indexer (more "
        "than 4 x index_topk tokens)?"
    )
    if not evidence.looked_at:
        why = (
            f"name its status folder (--status-dir-{server.name.lower()}) or its log "
            f"(--log-{server.name.lower()}), or give --trust-engagement"
        )
    lines = "".join(f"\n    {line}" for line in (*evidence.lines, *evidence.said)[:SHOWN])
    raise Refused(f"{name}: nothing shows the plugin at work; {why}{lines}")
