"""DeepSeek-V4.1: the calls that the plugin leaves to SGLang, and their answers."""

from __future__ import annotations

import logging

import pytest
import torch
from case_v41_calls import HELD, counters, slots, wanted
from conftest import CANDIDATE_OPS, names
from kits.sglang_v41 import LAYERS, SOURCE
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

import dsv4_plugin
from dsv4_plugin.engines.sglang import v41, v41_calls, v41_published
from dsv4_plugin.errors import UnmetError

CONSUMER = SOURCE + 4
SMALL = {
    "decode": {"lengths": (600, 20)},
    "prefill": {"lengths": (600, 20), "new": (3, 2), "mode": "prefill"},
}
modes = pytest.mark.parametrize("mode", SMALL)


def objects(model):
    attn = model.attn
    return attn.prefill_candidates, attn.decode_candidates, attn.full_topk_indexer


def left_to_the_engine(model, engine):
    return not any(isinstance(found, v41._Before) for found in objects(model))


def as_good_as(forward, layer, want):
    """Assert that the keys of a layer have the same scores as the oracle's keys."""
    out = forward.run(layer)
    for row, scores in enumerate(forward.scores(layer)):
        chosen = out[row][out[row] >= 0]
        request = forward.batch.requests[row : row + 1]
        keys = torch.arange(len(scores))[None]
        where = slots(forward.model, _one(request), layer, keys)[0]
        at = (where[:, None] == chosen[None]).nonzero()[:, 0]
        assert len(at) == len(chosen) == len(chosen.unique())
        best = want[layer][row]
        best = scores[best[best >= 0].long()].sort().values
        assert torch.equal(scores[at].sort().values, best)
    return out


class _one:
    def __init__(self, requests):
        self.batch = self
        self.requests = requests


# --- whose answer -----------------------------------------------------------------------------


@modes
def test_sglang_itself_selects_as_good_keys(load, make_model, used, mode):
    """What the oracle asks is SGLang's own rule, up to the order of equal scores."""
    load(DSV4_PLUGIN="")
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL[mode]))
    want = wanted(forward)
    for layer in (2, SOURCE):
        as_good_as(forward, layer, want)
    assert not used.ops and counters() == {}


BOTH = {2: ("paged_logits", "topk"), SOURCE: ("block_maxima", "select_blocks", "topk")}
OPS = {
    "decode": {**BOTH, CONSUMER: ("candidate_select",)},
    "prefill": {**BOTH, CONSUMER: ("candidate_select",)},
    "prompts": {CONSUMER: ("candidate_logits", "select_candidates")},
}
PROMPTS = {"lengths": (700, 590), "new": (4, 4), "mode": "prefill"}


@pytest.mark.parametrize(
    ("mode", "layer", "op"),
    [(mode, n, op) for mode, layers in OPS.items() for n, ops in layers.items() for op in ops],
)
def test_a_broken_op_leaves_the_call_to_sglang(
    load, make_model, used, monkeypatch, caplog, mode, layer, op
):
    """The source's consumers also find what SGLang's own source would have published."""
    load()
    monkeypatch.setattr(v41_calls, "WHOLE_COLUMNS", 0)
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL.get(mode, PROMPTS)))
    want = wanted(forward)
    if layer == CONSUMER:
        forward.run(SOURCE)
    where = v41_calls if hasattr(v41_calls, op) else v41_calls.ops
    fail_at_once = pytest.MonkeyPatch()
    fail_at_once.setattr(where, op, lambda *a, **k: 1 / 0)
    as_good_as(forward, layer, want)
    fail_at_once.undo()
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1 and "ZeroDivisionError" in errors[0].getMessage()
    used.ops.clear()
    forward.run(2)  # from now on SGLang serves every call
    assert not used.ops and "ZeroDivisionError" in dsv4_plugin.status()["seams"]["topk.full"]["why"]


