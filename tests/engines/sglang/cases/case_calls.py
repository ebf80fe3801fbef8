"""Results: SGLang's own forward with the plugin, against an exact oracle through the page table."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import expected, names
from kits.engine_parts import canonical

import dsv4_plugin

UPSTREAM = {"topk_v1", "topk_v2"}
BATCHES = {
    "decode": {"lengths": (1536, 700, 513, 512, 511, 3, 1)},
    "an empty row": {"lengths": (700, 0, 1500)},
    "one row": {"lengths": (2000,)},
    "only short rows": {"lengths": (512, 64, 1)},
    "a table wider than the rows": {"lengths": (700, 40), "pages": 40},
    "k 1024": {"lengths": (1700, 1024, 3), "k": 1024},
    "k 2048": {"lengths": (2700, 2049, 2048), "k": 2048},
    "prefill": {"lengths": (3, 512, 513, 700, 1100, 1536), "prefill": True},
    "ties": {"lengths": (1500, 700, 513), "ties": True},
    "prefill with ties": {"lengths": (600, 1500), "prefill": True, "ties": True},
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
v2 = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
whose = pytest.mark.parametrize("whose", ["auto", "engine"])  # logits by us, or by DeepGEMM
WROTE = {"auto": {"logits.plugin": 1, "logits.plugin.bf16.torch": 1}, "engine": {"logits.bf16": 1}}


def counters():
    return dsv4_plugin.status()["counters"]


@batches
@v2
def test_nobody_asked_nothing_changes(engine, load, batch, v2):
    load(DSV4_PLUGIN="")
    problem = engine.problem(**batch)
    engine.step(problem, v2=v2)
    assert names(engine) & UPSTREAM
    assert {c.dtype for c in engine.calls} == {torch.float32}
    assert counters() == {}
    assert dsv4_plugin.status()["engine"] is None


@batches
@v2
@pytest.mark.parametrize("raw", [False, True], ids=["slots", "slots and raw"])
@whose
def test_auto_is_exact_on_bfloat16(engine, load, batch, v2, raw, whose):
    load(DSV4_LOGITS=whose)
    problem = engine.problem(**batch, raw=raw)
    out = engine.step(problem, v2=v2)
    want = expected(engine, problem)
    assert engine.logits_of().dtype == torch.bfloat16
    assert engine.logits_of().by_plugin is (whose == "auto")
    assert torch.equal(canonical(out), canonical(problem.slots(want)))
    if raw:
        assert torch.equal(canonical(problem.raw), want)
        assert torch.equal(problem.slots(problem.raw), out)  # one order for both
    assert not names(engine) & UPSTREAM
    assert counters() == {**WROTE[whose], "topk.paged": 1, "topk.paged.bf16.torch": 1}


@batches
@v2
def test_float32_is_exact_on_upstreams_logits(engine, load, batch, v2):
    load(DSV4_TOPK="fp32")
    problem = engine.problem(**batch)
    out = engine.step(problem, v2=v2)
    assert (engine.logits_of().dtype, engine.logits_of().by_plugin) == (torch.float32, False)
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert not names(engine) & UPSTREAM
    assert counters() == {"topk.paged": 1, "topk.paged.fp32.torch": 1}


def test_float32_selects_what_upstream_selects(engine, load):
    problem = engine.problem(raw=True)
    load(DSV4_PLUGIN="")
    upstream = engine.step(problem).clone()
    raw = problem.raw.clone()
    load(DSV4_TOPK="fp32")
    assert torch.equal(canonical(engine.step(problem)), canonical(upstream))
    assert torch.equal(canonical(problem.raw), canonical(raw))


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("topk", ["bf16", "fp32"])
def test_rows_up_to_k_need_no_scores(engine, load, monkeypatch, poison, topk, prefill):
    """Their logits are uninitialised since 0.5.18, so the plugin must not read them."""
    real = engine.maths._new
    record = engine.maths._record
    lengths = (3, 512, 511, 0, 600) if not prefill else (3, 511, 512, 600)
    short = [n <= 512 for n in lengths]

    def poisoned(name, out, spans):
        out[torch.tensor(short)] = poison
        return record(name, out, spans)

    monkeypatch.setattr(engine.maths, "_new", lambda *a: real(*a).fill_(poison))
    monkeypatch.setattr(engine.maths, "_record", poisoned)
    load(DSV4_TOPK=topk, DSV4_LOGITS="engine")
    problem = engine.problem(lengths, raw=True, prefill=prefill)
    engine.step(problem)
    for row, n in enumerate(lengths):
        if short[row]:
            assert problem.raw[row].tolist() == [*range(n), *[-1] * (512 - n)]
    assert torch.equal(canonical(problem.raw), expected(engine, problem))


def test_ties_go_to_the_lowest_index(engine, load):
    load()
    problem = engine.problem((1500, 600), raw=True, ties=True)
    engine.step(problem)
    assert problem.raw.sort(1).values.tolist() == [[*range(512)]] * 2


def test_a_row_does_not_depend_on_the_batch(engine, load):
    load()
    whole = engine.problem((900, 1500, 1200), raw=True)
    engine.step(whole)
    alone = engine.problem((900, 1500, 1200), raw=True)
    for name in ("query", "weights", "lengths", "table", "out", "raw"):
        setattr(alone, name, getattr(alone, name)[1:2].clone())
    engine.step(alone)
    assert torch.equal(alone.raw[0], whole.raw[1])


def test_the_buffer_is_a_slice_of_a_wider_one(engine, load):
    load()
    problem = engine.problem((900, 40))
    wide = torch.full((2, 512 + 64), 9, dtype=torch.int32)
    problem.out = wide[:, :512]
    engine.step(problem)
    assert torch.equal(
        canonical(problem.out.contiguous()), canonical(problem.slots(expected(engine, problem)))
    )
    assert bool((wide[:, 512:] == 9).all())


def test_calls_of_others_are_upstreams(engine, load):
    """The same names outside the V4 forward stay SGLang's, whatever the dtype plan is."""
    load()
    engine.step(engine.problem())  # active
    engine.calls.clear()
    problem = engine.problem((700, 40))
    name = engine.topk_names()[0]
    out = torch.empty(2, 512, dtype=torch.int32)
    scores = torch.randn(2, 704)
    getattr(engine.indexer, name)(scores, problem.lengths, problem.table, out, 64)
    assert names(engine) == {"topk_v1"}


