"""DeepSeek-V4.1: the plugin's selection inside SGLang's own code, against an exact oracle.

The oracle has scores of its own, and a stable sort. The tests compare the answers as ordered lists.
"""

from __future__ import annotations

import pytest
import torch
from kits.engine_parts import oracle
from kits.sglang_v41 import LAYERS, PAGE, SOURCE, K

import dsv4_plugin
from dsv4_plugin.engines.sglang import v41_calls

HELD = 66  # candidate blocks of a row: of 66 · 8 keys
BATCHES = {
    "decode": {"lengths": (800, 529, 528, 100, 2, 1)},
    "one row": {"lengths": (1000,)},
    "verification": {"lengths": (800, 530), "new": 3, "mode": "verify"},
    "rows that a graph adds": {"lengths": (700, 20), "padding": 2},
    "prefill": {"lengths": (535,), "new": 9, "mode": "prefill"},
    "several prompts": {"lengths": (600, 9, 4, 700, 1), "new": (4, 9, 4, 5, 1), "mode": "prefill"},
    "context parallel": {
        "lengths": (601, 40, 30), "new": (9, 40, 1), "mode": "prefill",
        "local": [range(1, 9, 2), range(0, 40, 2), []],
    },
}  # fmt: skip
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def counters():
    return dsv4_plugin.status()["counters"]


def best_blocks(scores, held):
    """The candidate blocks of a row: the newest, and the best; the lowest among equals."""
    maxima = torch.nn.functional.pad(scores.float(), (0, -len(scores) % 8), value=-torch.inf)
    maxima = maxima.view(-1, 8).amax(1)
    maxima[(len(scores) - 1) // 8] = torch.inf
    best = oracle(maxima, held)
    return best[best >= 0]


def wanted(forward, held=HELD, layers=(2, SOURCE, 24)):
    """The positions that these layers select, ascending, -1 in the rest."""
    answers, blocks = {}, []
    for layer in layers:
        scores = forward.scores(layer)
        if layer == SOURCE:
            blocks = [best_blocks(row, held) if len(row) else None for row in scores]
        if layer > SOURCE:
            for row, kept in zip(scores, blocks, strict=True):
                if len(row):
                    away = torch.ones(-(-len(row) // 8), dtype=torch.bool)
                    away[kept.long()] = False
                    row[away.repeat_interleave(8)[: len(row)]] = float("nan")
        answers[layer] = torch.stack([_of_numbers(row) for row in scores])
    return answers


def _of_numbers(row):
    """The oracle's answer among the scores that are numbers."""
    keys = (~row.isnan()).nonzero()[:, 0].to(torch.int32)
    at = oracle(row[keys.long()], K)
    return torch.where(at < 0, -1, keys[at.clamp(min=0).long()] if len(keys) else at)


def slots(model, forward, layer, positions):
    """Where the keys at these positions are in the pool."""
    ratio = LAYERS[layer]
    tokens = model.req_to_token[forward.batch.requests]
    found = tokens.gather(1, (positions.clamp(min=0) * ratio).long()) // ratio
    return torch.where(positions < 0, -1, found)


def check(model, forward, held=HELD, layers=(2, SOURCE, 24)):
    want = wanted(forward, held, layers)
    for layer in layers:
        out = forward.run(layer)
        assert torch.equal(out, slots(model, forward, layer, want[layer])), layer
        if forward.batch.mode == "prefill":
            assert torch.equal(forward.raw[LAYERS[layer]], want[layer]), layer


@batches
def test_every_layer_is_exact(load, make_model, used, batch):
    load()
    model = make_model(held=HELD)
    check(model, model.forward(model.batch(**batch)))
    assert set(counters()) == {
        f"topk.v41.{kind}{by}" for kind in ("plain", "source", "consumer")
        for by in ("", ".bf16.torch")
    }  # fmt: skip
    assert not used.engine


@pytest.mark.parametrize("batch", ["verification", "several prompts"])
def test_all_eight_layers(load, make_model, used, batch):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**BATCHES[batch]))
    check(model, forward, HELD, LAYERS)
    assert counters()["topk.v41.consumer"] == 4 and not used.engine


@batches
def test_a_prefill_in_little_memory(load, make_model, used, monkeypatch, batch):
    """A prefill is cut into parts, and its consumers read the keys of their candidates."""
    monkeypatch.setattr(v41_calls, "KEPT_BYTES", 5000)
    monkeypatch.setattr(v41_calls, "WHOLE_COLUMNS", 0)
    load()
    model = make_model(held=HELD)
    check(model, model.forward(model.batch(**batch)))
    assert not used.engine


def test_a_decode_in_little_memory(load, make_model, used, monkeypatch):
    """No scores are kept: the keys of the best blocks are scored a second time."""
    monkeypatch.setattr(v41_calls, "KEPT_BYTES", 5000)
    load()
    model = make_model(held=530, context=9216, requests=2)
    check(model, model.forward(model.batch((9000, 4300))), 530)
    again = ["block_maxima", "select_blocks", "candidate_select"]
    assert used.ops == [*again, *again, "candidate_select"]


@pytest.mark.parametrize("batch", ["decode", "several prompts"])
def test_where_all_blocks_are_candidates_there_are_none_to_choose(load, make_model, used, batch):
    load()
    model = make_model(held=2048)
    forward = model.forward(model.batch(**BATCHES[batch]))
    check(model, forward, 2048)
    assert set(used.ops) == {"paged_logits", "topk"}


def test_consumers_of_decode_score_their_candidates_only(load, make_model, used):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((1000, 700)))
    forward.run(SOURCE)
    assert used.ops == ["block_maxima", "select_blocks", "topk"]
    used.ops.clear()
    forward.run(SOURCE + 4)
    assert used.ops == ["candidate_select"]
    assert not used.engine