def test_a_consumer_of_sglangs_own_source_is_sglangs(load, make_model, used, monkeypatch):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL["prefill"]))

    def refused(*args, **kwargs):
        raise UnmetError("this call", ["it has another form"])

    patch = pytest.MonkeyPatch()
    patch.setattr(v41_calls.ops, "block_maxima", refused)
    as_good_as(forward, SOURCE, wanted(forward))
    patch.undo()
    used.ops.clear()
    forward.run(CONSUMER)
    assert not used.ops and counters()["topk.v41.consumer.upstream"] == 1
    forward.run(2)  # a refusal is about one call
    assert used.ops


@pytest.mark.parametrize("settings", [{}, {"DSV4_LOGITS": "plugin"}, {"DSV4_STRICT": "1"}])
def test_a_call_of_another_form(load, make_model, used, caplog, settings):
    """SGLang serves, with a log line; if a setting demands the plugin's scores it is an error."""
    load(**settings)
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL["prefill"]))
    want = wanted(forward)
    model.indexers[2].n_local_heads = 16  # heads that are spread over ranks
    if settings:
        with pytest.raises(UnmetError, match="spread over ranks"):
            forward.run(2)
        return
    with pytest.raises(RuntimeError):  # SGLang's own makes nothing of such an indexer either
        forward.run(2)
    assert not used.ops and any("spread over ranks" in r.getMessage() for r in caplog.records)
    model.indexers[2].n_local_heads = 32
    forward.run(2)
    assert used.ops and torch.equal(forward.raw[2], want[2])


def test_metadata_that_is_not_what_it_was(load, make_model, used, caplog):
    """A release without a field that the plugin reads: one error in the log, and SGLang's call."""
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL["prefill"]))
    want = wanted(forward)
    size = model.pool.get_index_k_page_size
    del model.pool.get_index_k_page_size
    as_good_as(forward, 2, want)
    model.pool.get_index_k_page_size = size
    assert not used.ops and "switched off" in caplog.text


def test_strict_raises(load, make_model, monkeypatch):
    load(DSV4_STRICT="1")
    model = make_model(held=HELD)
    monkeypatch.setattr(v41_calls.ops, "block_maxima", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.forward(model.batch(**SMALL["decode"])).run(SOURCE)


# --- not asked, and asked for what cannot be had -------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"DSV4_PLUGIN": ""},
        {"DSV4_PLUGIN": "", "DSV4_TOPK": "bf16", "DSV4_STRICT": "1"},
        {"DSV4_PLUGIN": "0", "DSV4_TOPK": "bf16"},
        {"DSV4_TOPK": "off"},
    ],
    ids=["not asked", "not asked, with settings", "kill switch", "off"],
)
def test_nothing_changes(load, make_model, engine, settings):
    load(**settings)
    assert left_to_the_engine(make_model(held=HELD), engine)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"DSV4_TOPK": "fp32"}, "bfloat16 numbers, not fp32"),
        ({"DSV4_TOPK": "bf16", "DSV4_LOGITS": "engine"}, "on the plugin's own scores only"),
        ({"DSV4_TOPK": "bf16", "DSV4_BACKEND": "cuda"}, "not on a CUDA device"),
        ({"DSV4_LOGITS": "plugin", "DSV4_INDEXER_READ": "torch"}, "has no seam"),
    ],
)
def test_an_explicit_setting_that_cannot_be_met(load, make_model, settings, reason):
    load(**settings)
    with pytest.raises(UnmetError, match="DeepSeek-V4.1|cannot be met") as error:
        make_model(held=100_000)
    assert reason in str(error.value) and "100000 candidate blocks" in str(error.value)


@pytest.mark.parametrize("held", [100_000, 63])
def test_candidates_that_the_plugin_does_not_choose(load, make_model, engine, held):
    load()
    model = make_model(held=held)
    prefill, decode, full = objects(model)
    assert type(prefill).__name__ == type(decode).__name__ == "DenseBlocksBackend"
    assert isinstance(full, v41.Full)
    why = dsv4_plugin.status()["seams"]["topk.candidates"]["why"]
    assert f"{held} candidate blocks a row" in why


