"""Results: vLLM's own indexer with the plugin, against an exact oracle and against vLLM alone."""

from __future__ import annotations

import pytest
import torch
from conftest import canonical

import dsv4_plugin

UPSTREAM_TOPK = {
    "cooperative_topk",
    "persistent_topk",
    "top_k_per_row_decode",
    "top_k_per_row_prefill",
}

BATCHES = {
    "decode 3 rows": {"decode": (700, 40, 1500)},
    "decode 70 rows": {"decode": tuple(range(500, 570)), "heads": 8, "max_model_len": 1024},
    "decode next_n 2": {"decode": (700, 41, 1500), "next_n": 2},
    "decode next_n 2, one length a request": {
        "decode": (700, 1, 1500),
        "next_n": 2,
        "one_length_a_request": True,
    },
    "decode with an empty row": {"decode": (700, 0, 1500)},
    "decode exactly k": {"decode": (512, 511, 513)},
    "prefill": {"prefill": ((1600, 5), (30, 3))},
    "prefill, a later request longer than k": {"prefill": ((600, 2), (1500, 4))},
    "mixed": {"decode": (700, 3), "prefill": ((1600, 5), (30, 3))},
    "pages with padding between": {
        "decode": (700, 40),
        "prefill": ((900, 4),),
        "page_padding": 576 - (64 * 132) % 576,
    },
    "index buffer wider than k": {
        "decode": (700, 40),
        "prefill": ((900, 4),),
        "wider_buffer": 512,
    },
    "k 1024": {"decode": (1700, 3), "prefill": ((1600, 5),), "k": 1024},
    "k 2048": {"decode": (2700, 2049), "prefill": ((90, 2), (2500, 3)), "k": 2048},
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def names(engine):
    return {call.name for call in engine.calls}


def untouched_rows(problem):
    return bool((problem.buffer[len(problem.lengths) :] == 7).all()) and bool(
        (problem.buffer[:, problem.k :][: len(problem.lengths)] != 0).all()
    )


@batches
def test_nobody_asked_nothing_changes(engine, run, batch):
    """Registered and not enabled: vLLM's own ops run, and the plugin counts nothing."""
    problem = engine.problem(**batch)
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    assert names(engine) & UPSTREAM_TOPK
    assert all(c.dtype in (None, torch.float32) for c in engine.calls)
    assert dsv4_plugin.status()["counters"] == {}


@batches
def test_float32_is_exact_and_the_same_as_upstream(engine, run, batch, monkeypatch):
    problem = engine.problem(**batch)
    upstream = run(problem)
    upstream_logits = [c.logits for c in engine.calls if c.logits is not None]

    monkeypatch.setenv("DSV4_PLUGIN", "1")
    got = run(problem, model="deepseek_v32")
    assert torch.equal(got, engine.expected(problem.k))
    assert torch.equal(got, upstream)
    assert not names(engine) & UPSTREAM_TOPK
    logits = [c.logits for c in engine.calls if c.logits is not None]
    for a, b in zip(logits, upstream_logits, strict=True):
        assert torch.equal(
            a,
            b,
        ) or torch.equal(a.nan_to_num(0), b.nan_to_num(0))
    assert untouched_rows(problem)
    counters = dsv4_plugin.status()["counters"]
    assert counters.get("topk.decode", 0) == bool(batch.get("decode"))
    assert counters.get("topk.prefill", 0) == bool(batch.get("prefill"))
    assert counters.get("gather", 0) == bool(batch.get("prefill"))
    assert not any(name.endswith(".upstream") for name in counters if name.startswith("topk"))


@batches
@pytest.mark.parametrize("whose", ["auto", "engine"])
def test_v4_selects_in_bf16(engine, run, batch, monkeypatch, can_bf16, whose):
    """On the plugin's logits, and on DeepGEMM's if requested and if it writes bfloat16."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", whose)
    by_plugin = whose == "auto"
    dtype = "bf16" if by_plugin or can_bf16 else "fp32"
    problem = engine.problem(**batch)
    got = run(problem)
    wrote = [c for c in engine.calls if c.logits is not None]
    assert {(c.dtype, c.by_plugin) for c in wrote} == {
        (torch.bfloat16 if dtype == "bf16" else torch.float32, by_plugin)
    }
    assert torch.equal(got, engine.expected(problem.k))  # on the very logits it was given
    assert not names(engine) & UPSTREAM_TOPK
    counters = dsv4_plugin.status()["counters"]
    by = {
        "plugin": by_plugin,
        "bf16": not by_plugin and can_bf16,
        "upstream": not by_plugin and not can_bf16,
    }
    for name, there in by.items():
        assert bool(counters.get(f"logits.{name}")) is there, name
    kind = "decode" if batch.get("decode") else "prefill"
    assert counters[f"topk.{kind}.{dtype}.torch"] == 1


def test_a_served_call_is_evidence_for_an_ab(engine, run, monkeypatch, tmp_path):
    """The evidence that ``dsv4-plugin ab`` needs exists after real calls, only if switched on."""
    from dsv4_plugin.cli.ab.console import Console
    from dsv4_plugin.cli.ab.engagement import judge
    from dsv4_plugin.cli.ab.servers import Server

    server = Server("B", "http://127.0.0.1:1", Console(), status=tmp_path)
    monkeypatch.setenv("DSV4_STATUS_DIR", str(tmp_path))
    run(engine.problem(decode=(700, 40)))
    assert list(tmp_path.iterdir()) == []
    assert judge(server, "off")[0].processes == []
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "fp32")
    monkeypatch.setenv("DSV4_BACKEND", "torch")
    run(engine.problem(decode=(700, 40), prefill=((900, 4),)))
    evidence, warnings = judge(server, "on")
    assert warnings == []
    assert evidence.processes[0]["counters"]["topk.decode"] == 1
    assert evidence.processes[0]["engine"].startswith("vLLM ")


@pytest.mark.parametrize(
    "topk,whose", [("fp32", "engine"), ("fp32", "plugin"), ("auto", "engine"), ("bf16", "auto")]
)
def test_ties_go_to_the_lowest_index(engine, run, monkeypatch, topk, whose):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", topk)
    monkeypatch.setenv("DSV4_LOGITS", whose)
    problem = engine.problem(
        decode=(1500, 2000), prefill=((1800, 4),), heads=2, quantum=4.0, seed=3
    )
    got = run(problem)
    for call in engine.calls:
        if call.logits is not None:
            for row, (a, b) in zip(call.logits, call.spans, strict=True):
                kth = row[a:b].float().sort(descending=True).values[problem.k - 1 : problem.k + 1]
                assert kth[0] == kth[1], "the inputs were meant to tie at the threshold"
    assert torch.equal(got, engine.expected(problem.k))


def test_the_direct_call_of_v32_is_covered(engine, run, monkeypatch):
    """V3.2 calls the Python function itself, past the layer's forward and the custom op."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    problem = engine.problem(**BATCHES["mixed"])
    got = run(problem, model="deepseek_v32", direct=True)
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK
    counters = dsv4_plugin.status()["counters"]
    assert counters["topk.decode"] == counters["topk.prefill"] == counters["gather"] == 1


def test_the_gather_brings_the_very_bytes(engine, run, monkeypatch):
    """The keys that reach DeepGEMM, against the cache as the problem laid it out."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_LOGITS", "engine")
    problem = engine.problem(prefill=((700, 3), (65, 2), (64, 1)), page_padding=64)
    seen = []
    dense = engine.deep_gemm._dense

    def spy(q, kv, *rest):
        seen.append((kv[0].view(torch.uint8).clone(), kv[1].clone().reshape(-1, 1)))
        return dense(q, kv, *rest)

    monkeypatch.setattr(engine.deep_gemm, "_dense", spy)
    run(problem)
    ((values, scales),) = seen
    want = torch.cat(problem.keys)
    assert torch.equal(values, want[:, :128])
    assert torch.equal(scales.view(torch.uint8), want[:, 128:])
    assert "cp_gather_indexer_k_quant_cache" not in names(engine)
    assert dsv4_plugin.status()["counters"]["gather.torch"] == 1


def test_gather_off_leaves_the_engines_own(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_INDEXER_READ", "off")
    problem = engine.problem(prefill=((700, 3),))
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    assert "cp_gather_indexer_k_quant_cache" in names(engine)
    counters = dsv4_plugin.status()["counters"]
    assert counters["gather.upstream"] == 1
    assert "gather" not in counters


def test_topk_off_leaves_the_engines_own(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    monkeypatch.setenv("DSV4_TOPK", "off")
    problem = engine.problem(**BATCHES["mixed"])
    got = run(problem)
    assert torch.equal(got, engine.expected(problem.k))
    assert {"cooperative_topk", "top_k_per_row_prefill"} <= names(engine)
    counters = dsv4_plugin.status()["counters"]
    assert counters["topk.decode.upstream"] == counters["topk.prefill.upstream"] == 1
    assert counters["gather"] == 1


def test_native_bf16_on_sm100_is_not_widened(engine, run, monkeypatch, no_plugin_logits):
    """From 0.33 DeepGEMM writes bfloat16 on SM100 unasked, and vLLM widens it for its top-k.

    Our kernels are not for that GPU, so ``auto`` means DeepGEMM there.
    """
    widens = hasattr(engine.indexer, "as_fp32_logits")
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    if not widens:  # the request is the way there
        problem = engine.problem(**BATCHES["decode 3 rows"])
        run(problem, gpu=100)
        assert {c.dtype for c in engine.calls if c.logits is not None} == {torch.bfloat16}
        return
    engine.deep_gemm.native = torch.bfloat16
    problem = engine.problem(**BATCHES["mixed"])
    got = run(problem, gpu=100)
    assert torch.equal(got, engine.expected(problem.k))
    assert not names(engine) & UPSTREAM_TOPK
    counters = dsv4_plugin.status()["counters"]
    assert counters["logits.bf16"] == 2
    assert counters["topk.decode.bf16.torch"] == counters["topk.prefill.bf16.torch"] == 1


def test_calls_of_other_users_of_the_ops_go_upstream(engine, run, monkeypatch):
    """GLM's pooled indexer and others call the patched names with logits without a tag."""
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    run(engine.problem(**BATCHES["decode 3 rows"]))
    engine.calls.clear()
    logits = torch.randn(2, 1024)
    out = torch.empty(2, 512, dtype=torch.int32)
    lengths = torch.tensor([[900], [1024]], dtype=torch.int32)
    workspace = torch.empty(16, dtype=torch.uint8)
    torch.ops._C.persistent_topk(logits, lengths, out, workspace, 512, 1024)
    assert names(engine) == {"persistent_topk"}
    want = [logits[r, : int(lengths[r])].topk(512).indices.sort().values for r in range(2)]
    assert torch.equal(canonical(out), torch.stack(want).int())
