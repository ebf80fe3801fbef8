"""The figures of a benchmark client that are compared, and their names in a result file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4_plugin.cli.ab import AbError

__all__ = ["METRICS", "Metric", "Result", "read"]


@dataclass(frozen=True)
class Metric:
    """``keys``: the names in the files of vLLM and SGLang, which mostly agree."""

    name: str
    keys: tuple[str, ...]
    unit: str
    higher_is_better: bool = False


METRICS: tuple[Metric, ...] = (
    *(
        Metric(f"{name} {kind}", (f"{kind}_{name.lower()}_ms",), "ms")
        for name in ("TTFT", "TPOT", "ITL")
        for kind in ("mean", "median", "p99")
    ),
    Metric("output throughput", ("output_throughput",), "tok/s", True),
    Metric("total throughput", ("total_token_throughput", "total_throughput"), "tok/s", True),
    Metric("request throughput", ("request_throughput",), "req/s", True),
)


@dataclass(frozen=True)
class Result:
    """One run of the client. ``texts``: the generated texts, in the order of the prompts."""

    metrics: dict[str, float]
    completed: int
    input_tokens: int
    output_tokens: int
    texts: tuple[str, ...] | None = None


def read(
    document: Mapping[str, Any], prompts: int, what: str, hide: Callable[[str], str] = str
) -> Result:
    """Read the compared figures from a client's result; ``hide`` removes secrets from error texts.

    Raises:
        AbError: a request failed, or the file lacks a required value, so nothing was measured.
    """
    errors = document.get("errors") or ()
    errors = [e for e in errors if e] if isinstance(errors, (list, tuple)) else [errors]
    completed, expected = document.get("completed"), document.get("num_prompts", prompts)
    failed = _count(document.get("failed", 0), "failed", what)
    if failed or errors or completed != expected:
        lines = str(errors[0]).strip().splitlines() if errors else []
        first = f"; the first error: {hide(lines[-1])[:300]}" if lines else ""
        raise AbError(
            f"{what}: {completed} of {expected} requests were completed, "
            f"{max(failed, len(errors))} failed{first}"
        )
    if not _count(completed, "completed", what):
        raise AbError(f"{what}: no request was sent")
    values: dict[str, float] = {}
    missing = []
    for metric in METRICS:
        key = next((key for key in metric.keys if key in document), None)
        if key is None:
            missing.append(metric.keys[0])
        elif value := _figure(document[key], key, what):
            values[metric.name] = value
    if missing:
        raise AbError(f"{what}: the result has no {', '.join(missing)}")
    texts = document.get("generated_texts")
    return Result(
        values,
        _count(completed, "completed", what),
        _count(document.get("total_input_tokens", 0), "total_input_tokens", what),
        _count(document.get("total_output_tokens", 0), "total_output_tokens", what),
        tuple(map(str, texts)) if isinstance(texts, list) else None,
    )


def _count(value: Any, key: str, what: str) -> int:
    """Return a number of requests or tokens."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool) or value < 0:
        raise AbError(f"{what}: {key} of the result must be a whole number, got {value!r:.100}")
    return int(value)


def _figure(value: Any, key: str, what: str) -> float:
    """Return a figure; 0 if there is none, such as the time per output token after one token."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return 0.0
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1e300:
        raise AbError(f"{what}: {key} of the result must be a positive number, got {value!r:.100}")
    return float(value)