def test_another_class_of_sglangs(load, make_model, _v41, monkeypatch):
    """SGLang's own kernels for Hopper may come with a class of their own."""

    class Sm90Blocks(_v41.dense_blocks.DenseBlocksBackend):
        pass

    class Sm90Full(_v41.full_topk.FullTopKIndexer):
        pass

    load()
    monkeypatch.setattr(_v41.dense_blocks, "DenseBlocksBackend", Sm90Blocks)
    monkeypatch.setattr(_v41.indexers, "FullTopKIndexer", Sm90Full)
    assert [type(found) for found in objects(make_model(held=HELD))] == [
        Sm90Blocks, Sm90Blocks, Sm90Full
    ]  # fmt: skip
    seams = dsv4_plugin.status()["seams"]
    assert "a Sm90Blocks here" in seams["topk.candidates"]["why"]
    assert "a Sm90Full here" in seams["topk.full"]["why"]


def test_deep_gemm_of_its_own(load, make_model, _v41, monkeypatch):
    monkeypatch.setattr(_v41.indexers, "_use_deep_gemm_prefill", lambda: True)
    load()
    model = make_model(held=HELD)
    assert not any(isinstance(found, v41._Before) for found in objects(model))
    assert "DeepGEMM's FP4 logits" in dsv4_plugin.status()["seams"]["topk.full"]["why"]


def test_a_model_of_v4_is_not_looked_at(load, make_model, engine):
    load(DSV4_TOPK="fp32")  # an error for V4.1, and not for V4
    model = make_model(held=HELD, ratios=(4, 128))
    assert not any(isinstance(found, v41._Before) for found in objects(model))


def test_unregister(load, make_model, used, engine, _v41):
    load()
    model = make_model(held=HELD)
    hooked = _v41.backend.make_candidate_indexer
    from dsv4_plugin.engines.sglang import unregister

    unregister()
    assert _v41.backend.make_candidate_indexer is not hooked
    assert _v41.indexers.make_candidate_indexer is _v41.backend.make_candidate_indexer
    model.forward(model.batch(**SMALL["prefill"])).run(SOURCE)  # an object that is still there
    assert not used.ops
    model.build()
    assert not any(isinstance(found, v41._Before) for found in objects(model))


def test_attributes_of_sglangs_objects(load, make_model):
    load()
    model = make_model(held=HELD)
    prefill, decode, full = objects(model)
    assert prefill.topk_blocks == HELD and full.req_to_token is model.req_to_token
    with pytest.raises(AttributeError):
        _ = prefill.there_is_no_such_name


# --- what the backend gets from the source -----------------------------------------------------


@pytest.mark.parametrize("held", [HELD, 2048])
def test_the_tail_of_what_was_published(load, make_model, _v41, held):
    """The last rows of every request, as 0.5.22 asks for them; SGLang's own has the same."""
    load()
    model = make_model(held=held)
    forward = model.forward(model.batch((600, 540), (5, 4), "prefill"))
    forward.run(SOURCE)
    published = forward.metadata.candidate_metadata
    assert isinstance(published, _v41.indexers.CandidateMetadata)
    by_engine = _v41.dense_blocks.BlockIds(blocks=published.blocks, rows_per_request=[5, 4])
    tail = published.tail([2, 1])
    assert torch.equal(tail.blocks, by_engine.tail([2, 1]).blocks) and len(tail.blocks) == 3
    assert tail.rows_per_request == [2, 1] and isinstance(tail, v41_published.Published)


