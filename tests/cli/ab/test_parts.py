"""The parts of ``dsv4-plugin ab`` that need no process: statistics, evidence, results, secrets."""

from __future__ import annotations

import json
import math
import os
import platform
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4_plugin.cli.ab import AbError, Refused
from dsv4_plugin.cli.ab.console import Console
from dsv4_plugin.cli.ab.engagement import judge, look
from dsv4_plugin.cli.ab.engines import Workload
from dsv4_plugin.cli.ab.experiment import Design
from dsv4_plugin.cli.ab.intervals import ratio, t_quantile
from dsv4_plugin.cli.ab.metrics import METRICS, read
from dsv4_plugin.cli.ab.processes import tail
from dsv4_plugin.cli.ab.servers import Server
from dsv4_plugin.cli.shared.secrets import Secrets
from dsv4_plugin.cli.shared.secrets import command as shown
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.adapter import Adapter
from dsv4_plugin.engines.shared.decision import INERT, Selection
from dsv4_plugin.state import Seam, state


@pytest.mark.parametrize(
    "freedom,want", [(1, 12.7062), (2, 4.3027), (9, 2.2622), (30, 2.0423), (31, 2.0395),
                     (60, 2.0003), (200, 1.9719)]
)  # fmt: skip
def test_the_quantile_is_that_of_the_tables(freedom: int, want: float) -> None:
    assert t_quantile(freedom) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_the_interval_holds_the_truth_in_nineteen_of_twenty(pairs: int) -> None:
    rng = random.Random(pairs)
    truth, held = 0.97, 0
    for _ in range(4000):
        a = [100 * math.exp(rng.gauss(0, 0.02)) for _ in range(pairs)]
        b = [truth * x * math.exp(rng.gauss(0, 0.01)) for x in a]
        r = ratio(a, b)
        held += r.low <= truth <= r.high
    assert 0.935 < held / 4000 < 0.965


def test_a_ratio_has_no_side() -> None:
    a, b = [10.0, 11.0, 12.0], [9.0, 10.5, 11.0]
    forth, back = ratio(a, b), ratio(b, a)
    assert back.value == pytest.approx(1 / forth.value) and back.low == pytest.approx(
        1 / forth.high
    )
    assert not ratio(a, a).decided and ratio(a, [2 * x for x in a]).decided
    with pytest.raises(ValueError, match="at least 2 pairs"):
        ratio([1.0], [1.0])


def test_no_prompt_is_sent_twice_to_a_server() -> None:
    loads = (Workload(1, 1, 1, 1), Workload(2, 1, 1, 1))
    design = Design("together", loads, pairs=7, runs=3, seed=11)
    measured = [design.run_seed(w, p, r) for w in (1, 2) for p in range(1, 8) for r in (1, 2, 3)]
    warm = [design.warmup_seed(w, i) for w in (1, 2) for i in range(1, 9)]
    assert len({*measured, *warm}) == len(measured) + len(warm)


GOOD: dict[str, Any] = {metric.keys[0]: 2.0 for metric in METRICS} | {
    "completed": 4, "failed": 0, "num_prompts": 4, "total_input_tokens": 8,
    "total_output_tokens": 9, "errors": ["", ""], "generated_texts": ["a", "b"],
}  # fmt: skip


def test_a_result_is_read() -> None:
    result = read(GOOD, 4, "it")
    assert result.metrics == {metric.name: 2.0 for metric in METRICS}
    assert (result.completed, result.input_tokens, result.output_tokens) == (4, 8, 9)
    assert result.texts == ("a", "b")


@pytest.mark.parametrize(
    "change,said",
    [
        ({"failed": 1}, "1 failed"),
        ({"completed": 3}, "3 of 4 requests"),
        ({"completed": None}, "None of 4 requests"),
        ({"errors": ["", "Traceback\nTimeoutError: slow"]}, "the first error: TimeoutError: slow"),
        ({"num_prompts": 5}, "4 of 5 requests"),
    ],
)
def test_a_result_with_a_failed_request_is_none(change: dict[str, Any], said: str) -> None:
    with pytest.raises(AbError, match=said):
        read(GOOD | change, 4, "it")


