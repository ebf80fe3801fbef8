"""The plugin's logits in place of DeepGEMM's: use, answers, fallback, refusals with reasons."""

from __future__ import annotations

import logging

import pytest
import torch
from case_calls import batches, best, counters, decode, prefill, through
from case_registry import broken, lines
from kits.engine_parts import canonical

from dsv4_plugin.errors import UnmetError

can_bf16 = pytest.mark.parametrize(
    "can_bf16", [False, True], ids=["DeepGEMM in float32", "DeepGEMM in bfloat16"]
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def whose(engine):
    return {(c.dtype, c.by_plugin) for c in engine.calls if c.logits is not None}


@batches
@pytest.mark.parametrize("topk", DTYPES)
@pytest.mark.parametrize("layout", ["logical_offsets", "global_slots"])
def test_decode(engine, load, lengths, topk, layout):
    load(DSV4_TOPK=topk, DSV4_LOGITS="plugin")
    batch = engine.batch(lengths)
    got, lens = decode(engine, batch, layout=layout)
    assert whose(engine) == {(DTYPES[topk], True)}
    want = best(engine, lengths, 512)
    if layout == "global_slots":
        want = through(batch["table"], want)
    assert torch.equal(canonical(got), canonical(want))
    assert lens.tolist() == [min(n, 512) for n in lengths]
    assert counters()[f"logits.plugin.{topk}.torch"] == 1


@pytest.mark.parametrize(
    "requests",
    [[(1536, 5)], [(700, 3), (1500, 4), (40, 2)], [(5, 5)], [(513, 1), (512, 1), (511, 1)]],
    ids=["one", "three", "shorter than its queries", "around k"],
)
@pytest.mark.parametrize("blocks", [False, True])
def test_dsa_prefill(engine, load, requests, blocks):
    load(DSV4_LOGITS="plugin")
    more = {"max_logits_bytes": 2300 * 2 * 4} if blocks else {}
    got, lens, starts, ends, _ = prefill(engine, requests, **more)
    assert whose(engine) == {(torch.bfloat16, True)}
    lengths = [max(0, b - a) for a, b in zip(starts, ends, strict=True)]
    rows = [r for c in engine.calls for r in zip(c.logits, c.spans, strict=True)]
    from kits.engine_parts import oracle

    want = torch.stack([oracle(row[a:b].float(), 512) for row, (a, b) in rows])
    want = torch.where(want < 0, want, want + torch.tensor(starts)[:, None]).to(torch.int32)
    assert torch.equal(canonical(got), canonical(want))
    assert lens.tolist() == [min(n, 512) for n in lengths]


@pytest.mark.parametrize("topk", ["bf16", "fp32"])
def test_dsv4_modes(engine, load, topk):
    load(DSV4_TOPK=topk, DSV4_LOGITS="plugin")
    lengths = (1536, 700, 512, 3)
    batch = engine.batch(lengths)
    q = (batch["q"].to(torch.float8_e4m3fn), torch.empty(0))
    got = engine.dsv4.dsv4_decode_topk(
        q, batch["weights"], batch["plane"], batch["lengths"][:, None], batch["table"],
        page_size=64, topk=512, max_context_len=batch["table"].shape[1] * 64, plan=None,
        index_k_format="fp8_scaled",
    )  # fmt: skip
    assert torch.equal(canonical(got), best(engine, lengths, 512))
    cu = torch.zeros(5, dtype=torch.int32)
    cu[1:] = batch["lengths"].cumsum(0)
    got, _ = engine.dsv4.dsv4_prefill_topk(
        q, batch["weights"], batch["plane"], batch["table"], cu, cu[:-1], cu[1:],
        batch["lengths"], page_size=64, topk=512, max_seqlen_k=1536, index_k_format="fp8_scaled",
    )  # fmt: skip
    assert torch.equal(canonical(got), best(engine, lengths, 512))
    assert whose(engine) == {(DTYPES[topk], True)} and counters()["logits.plugin"] == 2


def test_plugin_logits_are_deepgemms_rounded(engine, load):
    load(DSV4_TOPK="fp32")
    batch = engine.batch((1500, 40))
    decode(engine, batch)
    engine_call = engine.calls[-1]
    load(DSV4_TOPK="bf16", DSV4_LOGITS="plugin")
    from dsv4_plugin.engines.shared import adapter

    adapter.current().forget_decisions()
    decode(engine, batch)
    plugin_call = engine.calls[-1]
    assert (engine_call.by_plugin, plugin_call.by_plugin) == (False, True)
    for r, n in enumerate((1500, 40)):
        a, b = plugin_call.logits[r, :n].float(), engine_call.logits[r, :n]
        assert bool(((a - b).abs() <= 2**-8 * b.abs() + 1e-5 * b.abs().max()).all())


@can_bf16
@pytest.mark.parametrize("topk", ["auto", "bf16"])
def test_auto_is_the_plugin(engine, load, topk, can_bf16):
    load(DSV4_TOPK=topk)
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    decode(engine, engine.batch((1500, 3)))
    prefill(engine, [(700, 3)])
    assert whose(engine) == {(torch.bfloat16, True)}


@can_bf16
def test_auto_is_deepgemms_where_the_plugin_cannot(
    engine, load, caplog, no_plugin_logits, can_bf16
):
    """In bfloat16 where it writes that, else in float32, and the line has both reasons."""
    load()
    engine.install_deep_gemm(has_logits_dtype=can_bf16)
    lengths = (1500, 3)
    got, _ = decode(engine, engine.batch(lengths))
    assert torch.equal(canonical(got), best(engine, lengths, 512))
    prefill(engine, [(700, 3)])
    assert whose(engine) == {(torch.bfloat16 if can_bf16 else torch.float32, False)}
    assert "logits.plugin" not in counters()
    dtype = "bf16" if can_bf16 else "fp32"
    assert counters()[f"topk.dsa_decode_topk.{dtype}.torch"] == 1
    active = [line for line in lines(caplog) if "active" in line]
    assert len(active) == 2  # one a mode
    for line in active:
        for part in ("takes no logits_dtype", "plugin's logits by torch: the library is not there"):
            assert (part in line) is not can_bf16


def test_bf16_that_nobody_can_write_is_one_error(engine, load, no_plugin_logits):
    load(DSV4_TOPK="bf16")
    engine.install_deep_gemm(has_logits_dtype=False)
    with pytest.raises(UnmetError, match="takes no logits_dtype") as caught:
        decode(engine, engine.batch((1500,)))
    assert "plugin's logits by torch: the library is not there" in caught.value.unmet


def of_another_form(engine):
    """Weights that the plugin's kernel cannot read unchanged, and DeepGEMM's caller copies."""
    batch = engine.batch((1500, 3))
    q = (batch["q"].to(torch.float8_e4m3fn), torch.empty(0))
    return engine.dsv4.dsv4_decode_topk(
        q, batch["weights"].t().contiguous().t(), batch["plane"], batch["lengths"][:, None],
        batch["table"], page_size=64, topk=512, max_context_len=1536,
        plan=torch.zeros(133, 2, dtype=torch.int32), index_k_format="fp8_scaled",
    )  # fmt: skip


def test_a_call_the_plugin_does_not_take_is_tokenspeeds(engine, load, caplog, upstream):
    """One call, and nothing is switched off."""
    load()
    assert of_another_form(engine) == ("upstream", engine.without_plugin["dsv4_decode_topk"])
    assert counters() == {"topk.dsv4_decode_topk.upstream": 1}
    assert lines(caplog, logging.ERROR) == []
    decode(engine, engine.batch((1500, 3)))
    assert whose(engine) == {(torch.bfloat16, True)}


def test_a_call_the_plugin_does_not_take_strictly(engine, load, upstream):
    load(DSV4_STRICT="1")
    with pytest.raises(UnmetError, match="the plugin's logits.*another form"):
        of_another_form(engine)
    assert not upstream


def test_logits_that_fail_are_tokenspeeds_call(engine, load, monkeypatch, upstream):
    load(DSV4_LOGITS="plugin")
    monkeypatch.setattr("dsv4_plugin.ops.logits.paged_logits", broken)
    assert decode(engine, engine.batch((1500, 3))) == (
        "upstream",
        engine.without_plugin["dsa_decode_topk"],
    )


def test_plugin_logits_that_cannot_be_met_list_everything(engine, load, monkeypatch):
    from dsv4_plugin.kernels import cuda

    monkeypatch.setattr(cuda, "missing", lambda: "the library is not there")
    load(DSV4_LOGITS="plugin", DSV4_BACKEND="cuda")
    with pytest.raises(UnmetError) as caught:
        decode(engine, engine.batch((1500,)))
    assert caught.value.wish == "DSV4_LOGITS=plugin"
    for part in ("plugin's logits by cuda: the tensors are on cpu",
                 "plugin's logits by cuda: the library is not there"):  # fmt: skip
        assert part in str(caught.value)


def test_rows_that_shall_be_sharded_are_an_error(engine, load):
    load(DSV4_SHARD_PREFILL="1")
    with pytest.raises(UnmetError, match="no prefill of this kind is sharded") as caught:
        decode(engine, engine.batch((1500,)))
    assert caught.value.wish.startswith("DSV4_SHARD_PREFILL=1, ")
