"""Shadow mode: the comparison against Python sets, and what must never happen to a call."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsv4_plugin
from dsv4_plugin import log
from dsv4_plugin.engines.shared import adapter, shadow, shadow_report
from dsv4_plugin.engines.shared.decision import INERT, Decision, Selection
from dsv4_plugin.engines.shared.fallback import serve
from dsv4_plugin.engines.shared.shadow_report import Field
from dsv4_plugin.state import state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(shadow_report, "start", lambda failed: None)  # no thread a test
    shadow.kept.clear()
    shadow.forget()
    log._said.clear()
    yield
    adapter.current().decide(INERT)
    shadow.kept.clear()
    shadow.forget()
    state.reset()


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setenv("DSV4_SHADOW", "1")
    shadow.prepare(CPU)  # as an adapter does when it decides


def ints(rows):
    return torch.tensor(rows, dtype=torch.int32)


def counted(by_plugin, by_engine, **rest):
    counters = torch.zeros(len(Field), dtype=torch.int64)
    shadow.compare(counters, ints(by_plugin), ints(by_engine), **rest)
    return dict(zip((f.name.lower() for f in Field), counters.tolist(), strict=True))


def test_equal_sets_in_another_order():
    got = counted([[1, 5, 9], [0, 1, -1]], [[9, 1, 5], [1, 0, -1]])
    assert got == {
        "rows": 2, "equal": 2, "entries": 5, "agree": 5, "tied": 0, "lower": 0, "higher": 0,
        "worst": 0,
    }  # fmt: skip


def test_rows_that_nobody_chose_from_are_left_out():
    got = counted([[-1, -1], [3, 4]], [[-1, -1], [4, 5]])
    assert (got["rows"], got["equal"], got["entries"], got["agree"]) == (1, 0, 2, 1)
    assert got["worst"] == 500_000


def test_the_other_set_may_be_int64():
    counters = torch.zeros(len(Field), dtype=torch.int64)
    shadow.compare(counters, ints([[3, 1]]), torch.tensor([[1, 3]]))
    assert counters[Field.EQUAL] == 1


def test_a_hole_and_a_repeated_index_are_losses():
    got = counted([[1, 2, 3, 4]] * 2, [[1, 2, -1, -1], [1, 1, 1, 4]])
    assert (got["entries"], got["agree"], got["worst"]) == (8, 4, 500_000)


def test_an_index_too_many_is_a_loss():
    got = counted([[7, -1, -1]], [[7, 8, 9]])
    assert (got["entries"], got["agree"], got["equal"]) == (3, 1, 0)
    assert got["worst"] == 666_667, "rounded up: the overlap is never flattered"


def test_differences_are_told_apart_by_their_scores():
    scores = torch.tensor([[5.0, 4.0, 3.0, 3.0, 2.0, 9.0]])
    lengths = torch.tensor([5])

    def of(by_engine):
        got = counted([[0, 1, 2]], [by_engine], scores=scores, lengths=lengths)
        return got["tied"], got["lower"], got["higher"]

    assert of([0, 1, 2]) == (0, 0, 0)
    assert of([0, 1, 3]) == (1, 0, 0)  # equal to our last score: both are right
    assert of([0, 1, 4]) == (0, 1, 0)
    assert of([0, 1, 5]) == (0, 1, 0)  # past the row: garbage, however large
    got = counted([[1, 2, 3]], [[0, 1, 2]], scores=scores, lengths=lengths)
    assert (got["tied"], got["lower"], got["higher"]) == (0, 0, 1)  # the plugin would be wrong


def test_scores_are_found_from_the_rows_start():
    scores = torch.tensor([[9.0, 9.0, 5.0, 4.0, 4.0, 1.0]])
    got = counted([[0, 1]], [[0, 2]], scores=scores, lengths=torch.tensor([4]),
                  starts=torch.tensor([2]))  # fmt: skip
    assert (got["agree"], got["tied"], got["lower"], got["higher"]) == (1, 1, 0, 0)


rows = st.lists(st.integers(-1, 12), min_size=6, max_size=6)


@given(st.lists(st.tuples(rows, rows), min_size=1, max_size=9), st.integers(1, 4))
def test_against_python_sets(pairs, at_a_time):
    by_plugin, by_engine = zip(*pairs, strict=True)
    before = shadow._ENTRIES
    shadow._ENTRIES = 6 * at_a_time  # several chunks
    try:
        got = counted(by_plugin, by_engine)
    finally:
        shadow._ENTRIES = before
    want = dict.fromkeys(got, 0)
    for a, b in pairs:
        a, b = {i for i in a if i >= 0}, {i for i in b if i >= 0}
        entries, common = max(len(a), len(b)), len(a & b)
        if entries:
            want["rows"] += 1
            want["equal"] += a == b
            want["entries"] += entries
            want["agree"] += common
            want["worst"] = max(want["worst"], -(-(entries - common) * 10**6 // entries))
    assert got == want


@given(st.data())
def test_ties_against_python(data):
    k, columns = 4, 10
    scores = data.draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns))
    n = data.draw(st.integers(k + 1, columns))
    best = sorted(range(n), key=lambda i: (-scores[i], i))[:k]
    other = data.draw(st.lists(st.integers(0, columns - 1), min_size=k, max_size=k))
    got = counted([best], [other], scores=torch.tensor([scores]).bfloat16(),
                  lengths=torch.tensor([n]))  # fmt: skip
    last = min(scores[i] for i in best)
    extra = set(other) - set(best)
    assert got["tied"] == sum(i < n and scores[i] == last for i in extra)
    assert got["higher"] == 0, "the first argument was exact"
    assert got["lower"] == len(extra) - got["tied"]


@pytest.mark.parametrize("held", [0, 1, 7, -1, 0x5A5A5A5A5A5A, 2**62])
@pytest.mark.parametrize("which", ["counters", "seal", "both"])
def test_counting_begins_anew_where_the_memory_was_given_away(on, held, which):
    """As by an engine that slept at level 2: what its pool held is anything afterwards."""
    by_plugin = ints([[1, 2], [3, 4]])
    for _ in range(3):
        shadow.watch("decode", by_plugin, lambda scratch: scratch.copy_(by_plugin))
    before = shadow_report.report()["decode"]
    assert before["rows"] == 6
    kept = shadow.kept["decode", CPU]
    for name in ("counters", "seal") if which == "both" else (which,):
        getattr(kept, name).fill_(held)
    shadow.watch("decode", by_plugin, lambda scratch: scratch.copy_(by_plugin))
    now = shadow_report.report()["decode"]
    assert (now["rows"], now["entries"], now["agree"], now["higher"]) == (2, 4, 4, 0)
    shadow.watch("decode", by_plugin, lambda scratch: scratch.copy_(by_plugin))
    assert shadow_report.report()["decode"]["rows"] == 4


def test_nothing_happens_unless_it_is_asked_for():
    def never(scratch):
        raise AssertionError("ran")

    shadow.watch("decode", ints([[1]]), never)
    assert "shadow" not in dsv4_plugin.status() and not shadow.kept


def test_counters_add_up_and_status_has_them(on):
    for by_engine in ([[0, 1]], [[0, 2]]):
        shadow.watch("decode", ints([[0, 1]]), lambda s, t=by_engine: s.copy_(ints(t)))
    shadow.watch("prefill", ints([[3, -1]]), lambda s: ints([[3, -1]]))
    got = dsv4_plugin.status()["shadow"]
    assert got["decode"] == {
        "rows": 2, "equal": 1, "entries": 4, "agree": 3, "tied": 0, "lower": 0, "higher": 0,
        "worst": 0.5,
    }  # fmt: skip
    assert got["prefill"]["agree"] == 1
    said = shadow_report.line("decode", got["decode"])
    assert "decode 75.00 % of entries agree over 2 rows (worst row 50.00 %, 1 rows equal)" in said


def test_the_scratch_buffer_is_not_the_output(on):
    out = ints([[4, 5]])

    def upstream(scratch):
        assert scratch.tolist() == [[-1, -1]] and scratch.dtype == torch.int32
        scratch.fill_(99)

    shadow.watch("decode", out, upstream)
    assert out.tolist() == [[4, 5]]


def test_a_failure_is_said_once_and_ends_the_shadow(on, caplog):
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    calls = []

    def fails(scratch):
        calls.append(1)
        raise RuntimeError("no kernel")

    adapter.current().decide(Decision(True, strict=True, selection=Selection("fp32", "torch")))
    served = []
    for _ in range(3):
        serve(
            "decode", adapter.current().decision.selection, torch.float32,
            lambda selection: served.append("plugin"),
            lambda: served.append("upstream"),
            lambda: shadow.watch("decode", ints([[1]]), fails),
        )  # fmt: skip
    assert served == ["plugin"] * 3 and len(calls) == 1
    assert adapter.current().decision.selection is not None
    errors = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1 and "no kernel" in errors[0]


def test_the_engines_answer_is_not_watched(on):
    served = []
    serve("decode", None, torch.float32, lambda topk: None, lambda: served.append("upstream"),
          lambda: served.append("watched"))  # fmt: skip
    assert served == ["upstream"]


def test_counting_begins_anew_after_a_capture(on, monkeypatch):
    """Warm-up and capture run on meaningless scores."""
    capturing = [False]
    monkeypatch.setattr(shadow, "_capturing", lambda device: capturing[0])

    def call():
        shadow.watch("decode", ints([[0, 1]]), lambda s: ints([[0, 2]]))

    call()  # a warm-up
    capturing[0] = True
    call()
    call()
    assert dsv4_plugin.status()["shadow"]["decode"]["rows"] == 3
    capturing[0] = False
    call()
    call()
    assert dsv4_plugin.status()["shadow"]["decode"]["rows"] == 2


def test_no_counters_are_made_while_a_graph_is_captured(on, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    monkeypatch.setattr(shadow, "_capturing", lambda device: True)
    shadow.watch("decode", ints([[0]]), lambda s: pytest.fail("ran"))
    assert not shadow.kept and "not watched" in caplog.text
    monkeypatch.setattr(shadow, "_capturing", lambda device: False)
    shadow.prepare(CPU, "decode")
    kept = shadow.kept["decode", CPU]
    shadow.forget()
    assert not shadow.on()
    assert shadow.kept["decode", CPU] is kept, "a graph may still write there"


def test_the_log_says_what_changed_and_warns_of_the_plugins(on, caplog):
    caplog.set_level(logging.DEBUG, logger="dsv4_plugin")
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    args = (scores, lambda: torch.tensor([3]))
    shadow.watch("decode", ints([[0]]), lambda s: ints([[0]]), *args)
    shadow_report.log_what_changed()
    shadow_report.log_what_changed()
    assert [r.levelno for r in caplog.records] == [logging.INFO]
    shadow.watch("decode", ints([[2]]), lambda s: ints([[0]]), *args)
    shadow_report.log_what_changed()
    assert caplog.records[-1].levelno == logging.WARNING
    assert "so the plugin's is not exact" in caplog.records[-1].message


def test_widened_scores_come_in_parts():
    assert shadow.parts(torch.empty(7, 100)) == [slice(0, 7)]
    assert shadow.parts(torch.empty(0, 100)) == []
    wide = torch.empty(5, 8 << 20, dtype=torch.bfloat16, device="meta")
    assert shadow.parts(wide) == [slice(i, min(i + 2, 5)) for i in (0, 2, 4)]