def test_the_mask_is_sglangs(load, make_model, _v41):
    load()
    model = make_model(held=HELD)
    forward = model.forward(model.batch((600, 20)))
    forward.run(SOURCE)
    published = forward.metadata.candidate_metadata
    mask = published.decode_mask
    assert mask.shape == (2, 1024) and published.decode_mask is mask
    for row, n in enumerate((600, 20)):
        blocks = published.blocks[row]
        kept = mask[row].view(-1, 8).all(1).nonzero()[:, 0]
        assert torch.equal(kept, blocks[blocks >= 0].long())
        assert len(kept) == min(HELD, -(-n // 8))


# --- what the plugin never does ------------------------------------------------------------------

READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "unique_consecutive", "masked_select",
    "__bool__", "__int__", "__float__", "__index__", "tensor", "as_tensor",
}  # fmt: skip


class HostRead(Exception):
    pass


class NoHostRead(TorchFunctionMode):
    """Raises if the host would wait for a tensor, except within the plugin's ops."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS or (name == "repeat_interleave" and "output_size" not in kwargs):
            raise HostRead(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
                raise HostRead("an index of booleans")
        return func(*args, **kwargs)


class Watched:
    """Calls the methods of an object under :class:`NoHostRead`."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        method = getattr(self.inner, name)

        def watched(*args):
            with NoHostRead():
                return method(*args)

        return watched


def watch(model):
    attn = model.attn
    for name in ("prefill_candidates", "decode_candidates", "full_topk_indexer"):
        setattr(attn, name, Watched(getattr(attn, name)))


@pytest.mark.parametrize("whole", [0, 40_960], ids=["candidates", "whole"])
@pytest.mark.parametrize(
    "batch",
    [
        {"lengths": (600, 9, 540, 1), "new": (4, 9, 4, 1), "mode": "prefill"},
        {"lengths": (601, 40), "new": (9, 40), "mode": "prefill", "local": [[1, 3], [0, 2]]},
        {"lengths": (600, 20)},
        {"lengths": (600, 540), "new": 2, "mode": "verify"},
    ],
    ids=["prefill", "context parallel", "decode", "verification"],
)
def test_the_cpu_never_waits(load, make_model, used, monkeypatch, batch, whole):
    monkeypatch.setattr(v41_calls, "WHOLE_COLUMNS", whole)
    monkeypatch.setattr(v41_calls, "KEPT_BYTES", 20_000)

    def blind(op):
        def called(*args, **kwargs):
            with _pop_mode_temporarily():
                return op(*args, **kwargs)

        return called

    for name in ("paged_logits", "topk"):
        monkeypatch.setattr(v41_calls, name, blind(getattr(v41_calls, name)))
    for name in CANDIDATE_OPS:
        monkeypatch.setattr(v41_calls.ops, name, blind(getattr(v41_calls.ops, name)))
    load(DSV4_STRICT="1")
    model = make_model(held=HELD)
    watch(model)
    forward = model.forward(model.batch(**batch))
    for layer in (2, SOURCE, CONSUMER):
        forward.run(layer)
    assert not used.engine


def test_sglangs_own_prefill_waits(load, make_model):
    """The test above would see it."""
    load(DSV4_PLUGIN="")
    model = make_model(held=HELD)
    watch(model)
    forward = model.forward(model.batch(**SMALL["prefill"]))
    for layer in (2, SOURCE):
        with pytest.raises(HostRead):
            forward.run(layer)


@modes
def test_shadow(load, make_model, mode):
    load(DSV4_SHADOW="1")
    model = make_model(held=HELD)
    forward = model.forward(model.batch(**SMALL[mode]))
    for layer in (2, SOURCE, CONSUMER):
        forward.run(layer)
    found = dsv4_plugin.status()["shadow"]
    assert set(found) == {"v41.plain", "v41.source", "v41.consumer"}
    for counted in found.values():
        assert counted["rows"] == forward.batch.rows
        assert counted["agree"] >= 0.95 * counted["entries"]


def test_every_name_is_put_back(engine, _v41, load, make_model):
    """Nothing of the plugin is left in the modules that got copies of the factories."""
    load()
    make_model(held=HELD)
    assert names(engine) == set() and LAYERS
    from dsv4_plugin.engines.sglang import unregister

    unregister()
    for module in (_v41.indexers, _v41.backend):
        for name in ("make_candidate_indexer", "make_full_topk_indexer"):
            assert not hasattr(vars(module)[name], "__wrapped__")
