"""``DSV4_SHARD_PREFILL=1`` in the releases that do not shard rows themselves: to 0.31.

Two ranks over gloo (``shard_rank.py``): vLLM's own planner, layers and group. What is shown: each
rank scores its slice and no more, by whomever; every rank has every index, bit by bit those of a
rank alone; there is one gather a layer on both ranks, whatever happened on one of them.
"""

from __future__ import annotations

import datetime
import functools
import logging
import sys
import types

import pytest
import shard_rank
import torch
from kits.ranks import run_two

import dsv4_plugin
from dsv4_plugin.engines.shared import row_shard
from dsv4_plugin.errors import UnmetError

ASKED = {"DSV4_PLUGIN": "1", "DSV4_SHARD_PREFILL": "1"}
LAYERS = shard_rank.LAYERS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_two(shard_rank.__file__, tmp_path_factory.mktemp("shard"))


@pytest.mark.parametrize("case", shard_rank.CASES)
def test_two_ranks_have_the_indices_of_one(case, ranks):
    fails, empty = (shard_rank.CASES[case].get(name) for name in ("fails", "empty"))
    steps = zip(shard_rank.CASES[case]["steps"], *(rank[case] for rank in ranks), strict=True)
    sharded = 0
    for scheduled, *found in steps:
        rows = sum(new for _, _, new in scheduled)
        for rank, each in enumerate(found):
            assert each["rows"] == rows and each["gathered_alone"] == []
            if fails is None:
                assert each["same"], "bit by bit"
            if fails != "logits":
                assert each["same_sets"]
            assert each["failures"] == (["topk"] if fails and rank == 1 else [])
        # One gather a layer, of pieces as long as the longest slice, on both ranks alike.
        gathered, other = (each["gathered"] for each in found)
        assert gathered == other and len(gathered) in (0, LAYERS)
        scored = [each["scored"] // LAYERS for each in found]
        alone = {each["scored_alone"] // LAYERS for each in found}
        if gathered:
            sharded += 1
            longest = [[max(scored), 512]] * LAYERS
            # Rows without a key are in no chunk, but in a slice.
            keyless = sum(scored) < found[0]["prefill"]
            assert keyless or gathered == longest
            assert {sum(scored)} == alone
        else:
            assert {*scored} == alone
        if empty is not None:
            assert scored[empty] == 0 < scored[1 - empty]
        # Whoever selected a row, both ranks have it from there.
        assert found[0]["prefill_indices"] == found[1]["prefill_indices"]
    assert sharded


def test_slices_have_about_as_many_keys(ranks):
    (step,) = zip(*(rank["requests in many chunks of logits"] for rank in ranks), strict=True)
    queries, lengths = (200, 500), (1200, 2500)
    keys = [n - q + row + 1 for q, n in zip(queries, lengths, strict=True) for row in range(q)]
    first = step[0]["scored"] // LAYERS
    halves = sum(keys[:first]), sum(keys[first:])
    assert abs(halves[0] - halves[1]) <= 2 * max(lengths) and 0 < first < 700


def test_a_slice_may_begin_in_any_chunk(ranks):
    """A chunk that leaves out the gather of its keys reads those of the chunk before."""
    found = [rank["many chunks, float32 of the engine"][0] for rank in ranks]
    assert found[0]["chunks_alone"] == found[1]["chunks_alone"] >= 5
    # Each has one of no rows at its end, and the cut goes through one of them at most.
    narrowed = sum(each["chunks"] - 1 for each in found)
    assert narrowed - found[0]["chunks_alone"] in (0, 1)


# --- what a wish costs -------------------------------------------------------------------------


def build(run, engine, **parallel):
    return run.build(engine.problem(prefill=((600, 4),)), **parallel)


def patched(engine):
    planner = sys.modules["vllm.v1.attention.backends.mla.indexer"]
    places = (
        (planner.DeepseekV32IndexerMetadataBuilder, "build"),
        (engine.indexer, "_merge_dcp_topk_global"),
    )
    return [name for owner, name in places if hasattr(vars(owner)[name], "__wrapped__")]


@pytest.fixture
def asked(monkeypatch):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def agreed(monkeypatch):
    """Ranks that agree, and a group that never gathers."""
    from dsv4_plugin.engines.vllm import row_shard as of_vllm

    monkeypatch.setattr(of_vllm, "group", lambda: row_shard.Group(0, 2, pytest.fail))


def test_not_asked_for_nothing_is_patched(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "1")
    build(run, engine, tensor_parallel_size=2)
    assert patched(engine) == []
    assert dsv4_plugin.status()["seams"]["shard"]["where"]
    seam = dsv4_plugin.status()["seams"]["shard"]
    assert not seam["engaged"] and seam["why"] == "DSV4_SHARD_PREFILL=0"


def test_asked_for_without_the_plugin_nothing_is_patched(engine, run, monkeypatch):
    monkeypatch.setenv("DSV4_SHARD_PREFILL", "1")
    build(run, engine)
    assert patched(engine) == []


def test_what_is_patched_is_put_back(engine, run, asked, agreed, caplog):
    build(run, engine, tensor_parallel_size=2)
    assert patched(engine) == ["build", "_merge_dcp_topk_global"]
    assert dsv4_plugin.status()["seams"]["shard"]["engaged"]
    assert "among 2 tensor-parallel ranks; this one is rank 0" in caplog.text
    from dsv4_plugin.engines.vllm import unregister

    unregister()
    assert patched(engine) == []


def test_one_error_has_every_unmet_condition(engine, run, asked, monkeypatch):
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    monkeypatch.setattr(vllm.envs, "VLLM_USE_NCCL_SYMM_MEM", True, raising=False)
    problem = engine.problem(prefill=((600, 4),))
    with engine.gpu(), engine.config("deepseek_v4") as config:
        modes = type(config.compilation_config.cudagraph_mode)
        config.compilation_config.cudagraph_mode = modes.FULL
        parallel = config.parallel_config
        parallel.pipeline_parallel_size = parallel.prefill_context_parallel_size = 2
        parallel.enable_dbo = True
        draft = types.SimpleNamespace(tensor_parallel_size=4)
        speculative = types.SimpleNamespace(draft_parallel_config=draft, num_speculative_tokens=1)
        object.__setattr__(config, "speculative_config", speculative)
        with pytest.raises(UnmetError) as caught:
            engine.layer(problem)
    assert caught.value.unmet == (
        "tensor_parallel_size is 1: there is no other rank",
        "pipeline_parallel_size is 2, not 1",
        "prefill_context_parallel_size is 2, not 1",
        "two halves of a batch run at once (enable_dbo)",
        "VLLM_BATCH_INVARIANT is set",
        "VLLM_USE_NCCL_SYMM_MEM is set",
        "cudagraph_mode is FULL: prefills run in full CUDA graphs",
        "the draft model has 4 tensor-parallel ranks",
    )
    assert patched(engine) == []


def test_a_seam_of_another_form_is_an_error(engine, run, asked, agreed, monkeypatch):
    monkeypatch.setattr(engine.indexer, "_merge_dcp_topk_global", lambda scores, out, k: None)
    with pytest.raises(UnmetError, match="_merge_dcp_topk_global takes"):
        build(run, engine, tensor_parallel_size=2)


def test_candidate_blocks_stay_whole(engine, run, asked, agreed, monkeypatch):
    original = engine.indexer.SparseAttnIndexer.__init__.__wrapped__
    from dsv4_plugin.engines.vllm import register, unregister

    unregister()

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.candidate_blocks = torch.full((8, 64), -1, dtype=torch.int32)

    monkeypatch.setattr(engine.indexer.SparseAttnIndexer, "__init__", init)
    register()
    with pytest.raises(UnmetError, match="candidate blocks stay whole on every rank"):
        build(run, engine, tensor_parallel_size=2)


def test_other_code_over_a_patch_is_an_error_and_not_a_missing_gather(
    engine, run, asked, agreed, monkeypatch
):
    from kits.vllm_planner import World

    build(run, engine, tensor_parallel_size=2)
    world = World(engine)
    world.request("a", 600)
    with monkeypatch.context() as other:
        other.setattr(engine.indexer, "_merge_dcp_topk_global", lambda *a, **k: None)
        with pytest.raises(UnmetError, match="patched by other code since"):
            world.step([("a", 300, 300)], 0)


def test_a_small_prefill_is_not_sharded(engine, run, asked, agreed):
    from kits.vllm_planner import World

    build(run, engine, tensor_parallel_size=2)
    world = World(engine)
    world.request("a", 600)
    (chunk,) = world.step([("a", 300, 300)], 0).metadata.prefill.chunks
    assert (chunk.token_start, chunk.token_end) == (0, 300)


def test_a_rank_that_does_not_shard_is_named(engine, run, asked, monkeypatch, tmp_path, caplog):
    """The plugin waits for the others in torch's store, and comes to no collective before."""
    monkeypatch.setattr(row_shard, "_PATIENCE", datetime.timedelta(seconds=1))
    from vllm.distributed import parallel_state

    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    group = types.SimpleNamespace(ranks=[4, 5], rank_in_group=0, world_size=2)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    caplog.set_level(logging.INFO)
    with pytest.raises(UnmetError, match="rank 5 has not said in 0:00:01 that it shards rows too"):
        build(run, engine, tensor_parallel_size=2)
    assert patched(engine) == []
