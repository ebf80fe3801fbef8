"""The readers of the indexer cache: the same bits as TokenSpeed's loop, also in review cases."""

from __future__ import annotations

import logging
import types

import pytest
import torch

import dsv4_plugin
from dsv4_plugin.errors import SettingError, UnmetError

NAME = "read_deepseek_v4_indexer_fp8_cache"


@pytest.fixture
def loop(engine):
    return engine.readers[NAME]


@pytest.fixture
def read(engine, load):
    load()
    return vars(engine.runtime())[NAME]


def written(engine, pages=9, pad=512, tokens=300):
    """A cache filled by TokenSpeed's own writer, as a view of an arena; and the slots."""
    arena = torch.zeros(pages, 64 * 132 + pad, dtype=torch.uint8)
    cache = arena[:, : 64 * 132]
    slots = torch.randperm(pages * 64)[:tokens]
    engine.runtime()._write_deepseek_v4_indexer_fp8_cache_capturable(
        torch.randn(tokens, 128), cache, slots, torch.ones(tokens, dtype=torch.bool), 64
    )
    return cache, slots


@pytest.mark.parametrize("pad", [0, 512, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_bit_identical_to_the_loop(engine, loop, read, pad, dtype):
    cache, slots = written(engine, pad=pad)
    slots = torch.cat((slots, torch.tensor([-1, -5, 0]))).to(dtype)
    assert torch.equal(read(cache, slots, 64), loop(cache, slots, 64))
    assert dsv4_plugin.status()["counters"] == {"read.fp8": 1}


def test_defaults_and_keywords(engine, loop, read):
    cache, slots = written(engine)
    want = loop(cache, slots)
    assert torch.equal(read(cache, slots), want)
    assert torch.equal(read(cache_2d=cache, slot_mapping=slots, block_size=64), want)


def test_a_slot_mapping_of_two_dimensions(engine, loop, read):
    """The loop runs over tolist(), so it takes one dimension and returns numel() rows."""
    cache, slots = written(engine)
    assert torch.equal(read(cache, slots.view(2, -1)), loop(cache, slots))


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_all_padding(read, engine, tokens):
    cache, _ = written(engine)
    got = read(cache, torch.full((tokens,), -1))
    assert got.shape == (tokens, 128) and got.dtype == torch.float32
    assert bool((got == 0).all())


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_pages(read, tokens):
    """Clamping padding to slot 0 would read row 0 of an empty cache."""
    got = read(torch.empty(0, 64 * 132, dtype=torch.uint8), torch.full((tokens,), -1))
    assert got.shape == (tokens, 128) and bool((got == 0).all())


def test_a_slot_past_the_end_is_an_error_as_it_was(engine, loop, read):
    cache, _ = written(engine)
    for function in (loop, read):
        with pytest.raises(IndexError):
            function(cache, torch.tensor([9 * 64]))
    assert torch.equal(read(cache, torch.tensor([3])), loop(cache, torch.tensor([3])))
    assert dsv4_plugin.status()["counters"]["read.fp8"] == 1  # and it is not switched off


@pytest.mark.parametrize(
    "cache, error",
    [
        (torch.zeros(2, 64 * 132), TypeError),
        (torch.zeros(2, 64 * 131, dtype=torch.uint8), ValueError),
        (torch.zeros(2, 64 * 132 + 3, dtype=torch.uint8), ValueError),
    ],
)
def test_bad_input_is_the_originals_error(loop, read, cache, error):
    for function in (loop, read):
        with pytest.raises(error):
            function(cache, torch.tensor([0]))


def test_it_does_not_synchronise(engine, read, monkeypatch):
    """Python reads no value of the mapping; a graph capture would refuse that."""
    cache, slots = written(engine)
    want = read(cache, slots)
    meta = [m for m in ("tolist", "item") if hasattr(torch.Tensor, m)]
    for method in meta:
        monkeypatch.setattr(torch.Tensor, method, lambda self: pytest.fail("a host sync"))
    # Slots on the CPU are checked against the cache; slots on its device are not looked at.
    monkeypatch.setattr("dsv4_plugin.ops.checks.slots_within", lambda *a: None)
    assert torch.equal(read(cache, slots), want)


def test_unregister_puts_the_loop_back(engine, loop, read):
    from dsv4_plugin.engines.tokenspeed import unregister

    assert vars(engine.runtime())[NAME] is read is not loop
    unregister()
    assert vars(engine.runtime())[NAME] is loop


def test_a_patch_of_somebody_else_is_left(engine, load, caplog):
    from dsv4_plugin.engines.tokenspeed import unregister

    load()

    def other(cache_2d, slot_mapping, block_size=64):
        raise AssertionError("not called")

    setattr(engine.runtime(), NAME, other)
    unregister()
    assert vars(engine.runtime())[NAME] is other
    assert "patched by other code" in caplog.text


def test_off_leaves_the_loop(engine, load, loop):
    load(DSV4_INDEXER_READ="off")
    assert vars(engine.runtime())[NAME] is loop
    assert dsv4_plugin.status()["seams"]["read.fp8"]["why"] == "DSV4_INDEXER_READ=off"


def test_a_backend_that_cannot_be_had_is_an_error(engine, load):
    load(DSV4_INDEXER_READ="triton")
    cache, slots = written(engine)
    with pytest.raises(UnmetError, match="triton"):
        vars(engine.runtime())[NAME](cache, slots)


@pytest.mark.parametrize("variable", ["DSV4_INDEXER_READ", "DSV4_BACKEND"])
def test_a_wrong_setting_is_an_error_at_the_first_call(engine, load, variable):
    load(**{variable: "yes"})
    cache, slots = written(engine)
    with pytest.raises(SettingError, match=f"{variable} is 'yes'"):
        vars(engine.runtime())[NAME](cache, slots)
    assert not dsv4_plugin.status()["counters"]


def test_an_op_that_raises_is_served_by_the_loop(engine, load, loop, monkeypatch, caplog):
    load()
    from dsv4_plugin.engines.tokenspeed import readers

    monkeypatch.setitem(readers._READ, "read.fp8", lambda *a, **k: 1 / 0)
    cache, slots = written(engine)
    read = vars(engine.runtime())[NAME]
    for _ in range(2):
        assert torch.equal(read(cache, slots), loop(cache, slots))
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert dsv4_plugin.status()["counters"] == {"read.fp8.upstream": 2}


def test_the_mxfp4_sibling_is_gone_here_and_said_so(engine, load):
    load()
    seam = dsv4_plugin.status()["seams"]["read.mxfp4"]
    if "read_deepseek_v4_indexer_mxfp4_cache" in engine.readers:
        assert seam["engaged"]
    else:
        assert not seam["engaged"] and "has no read_deepseek_v4_indexer_mxfp4_cache" in seam["why"]


def test_the_mxfp4_sibling_of_another_release(engine, load):
    """Where a release still has it: replaced, and an empty cache gives zeros."""
    from kits.inputs import mxfp4_cache
    from kits.oracles import read_mxfp4_one_by_one

    from dsv4_plugin.engines.tokenspeed import readers

    load()
    module = types.ModuleType("an_older_release")

    def other(cache_2d, slot_mapping, block_size=64):
        return cache_2d[slot_mapping.clamp_min(0) // block_size]  # row 0 of an empty cache

    module.read_deepseek_v4_indexer_mxfp4_cache = other
    readers.install(module)
    read = module.read_deepseek_v4_indexer_mxfp4_cache
    cache = mxfp4_cache(5, pad=64)
    slots = torch.tensor([0, 5, 319, -1, 64])
    assert torch.equal(read(cache, slots), read_mxfp4_one_by_one(cache, slots))
    empty = torch.empty(0, 64 * 68, dtype=torch.uint8)
    with pytest.raises(IndexError):
        other(empty, torch.tensor([-1]))
    assert torch.equal(read(empty, torch.tensor([-1, -1])), torch.zeros(2, 128))