def test_consumers_of_a_long_prefill_score_their_candidates_only(
    load, make_model, used, monkeypatch
):
    monkeypatch.setattr(v41_calls, "WHOLE_COLUMNS", 600)
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((700, 590), (4, 4), "prefill"))
    forward.run(SOURCE)
    used.ops.clear()
    forward.run(SOURCE + 4)
    assert used.ops == ["candidate_logits"] * 2 + ["select_candidates"]


def test_a_part_of_a_prefill_has_no_more_scores_than_it_may(load, make_model, used, monkeypatch):
    monkeypatch.setattr(v41_calls, "KEPT_BYTES", 10_000)
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((700,), (50,), "prefill"))
    forward.run(SOURCE)
    assert len(used.widths) == 50 // 7 + 1
    assert all(rows * columns * 2 <= 10_000 for rows, columns in used.widths)


def test_verification_shares_the_read_of_a_key(load, make_model, used, engine):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((900, 600), 3, "verify"))
    forward.run(SOURCE)
    says = hasattr(forward.metadata.c1_indexer_metadata, "rows_per_request")
    assert says == (engine.version != "0.5.22")
    assert used.shapes[0] == ((2, 3, 32, 128) if says else (6, 1, 32, 128))


@pytest.mark.parametrize("batch", ["prefill", "several prompts"])
def test_positions_alone(load, make_model, used, batch):
    """Sparse prefill wants no slots."""
    load()
    model = make_model(held=HELD)
    model.attn._low_ratio_prefill_reads_page_indices = lambda forward_batch: False
    forward = model.forward(model.batch(**BATCHES[batch]))
    want = wanted(forward)
    for layer in want:
        out = forward.run(layer)
        assert torch.equal(forward.raw[LAYERS[layer]], want[layer])
        assert (out == 7).all()  # not touched
    assert not used.engine


def test_the_rest_of_an_output_is_blank(load, make_model, used):
    """SGLang's buffers may have more rows and columns than a call fills."""
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((700, 20)))
    forward.out[1] = torch.full((4, K + 64), 7, dtype=torch.int32)
    out = forward.run(SOURCE)
    assert (out[2:] == -1).all() and (out[:, K:] == -1).all()
    assert (out[0, :K] >= 0).all() and not used.engine


def test_no_rows(load, make_model, used):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch(()))
    for layer in (2, SOURCE):
        forward.run(layer)
    assert not used.ops and counters() == {}


def test_pages_are_read_where_the_table_says(load, make_model):
    """Requests have their pages in an order of their own, and a page table wider than they are."""
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((300,)), width=1024)
    check(model, forward)
    table = forward.metadata.c1_indexer_metadata.page_table
    assert table.shape[1] == 1024 // PAGE and (table[0, 1:] - table[0, :-1] < 0).any()
