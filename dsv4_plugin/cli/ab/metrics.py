"""The figures of a benchmark client that are compared, and how a result file names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """One run of the client. ``texts``: what was generated, in the order of the prompts."""

    metrics: dict[str, float]
    completed: int
    input_tokens: int
    output_tokens: int
    texts: tuple[str, ...] | None = None


def read(document: Mapping[str, Any], prompts: int, what: str) -> Result:
    """Take what is compared out of a client's result.

    Raises:
        AbError: a request failed, or the file has not what it must have: that is no measurement.
    """
    errors = [str(e) for e in document.get("errors") or () if e]
    completed = document.get("completed")
    expected = document.get("num_prompts", prompts)
    failed = document.get("failed") or 0
    if failed or errors or completed != expected:
        first = f"; the first error: {errors[0].strip().splitlines()[-1][:300]}" if errors else ""
        raise AbError(
            f"{what}: {completed} of {expected} requests were completed, "
            f"{max(failed, len(errors))} failed{first}"
        )
    values: dict[str, float] = {}
    missing = []
    for metric in METRICS:
        found = [document[key] for key in metric.keys if key in document]
        if not found:
            missing.append(metric.keys[0])
        elif isinstance(found[0], (int, float)) and math.isfinite(found[0]) and found[0] > 0:
            values[metric.name] = float(found[0])
        # Zero and NaN: there is none, such as a time per output token after a single token.
    if missing:
        raise AbError(f"{what}: the result has no {', '.join(missing)}")
    texts = document.get("generated_texts")
    return Result(
        values,
        int(completed or 0),
        int(document.get("total_input_tokens", 0)),
        int(document.get("total_output_tokens", 0)),
        tuple(map(str, texts)) if isinstance(texts, list) else None,
    )
