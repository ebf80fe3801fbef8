"""Shadow mode in a CUDA graph: replays count, and reading the counters never disturbs a capture.

It also runs on a CPU, with the torch backend and calls in place of replays.
"""

from __future__ import annotations

import threading

import pytest
import torch
from kits.inputs import poison_tail
from kits.replay import captured

from dsv4_plugin import log, topk
from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.engines.shared import adapter, shadow, shadow_report
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection
from dsv4_plugin.engines.vllm import wrappers
from dsv4_plugin.engines.vllm.context import LogitsTag, tag_logits
from dsv4_plugin.state import state

BACKENDS = ("torch", "cuda")
K, ROWS = 512, 6
WIDTHS = {"cpu": 1_500, "cuda": 40_000}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def _shadow(monkeypatch):
    monkeypatch.setenv("DSV4_SHADOW", "1")
    monkeypatch.setattr(shadow_report, "start", lambda failed: None)
    shadow.forget()
    log._said.clear()
    yield
    adapter.current().decide(INERT)
    shadow.forget()
    state.reset()


class Upstream:
    """An exact selection of float32 scores, less one entry in the rows that ``spoilt`` names."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend = backend
        self.spoilt = torch.zeros(ROWS, dtype=torch.bool, device=device)

    def __call__(self, logits, lengths, out, starts=None):
        assert logits.dtype == torch.float32
        topk(logits, lengths, K, row_starts=starts, out=out, backend=self.backend)
        first = out.storage_offset() // K  # a part of the scratch buffer
        out[:, 0].masked_fill_(self.spoilt[first : first + len(out)], -1)


def watched_decode(backend: str, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Watch decode calls on float32 scores; returns logits, lengths and out of such a call."""
    adapter.current().decide(Decision(True, strict=True, selection=Selection("fp32", backend)))
    shadow.prepare(torch.device(device), "decode")
    logits = scores("normal", ROWS, WIDTHS[device], torch.float32, device=device)
    tag_logits(logits, LogitsTag())
    lengths = torch.full((ROWS,), WIDTHS[device], dtype=torch.int32, device=device)
    out = torch.empty(ROWS, K, dtype=torch.int32, device=device)
    return logits, lengths, out


def settled(device: str) -> dict[str, dict[str, float]]:
    if device == "cuda":
        torch.cuda.synchronize()
    for (_, at), kept in shadow.kept.items():
        if at.type == device:
            assert kept.mirror.tolist() == kept.counters.tolist()
    return shadow_report.report()


def test_the_default_device_is_the_engines(backend, device, monkeypatch):
    """While it builds its model: the shadow ended with 'Only dense CPU tensors can be pinned'."""
    monkeypatch.setattr(shadow, "kept", {})
    with torch.device("cuda" if device == "cuda" else "meta"):
        shadow.prepare(torch.device(device), "decode")
    assert shadow.on()
    (kept,) = shadow.kept.values()
    assert kept.mirror.device.type == "cpu" and kept.counters.device.type == device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seam", ["decode", "prefill"])
