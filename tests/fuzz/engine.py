"""The loop of the fuzzer: draw, run, count, and shrink what fails."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from dsv4_plugin.cli.checks.oracles import Wrong
from dsv4_plugin.errors import UnmetError
from dsv4_plugin.ops.dispatch import Call, unmet
from tests.fuzz import cache, candidate_selections, candidates, logits, logits_run, topk
from tests.fuzz.case import Case, CaseError, function_of

__all__ = ["OPS", "RUNS", "Failure", "Report", "backends_here", "fuzz", "run_case", "shrink"]


# A new op: its module beside these, and a line here. A run takes a case, a device, the function.
RUNS: dict[type[Case], Callable[[Any, str, Callable[..., Any]], None]] = {
    topk.TopkCase: topk.run,
    cache.ReadCase: cache.run,
    cache.ReadMxfp4Case: cache.run,
    cache.GatherCase: cache.run,
    logits.PagedLogitsCase: logits_run.run,
    logits.RaggedLogitsCase: logits_run.run,
    logits.SelectCase: logits_run.run,
    candidates.BlockMaximaCase: candidates.run,
    candidate_selections.SelectBlocksCase: candidate_selections.run,
    candidates.CandidateLogitsCase: candidates.run,
    candidates.CandidateLogitsRaggedCase: candidates.run,
    candidates.CandidateSelectCase: candidates.run,
    candidate_selections.SelectCandidatesCase: candidate_selections.run,
}
OPS: dict[str, type[Case]] = {kind.op: kind for kind in RUNS}
_WEIGHTS = {"topk": 7, "paged_logits": 2}  # cases among those of all ops; 1 for the others


@dataclass
class Failure:
    """A case that failed, what it was shrunk to, and why."""

    original: Case
    why: str
    rows: list[int] = field(default_factory=list)
    shrunk: Case | None = None
    fatal: bool = False  # the CUDA context is gone

    @property
    def kind(self) -> str:
        """What is wrong, without the numbers: shrinking must not end at another mistake."""
        return re.sub(r"^(replay|stream) \d+: |\d+", "", self.why.partition(", in ")[0])


@dataclass
class Report:
    """What was tried."""

    cases: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)  # "op field=value", of fields with words
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, case: Case) -> None:
        """Count a case that ran."""
        self.cases[case.op] += 1
        self.rows[case.op] += case.rows
        for f in fields(case):
            words = f.metadata.get("choices")
            if words or f.metadata.get("most") == 1 or f.name in ("graph", "next_n", "view"):
                self.tried[f"{case.op} {f.name}={getattr(case, f.name)}"] += 1


def backends_here(op: str, device: str) -> tuple[str, ...]:
    """Return the implementations of an op that can run on a device."""
    if op == "select":  # a chain of two
        first, second = (backends_here(part, device) for part in ("paged_logits", "topk"))
        return tuple(name for name in first if name in second)
    dtype = {"gather": torch.uint8, "read": torch.float32, "read_mxfp4": torch.float32}
    call = Call(op, torch.device(device), dtype.get(op, torch.bfloat16), 512 if op == "topk" else 0)
    return tuple(name for name in ("cuda", "triton", "torch") if not unmet(call, name))


def run_case(case: Case, device: str, function: Callable[..., Any] | None = None) -> Failure | None:
    """Run a case; returns how it failed.

    Raises:
        CaseError: the case means no call.
        UnmetError: the implementation that the case names does not take the call.
    """
    case.check()
    try:
        RUNS[OPS[case.op]](case, device, function or function_of(case.op))
    except (CaseError, UnmetError):
        raise
    except Wrong as wrong:
        return Failure(case, str(wrong), wrong.rows)
    except Exception as error:  # whatever a valid call raises is a finding
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return Failure(case, text, fatal="CUDA error" in str(error))
    return None


def shrink(
    failure: Failure,
    device: str,
    function: Callable[..., Any] | None = None,
    *,
    seconds: float = 60.0,
) -> Failure:
    """Look for the simplest case that still fails, one change at a time."""
    until = time.monotonic() + seconds
    now = failure
    changed = not failure.fatal
    while changed and time.monotonic() < until:
        changed = False
        for case in now.original.simpler(now.rows):
            if time.monotonic() > until:
                break
            try:
                found = run_case(case, device, function)
            except (CaseError, UnmetError):
                continue
            if found is not None and not found.fatal and found.kind == now.kind:
                now, changed = found, True
                break
    return Failure(failure.original, now.why, now.rows, now.original, failure.fatal)


def fuzz(
    *,
    seed: int,
    device: str,
    ops: Iterable[str] = tuple(OPS),
    seconds: float | None = None,
    cases: int | None = None,
    backends: tuple[str, ...] | None = None,
    functions: dict[str, Callable[..., Any]] | None = None,
    progress: Callable[[Report], None] = lambda report: None,
    before: Callable[[Case], None] = lambda case: None,
    report: Report | None = None,
    most_failures: int = 5,
    shrink_seconds: float = 60.0,
) -> Report:
    """Run random cases until the time, the number of cases or the patience is used up.

    Case number ``i`` depends on ``seed``, ``i`` and the device only. ``functions`` stand in for
    the public functions of the ops. An op that none of ``backends`` serves is left out. ``report``
    is what is filled and returned, so that the caller of an interrupted run has it.

    Raises:
        UnmetError: no op is left.
    """
    report, began = report or Report(), time.monotonic()
    here = {
        name: tuple(b for b in backends_here(name, device) if backends is None or b in backends)
        for name in dict.fromkeys(ops)
    }
    names = [name for name, some in here.items() if some for _ in range(_WEIGHTS.get(name, 1))]
    if not names:
        wanted = ", ".join(backends or ())
        raise UnmetError(f"fuzzing {', '.join(here)} on {device}", [f"no {wanted} there"])
    number = 0
    while len(report.failures) < most_failures:
        report.seconds = time.monotonic() - began
        if (seconds is not None and report.seconds >= seconds) or number == cases:
            break
        r = random.Random(f"{seed} {number}")
        number += 1
        op = r.choice(names)
        case = OPS[op].draw(r.randint(0, (1 << 31) - 1), device, here[op])
        if backends is not None and case.backend == "auto":
            case = case.but(backend=here[op][0])
        function = (functions or {}).get(op)
        before(case)
        try:
            failure = run_case(case, device, function)
        except UnmetError:
            report.refused[op] += 1
            continue
        report.count(case)
        if failure is not None:
            report.failures.append(failure)  # now: shrinking may be interrupted
            report.failures[-1] = shrink(failure, device, function, seconds=shrink_seconds)
            if failure.fatal:
                break
        progress(report)
    report.seconds = time.monotonic() - began
    return report
