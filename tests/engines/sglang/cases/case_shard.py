"""``DSV4_SHARD_PREFILL=1``: the rows of a prefill of DeepSeek-V4 sharded among two ranks over gloo.

SGLang's own indexer, hook registry and group run (``shard_rank.py``). What is shown: each rank
scores its slice and no more; every rank has every index, bit by bit those of a rank alone; there is
one gather a layer on both ranks, whatever happened on one of them. The ranks' pools are not alike.
"""

from __future__ import annotations

import types

import pytest
import shard_rank
import torch
from kits.ranks import run_two

import dsv4_plugin
from dsv4_plugin.engines.sglang import row_shard as of_sglang
from dsv4_plugin.engines.shared import row_shard
from dsv4_plugin.errors import UnmetError

ASKED = {"DSV4_BACKEND": "torch", "DSV4_SHARD_PREFILL": "1"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_two(shard_rank.__file__, tmp_path_factory.mktemp("shard"))


@pytest.mark.parametrize("case", shard_rank.CASES)
def test_two_ranks_have_the_indices_of_one(case, ranks):
    given = shard_rank.CASES[case]
    fails, empty = given.get("fails"), given.get("empty")
    sharded = 0
    for (mode, requests), *found in zip(given["steps"], *(r[case] for r in ranks), strict=True):
        rows, layers = sum(new for _, new in requests), shard_rank.LAYERS
        scored = [each["scored"] for each in found]
        for rank, each in enumerate(found):
            assert each["gathered_alone"] == []
            assert each["off"] == (["topk"] if fails and rank == 1 else [])
            assert each["same_sets"] and (fails or each["same"])
            assert bool(each["bf16"]) is bool(given.get("deep_gemm") and empty != rank)
        # Whoever selected a row, both ranks have it from there, each in slots of its own pool.
        assert found[0]["positions"] == found[1]["positions"] or fails and not found[0]["gathered"]
        assert found[0]["gathered"] == found[1]["gathered"]
        keys = sum((n + row + 1) // 4 for n, new in requests for row in range(new))
        if mode in ("EXTEND", "MIXED") and keys:
            sharded += 1
            if empty is None:
                longest = max(found[0]["scored"] // layers, rows - found[0]["scored"] // layers)
            else:
                longest = rows
                assert scored[empty] == 0
            assert found[0]["gathered"] == [[longest, 512]] * layers
            assert fails or sum(scored) == rows * layers
        else:
            assert found[0]["gathered"] == [] and scored == [rows * layers] * 2
    assert sharded


def test_ranks_may_cut_their_parts_elsewhere(ranks, engine):
    if not hasattr(engine.metadata.PagedIndexerMetadata, "row_chunks"):
        return  # this release scores all rows at once
    parts = [[step["parts"] for step in rank["ranks cut by free memory"]] for rank in ranks]
    assert parts[0] != parts[1] and max(map(max, parts)) > 2 * shard_rank.LAYERS


# --- what a wish costs -------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """SGLang's arguments and groups of a server of two ranks, which agree."""
    options = {"tp_size": 2, "pp_size": 1, "attn_cp_size": 1}
    group = types.SimpleNamespace(ranks=[0, 1], rank_in_group=0, world_size=2)
    state = types.SimpleNamespace(get_tp_group=lambda: group, get_attn_tp_group=lambda: group)
    monkeypatch.setattr(of_sglang, "_options", lambda: options)
    monkeypatch.setattr(of_sglang, "_parallel_state", lambda: state)
    monkeypatch.setattr(row_shard, "agree", lambda members, rank: [])
    return options


def adapter():
    from dsv4_plugin.engines.shared import adapter

    return adapter.current()


def test_not_asked_for_nothing_is_sharded(engine, load, server):
    load(DSV4_BACKEND="torch")
    engine.step(engine.problem(prefill=True))
    assert adapter().group is None and adapter().call.rows is None


def test_asked_for_without_the_plugin(engine, load, server):
    load(**ASKED, DSV4_PLUGIN="")
    engine.step(engine.problem(prefill=True))
    assert "topk.paged" not in dsv4_plugin.status()["counters"]


def test_a_small_prefill_is_not_sharded(engine, load, server, caplog):
    load(**ASKED)
    problem = engine.problem((601, 602), prefill=True)
    engine.step(problem)
    assert adapter().group.ranks == 2 and "shard.gather" not in dsv4_plugin.status()["counters"]
    assert "among 2 tensor-parallel ranks; this one is rank 0" in caplog.text


def test_one_error_has_every_unmet_condition(engine, load, server):
    load(**ASKED, DSV4_TOPK="fp32", DSV4_SHADOW="1")  # float32: DeepGEMM writes the logits
    server.update(
        tp_size=1, pp_size=2, attn_cp_size=4, enable_dp_attention=True, enable_symm_mem=True,
        enable_deterministic_inference=True, enable_two_batch_overlap=True,
    )  # fmt: skip
    with pytest.raises(UnmetError) as caught:
        engine.step(engine.problem(prefill=True))
    assert caught.value.unmet == (
        "the rows are narrowed in the plugin's logits, and DeepGEMM writes them",
        "DSV4_SHADOW=1 compares the rows of a whole batch",
        "tp_size is 1: there is no other rank",
        "pp_size is 2, not 1",
        "attn_cp_size is 4, not 1",
        "enable_dp_attention is set",
        "enable_two_batch_overlap is set",
        "enable_symm_mem is set",
        "enable_deterministic_inference is set",
    )
    assert adapter().group is None


def test_a_group_of_the_attentions_own(engine, load, server, monkeypatch):
    other = types.SimpleNamespace(ranks=[0])
    monkeypatch.setattr(of_sglang._parallel_state(), "get_attn_tp_group", lambda: other)
    load(**ASKED)
    with pytest.raises(UnmetError, match="the attention has a tensor-parallel group of its own"):
        engine.step(engine.problem(prefill=True))


def test_without_a_server(engine, load):
    load(**ASKED)
    with pytest.raises(UnmetError, match="SGLang shows no server arguments"):
        engine.step(engine.problem(prefill=True))


def test_other_kinds_of_layers_are_refused(engine, load, server):
    load(**ASKED)
    problem = engine.problem((900, 800))
    with pytest.raises(UnmetError, match="no prefill of this kind is sharded"):
        engine.dsa_step(torch.zeros(2, 1024), problem)


def test_the_options_are_sglangs(engine):
    """An option that SGLang renames would no longer keep the plugin from sharding."""
    from sglang.srt.server_args import ServerArgs

    names = ("tp_size", "pp_size", "attn_cp_size", "dcp_size", *of_sglang._OTHERWISE)
    gone = {"enable_prefill_context_parallel", "enable_dsa_prefill_context_parallel"}  # later
    assert {name for name in names if not hasattr(ServerArgs, name)} <= gone


def test_options_are_those_that_hold(engine, monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs.__new__(ServerArgs) if engine.version < "0.5.19" else ServerArgs("model")
    args.tp_size = 4
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: args)
    assert of_sglang._options()["tp_size"] == 4


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(row_shard, "FEWEST_KEYS", 1)
    monkeypatch.setattr(row_shard, "KEYS_PER_INDEX", 0)
    of_sglang._cut.cache_clear()
    yield
    of_sglang._cut.cache_clear()


def test_rows_that_are_not_selected_in_order_are_an_error(engine, load, server, any_size):
    load(**ASKED)
    problem = engine.problem((601, 602, 603), prefill=True)
    engine.step(engine.problem((5,)))  # decides
    rows = of_sglang.Rows(row_shard.shard(adapter().group, [3], [2412], 4, 512))
    rows.next_scored(1)
    rows.next_selected(problem.out[:1], problem.table[:1], None)
    rows.next_scored(1)
    with pytest.raises(RuntimeError, match="does not select its rows in order"):
        rows.next_selected(problem.out[2:], problem.table[2:], None)
    with pytest.raises(RuntimeError, match="where the plugin does not see it"):
        rows.finished()


def test_another_hook_around_the_top_k_is_an_error(engine, load, server, any_size, monkeypatch):
    load(**ASKED)
    engine.step(engine.problem((5,)))
    monkeypatch.setattr(type(adapter()), "intact", lambda self, name: name != "topk.paged")
    with pytest.raises(UnmetError, match=r"DSV4_SHARD_PREFILL=1"):
        engine.step(engine.problem((601, 602, 603), prefill=True))