def test_replays_are_counted(backend, device, dtype, seam, monkeypatch):
    adapter.current().decide(Decision(True, strict=True, selection=Selection(dtype, backend)))
    shadow.prepare(torch.device(device), "decode", "prefill")
    monkeypatch.setattr(shadow, "_SCRATCH_BYTES", 4 * 2 * WIDTHS[device])  # prefill in three parts
    columns = WIDTHS[device]
    logits = torch.empty(ROWS, columns, dtype=DTYPES[dtype], device=device)
    tag_logits(logits, LogitsTag())
    lengths = torch.zeros(ROWS, dtype=torch.int32, device=device)
    starts = torch.zeros_like(lengths)
    out = torch.empty(ROWS, K, dtype=torch.int32, device=device)
    upstream = Upstream(backend, device)

    def prefill(plain, begin, end, into, rows, stride0, stride1, k):
        upstream(plain, end - begin, into, begin)

    def step() -> None:
        if seam == "decode":
            wrappers.decode_topk(
                logits, lengths, 1, out, K, lambda plain, into: upstream(plain, lengths, into)
            )
        else:
            ends = starts + lengths
            wrappers.prefill_topk(prefill, logits, starts, ends, out, ROWS, *logits.stride(), K)

    logits.copy_(scores("normal", ROWS, columns, DTYPES[dtype], device=device))
    again, _ = captured(step, device)
    step()  # not captured: counting begins with this one
    settled(device)
    for kept in shadow.kept.values():  # from here on by replays alone
        kept.counters.zero_()
    want = dict.fromkeys(("rows", "equal", "entries", "agree"), 0)
    g = torch.Generator().manual_seed(0)
    for turn in range(12):
        if seam == "prefill":
            starts.copy_(torch.randint(0, 200, (ROWS,), generator=g))
        count = torch.randint(0, columns - 200, (ROWS,), generator=g)
        count[turn % ROWS] = turn % 3  # empty and very short rows
        lengths.copy_(count)
        logits.copy_(scores("normal", ROWS, columns, DTYPES[dtype], seed=turn, device=device))
        if seam == "decode":
            poison_tail(logits, lengths)
        spoilt = torch.rand(ROWS, generator=g) < 0.3
        upstream.spoilt.copy_(spoilt)
        out.fill_(7)
        again()
        want_out = topk(logits, lengths, K, row_starts=starts, backend="torch")
        assert torch.equal(out.sort(1).values, want_out.sort(1).values)
        for n, bad in zip(count.tolist(), spoilt.tolist(), strict=True):
            chosen = min(n, K)
            want["rows"] += chosen > 0
            want["equal"] += chosen > 0 and not bad
            want["entries"] += chosen
            want["agree"] += max(chosen - bad, 0)
    found = settled(device)[seam]
    assert {name: found[name] for name in want} == want
    assert found["tied"] == found["lower"] == found["higher"] == 0
    assert found["worst"] == 0  # a row of one column that upstream lost


def test_a_failing_upstream_leaves_the_capture_whole(backend, device):
    logits, lengths, out = watched_decode(backend, device)
    broken = [False]

    def upstream(plain, into):
        if broken[0]:
            raise RuntimeError("no such kernel")

    def step() -> None:
        wrappers.decode_topk(logits, lengths, 1, out, K, upstream)
        broken[0] = True  # from the capture on

    again, _ = captured(step, device)
    out.fill_(7)
    again()
    want = topk(logits, lengths, K, backend="torch")
    assert torch.equal(out.sort(1).values, want.sort(1).values)
    assert not shadow.on()


def test_reading_during_a_capture_disturbs_nothing(backend, device):
    """Another thread logs and asks for the status as fast as it can."""
    logits, lengths, out = watched_decode(backend, device)
    upstream = Upstream(backend, device)
    stop, looks = threading.Event(), [0]

    def read() -> None:
        while not stop.is_set():
            shadow_report.log_what_changed()
            looks[0] += 1

    def step() -> None:
        for _ in range(4):
            wrappers.decode_topk(
                logits, lengths, 1, out, K, lambda plain, into: upstream(plain, lengths, into)
            )

    reader = threading.Thread(target=read)
    reader.start()
    try:
        again, _ = captured(step, device)
        step()
        settled(device)
        before = shadow_report.report()["decode"]["rows"]
        for _ in range(5):
            again()
    finally:
        stop.set()
        reader.join()
    found = settled(device)["decode"]
    assert looks[0] > 0 and shadow.on()
    assert found["rows"] - before == 5 * 4 * ROWS
    assert found["equal"] == found["rows"] and found["worst"] == 1


@pytest.mark.parametrize("held", [0, -1, 0x5A5A5A5A5A5A])
def test_replays_begin_anew_where_the_memory_was_given_away(backend, device, held):
    """As after a sleep at level 2: the graph stays, what its counters held is anything."""
    logits, lengths, out = watched_decode(backend, device)
    upstream = Upstream(backend, device)

    def step() -> None:
        wrappers.decode_topk(
            logits, lengths, 1, out, K, lambda plain, into: upstream(plain, lengths, into)
        )

    again, _ = captured(step, device)
    step()
    for _ in range(3):
        again()
    assert settled(device)["decode"]["rows"] >= 3 * ROWS
    for (seam, _), kept in shadow.kept.items():
        if seam == "decode":  # one of an earlier test is not called, so nothing mends its mirror
            kept.counters.fill_(held)
            kept.seal.fill_(held)
    for turn in (1, 2):
        again()
        found = settled(device)["decode"]
        assert found["rows"] == found["equal"] == turn * ROWS
        assert found["entries"] == found["agree"] == turn * ROWS * K
        assert found["higher"] == found["lower"] == found["tied"] == 0 and found["worst"] == 1