@pytest.mark.parametrize(
    "change",
    [
        {"total_input_tokens": None}, {"total_output_tokens": "9"}, {"failed": "2"},
        {"failed": None}, {"failed": -1}, {"failed": True}, {"completed": "4"},
        {"completed": [4]}, {"completed": 4.5}, {"num_prompts": None},
        {"completed": 0, "num_prompts": 0}, {"total_input_tokens": math.nan},
        {"errors": ["", "\n"]}, {"errors": "Timeout"}, {"errors": {"a": 1}}, {"errors": 7},
        {"mean_ttft_ms": "12.5"}, {"mean_ttft_ms": [1.0]}, {"mean_ttft_ms": True},
        {"mean_ttft_ms": -1.0}, {"mean_ttft_ms": math.inf}, {"mean_ttft_ms": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_with_odd_values_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(AbError, match="^it: "):
        read(GOOD | change, 4, "it")


def test_an_error_of_a_result_has_no_secret() -> None:
    told = Secrets([{"HF_TOKEN": "sesame"}])
    with pytest.raises(AbError) as error:
        read(GOOD | {"errors": ["401 for sesame"]}, 4, "it", told.text)
    assert "401 for ***" in str(error.value)


@pytest.mark.parametrize("value", [0.0, math.nan, None])
def test_a_figure_that_is_none_is_left_out(value: object) -> None:
    """One token out has no time per output token."""
    result = read(GOOD | {"mean_tpot_ms": value}, 4, "it")
    assert "TPOT mean" not in result.metrics and len(result.metrics) == len(METRICS) - 1


@pytest.fixture
def clean() -> Iterator[None]:
    state.reset()
    yield
    state.reset()
    adapter.current().decide(INERT)


def server(tmp_path: Path, text: str | None = None) -> Server:
    log = tmp_path / "log"
    if text is not None:
        log.write_text(text)
    return Server(
        "B", "http://127.0.0.1:1", Console(), log=log if text is not None else None, status=tmp_path
    )


LINES = {
    "all": (Selection("bf16", "cuda", True), ("cuda", []), True),
    "top-k only": (Selection("fp32", "cuda"), (None, ["no such gather"]), True),
    "gather only": (None, ("triton", []), True),
    "neither": (None, (None, ["no such gather"]), False),
    "an engine without a gather": (Selection("bf16", "cuda"), None, True),
    "nothing in an engine without a gather": (None, None, False),
}


@pytest.mark.parametrize("selection,gather,active", LINES.values(), ids=LINES)
def test_what_an_adapter_logs_is_recognised(
    selection: Selection | None, gather: Any, active: bool, clean: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr("dsv4_plugin.log.once", lambda level, message: said.append(message))
    names = ("topk.decode", "topk.prefill", "logits")
    for name in (*names, "gather"):
        state.seams[name] = Seam(name, f"where {name} is")
    whys = {} if selection else {"fp32": ["no such kernel"]}
    Adapter("vLLM 0.26.0").report("some layers", names, selection, whys, {}, gather)
    evidence = look(server(tmp_path, f"(EngineCore pid=1) INFO 11-25 [dsv4] {said[0]}\n"))
    assert bool(evidence.lines) is active and bool(evidence.said) is not active


def status(folder: Path, pid: int, **data: Any) -> None:
    whole = {"pid": pid, "node": platform.node(), "counters": {}, "failures": {}, **data}
    (folder / f"{whole['node']}-{pid}.json").write_text(json.dumps(whole))


def test_upstreams_counters_are_no_evidence(tmp_path: Path) -> None:
    status(tmp_path, os.getpid(), counters={"topk.decode.upstream": 9, "logits.upstream": 9})
    with pytest.raises(Refused, match="nothing shows the plugin at work"):
        judge(server(tmp_path), "on")
    assert judge(server(tmp_path), "off")[1] == []


def test_a_file_that_an_earlier_server_left_is_no_evidence(tmp_path: Path) -> None:
    gone = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    status(tmp_path, gone, counters={"topk.decode": 1})
    with pytest.raises(Refused, match="nothing shows"):
        judge(server(tmp_path), "on")
    status(tmp_path, gone, counters={"topk.decode": 1}, node="another")
    assert len(judge(server(tmp_path), "on")[0].engaged) == 1, "another node's process is believed"


def test_calls_that_went_to_the_engine_are_noted(tmp_path: Path) -> None:
    counters = {"topk.decode": 5, "topk.decode.bf16.cuda": 5, "topk.decode.upstream": 2,
                "logits.bf16": 5, "logits.upstream": 1}  # fmt: skip
    status(tmp_path, os.getpid(), counters=counters)
    assert judge(server(tmp_path), "on")[1] == [
        "B: some calls of topk.decode went to the engine's own code",
        "B: some logits were the engine's, in float32",
    ]
    counters = {"topk.decode": 5, "logits.plugin": 5, "logits.plugin.bf16.cuda": 5}
    status(tmp_path, os.getpid(), counters=counters)
    assert judge(server(tmp_path), "on")[1] == []
    status(tmp_path, os.getpid(), counters=counters | {"logits.upstream": 2})
    assert judge(server(tmp_path), "on")[1] == ["B: some logits were the engine's, in float32"]
    # float32 logits are the engine's where that is the plan.
    status(tmp_path, os.getpid(), counters={"topk.decode": 5, "logits.upstream": 5})
    assert judge(server(tmp_path), "on")[1] == []


def test_a_status_with_odd_values_is_read(tmp_path: Path) -> None:
    status(tmp_path, os.getpid(), counters={"topk.decode": "5", "gather": None}, failures=["x"])
    with pytest.raises(Refused, match="a part of the plugin failed"):
        judge(server(tmp_path), "on")
    status(tmp_path, os.getpid(), counters={"topk.decode": "5"}, failures=None)
    with pytest.raises(Refused, match="nothing shows"):
        judge(server(tmp_path), "on")


def test_a_broken_status_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x-1.json").write_text("{")
    (tmp_path / "x-2.json").write_text("[]")
    assert look(server(tmp_path)).processes == []


def test_secrets_of_a_command_are_hidden() -> None:
    command = ["serve", "--api-key", "a", "--hf-token=b", "--max-key-len", "3", "key"]
    assert shown(command) == [
        "serve", "--api-key", "***", "--hf-token=***", "--max-key-len", "3", "key",
    ]  # fmt: skip


def test_the_end_of_a_log_with_progress_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\nloading 1%\rloading 100%\r\nlast\xff\n")
    assert tail(log, 2) == ["loading 100%", "last�"]
    assert tail(tmp_path / "none") == []