@pytest.mark.parametrize("k", [256, 768])
def test_another_k_is_upstreams(engine, load, caplog, k):
    load()
    problem = engine.problem((1500, 3), k=k)
    out = engine.step(problem)
    assert names(engine) & UPSTREAM
    assert torch.equal(canonical(out), canonical(problem.slots(expected(engine, problem))))
    assert counters()["topk.paged.upstream"] == 1
    assert f"index_topk is {k}" in caplog.text
    assert dsv4_plugin.status()["seams"]["topk.paged"]["engaged"] is False


# --- V3.2 and GLM ----------------------------------------------------------------------------


def dsa_scores(problem, seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(len(problem.lengths), problem.table.shape[1] * 64 + 64, generator=g)
    return wide[:, :-64]  # padded rows


@v2
@pytest.mark.parametrize("lengths", [(1536, 700, 512, 3, 0), (2500, 2048), (700, -4)])
def test_decode_shaped_paged_dsa(engine, load, lengths, v2):
    from kits.engine_parts import oracle

    load()
    problem = engine.problem(lengths, k=2048)
    scores = dsa_scores(problem)
    scores[:, 5] = float("inf")  # SGLang marks its first and local tokens so
    got = engine.dsa_step(scores, problem, v2=v2)
    want = torch.stack(
        [oracle(row[: max(n, 0)], 2048) for row, n in zip(scores, lengths, strict=True)]
    )
    assert torch.equal(canonical(got), canonical(problem.slots(want)))
    assert counters() == {"topk.dsa": 1, "topk.dsa.fp32.torch": 1}
    assert not names(engine)


def test_dsa_with_infinities_keeps_them(engine, load):
    load()
    problem = engine.problem((1500,), raw=True)
    scores = dsa_scores(problem)
    scores[0, :600] = float("inf")
    got = engine.dsa_step(scores, problem)
    assert torch.equal(canonical(got), canonical(problem.slots(torch.arange(512).int()[None])))


def test_dsa_of_another_form_is_upstreams(engine, load, monkeypatch):
    """Anything but decode-shaped PAGED ends in SGLang's own function with the same arguments."""
    load()
    problem = engine.problem((1500, 3))
    scores = dsa_scores(problem)
    starts = torch.zeros(2, dtype=torch.int32)
    engine.envs.SGLANG_DSA_FUSE_TOPK.set(False)  # SGLang then returns the indices themselves
    try:
        for extra in ({}, {"row_starts": starts}, {"force_unfused_topk": True}):
            got = engine.dsa_step(scores, problem, backend="torch", **extra)
            rows = zip(scores, (1500, 3), strict=True)
            want = [set(row[:n].topk(min(512, n)).indices.tolist()) for row, n in rows]
            assert [set(row[row >= 0].tolist()) for row in got] == want
    finally:
        engine.envs.SGLANG_DSA_FUSE_TOPK.set(True)
    assert counters() == {}


def test_dsa_by_another_backend_is_upstreams(engine, load, monkeypatch):
    load()
    problem = engine.problem((1500, 3))
    asked = []
    flashinfer = types.ModuleType("flashinfer")

    def transform(scores, *args, **kwargs):
        asked.append(scores.dtype)
        return torch.zeros(2, 512, dtype=torch.int32)

    flashinfer.top_k_page_table_transform = transform
    monkeypatch.setitem(__import__("sys").modules, "flashinfer", flashinfer)
    real = types.SimpleNamespace

    def with_wide_table(**kwargs):
        return real(**{**kwargs, "page_table_1": torch.zeros(2, 1536, dtype=torch.int32)})

    monkeypatch.setattr("kits.sglang_engine.types.SimpleNamespace", with_wide_table)
    # 0.5.16 takes its v2 kernel whatever the backend says, unless that is off.
    engine.dsa_step(dsa_scores(problem), problem, v2=False, backend="flashinfer")
    assert asked == [torch.float32]
    assert counters() == {"topk.dsa.upstream": 1}
