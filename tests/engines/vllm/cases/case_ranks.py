"""Two ranks that share a prefill's rows (0.32 and later), each with the plugin, over gloo.

Each rank scores and selects its rows, and all ranks get the indices of all rows. The tests show
that the plugin of a rank scores exactly the rank's rows, and that the gathered indices equal those
of a single rank. If one rank has no plugin, or switches it off during the run, both still meet at
the same gathers and have the same indices.
"""

from __future__ import annotations

import sys

import pytest
import two_ranks
from kits.ranks import run_two

import dsv4_plugin


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_two(two_ranks.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_ranks_share_the_rows_of_a_prefill(case, ranks):
    settings = two_ranks.CASES[case]
    found = [rank[case] for rank in ranks]
    sizes = found[0]["sizes"]
    # Rows are shared by the keys that they see.
    assert found[1]["sizes"] == sizes and sum(sizes) == 120 and 0 < sizes[0] != sizes[1] > 0
    for rank, each in enumerate(found):
        given, served = settings[rank], each["served"]
        assert each["gathered"] == [[sizes[rank], 512]], "one gather a layer, of its own rows"
        by_plugin = given.get("DSV4_LOGITS") == "plugin"
        assert each["scored"] == sizes[rank], "by whomever"
        assert served.get("logits.plugin", 0) == (sizes[rank] + 2 if by_plugin else 0)
        selects = given and "fails" not in given
        assert served.get("topk.prefill", 0) == (sizes[rank] if selects else 0)
        assert served.get("topk.prefill.upstream", 0) == (sizes[rank] if "fails" in given else 0)
        assert each["same_as_alone"]
    # The side that selects decides the order of a row's indices; a gathered row is one rank's.
    assert found[0]["indices"] == found[1]["indices"]


def test_the_setting_changes_nothing_where_vllm_shards(engine, run, monkeypatch, caplog):
    for name in ("DSV4_PLUGIN", "DSV4_SHARD_PREFILL"):
        monkeypatch.setenv(name, "1")
    run.build(engine.problem(prefill=((600, 4),)))
    assert "shards the rows of prefills itself" in caplog.text
    assert dsv4_plugin.status()["seams"]["shard"]["why"] == "vLLM does it itself"
    planner = sys.modules["vllm.v1.attention.backends.mla.indexer"]
    assert not hasattr(planner.DeepseekV32IndexerMetadataBuilder.build, "__wrapped__")
    assert not hasattr(engine.indexer._merge_dcp_topk_global, "__wrapped__")
