"""The table of what ``auto`` leaves to the engines: made of the results file, by a rule."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

import pytest
from kits import marked
from kits.packaging_tools import ROOT

from benchmarks.tables import aside as tables
from benchmarks.tables import readme as figures
from dsv4_plugin.engines.shared import aside_table

K = 2048


def cell(rows: int, columns: int, plugin: float, engine: float, **more: Any) -> dict[str, Any]:
    """A cell whose figures behind the logits and alone say the same."""
    return {
        "call": "vllm.decode", "k": K, "rows": rows, "columns": columns, "width": columns,
        "plugin_us": plugin, "engine_us": engine, "plugin_warm_us": plugin,
        "engine_warm_us": engine, "engine_exact": True, **more,
    }  # fmt: skip


def longest(*cells: dict[str, Any], exactness: tuple[dict[str, Any], ...] = ()) -> Any:
    found = tables.longest({"results": cells, "exactness": exactness})
    return found["vllm.decode", K]


def narrow(*cells: dict[str, Any], exactness: tuple[dict[str, Any], ...] = ()) -> Any:
    return [(rows, most) for rows, most, _ in longest(*cells, exactness=exactness)]


def test_the_package_has_the_table_of_the_results_file():
    """CI makes it anew: ``python -m benchmarks.tables aside-table``."""
    file = aside_table.__file__
    assert file is not None
    with open(file, encoding="utf-8") as source:
        assert source.read() == tables.module() + "\n"
    document = figures.load(tables.ASIDE)
    assert aside_table.SINCE == tables.SINCE
    assert {c: [*t] for c, t in aside_table.LONGEST.items()} == tables.longest(document)


def test_the_page_has_the_figures_of_the_results_file():
    assert marked.between(ROOT / "docs" / "kernels.md", "aside").strip() == tables.aside()


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_left_is_exact_and_faster_on_the_whole(graph):
    left: dict[str, list[float]] = {}
    for row, ratio in tables.with_auto(figures.load(tables.ASIDE), graph=graph):
        if ratio == 1.0:
            assert row["engine_exact"]
            left.setdefault(row["call"], []).append(row["plugin_us"] / row["engine_us"])
    assert left and min(map(geometric_mean, left.values())) > 1.04


@pytest.mark.parametrize("graph", [False, True])
def test_auto_is_faster_than_the_engine_and_than_the_plugin_alone(graph):
    document = figures.load(tables.ASIDE)
    auto = geometric_mean([ratio for _, ratio in tables.with_auto(document, graph=graph)])
    plugin = geometric_mean([r["plugin_us"] / r["engine_us"] for r in document["results"]])
    assert auto < 1 and auto < plugin


@pytest.mark.parametrize(
    "us,warm,who",
    [
        ((10, 20), (1, 1), "plugin"),
        ((20, 10), (1, 9), "engine"),  # behind the logits decides
        ((10, 12), (9, 5), "engine"),  # within the scatter of 2 us: alone
        ((12, 10), (5, 9), "plugin"),
        ((12, 10), (5.1, 5.0), ""),
        ((100, 105), (9, 5), "plugin"),
    ],
)
def test_who_is_faster(us, warm, who):
    row = cell(1, 4096, *us, plugin_warm_us=warm[0], engine_warm_us=warm[1])
    assert tables.verdict(row) == who


def test_up_to_where_the_plugin_was_never_faster():
    cells = [cell(1, 4096, 60, 50), cell(1, 8192, 60, 61), cell(1, 16_384, 60, 70)]
    assert narrow(*cells) == [(1, 8192)]  # 61 is 60 within what is measured
    assert narrow(cells[2], cells[0], cells[1]) == [(1, 8192)]  # whatever the order


def test_nothing_is_left_where_the_engine_is_only_as_fast():
    assert narrow(cell(1, 4096, 50, 50.5), cell(1, 8192, 50, 50)) == [(1, 0)]
    assert narrow(cell(1, 4096, 50, 50.5), cell(1, 8192, 60, 50)) == [(1, 8192)]


def test_short_rows_that_the_plugin_wins_count_as_much_as_the_long_ones():
    """Of a captured graph only the longest row is known."""
    short, long = cell(1, 4096, 50, 60), cell(1, 16_384, 90, 50)
    assert narrow(cell(1, 4096, 50, 100), long) == [(1, 0)]
    assert narrow(short, long) == [(1, 16_384)]
    assert narrow(short, cell(1, 8192, 50, 50), long) == [(1, 16_384)]
    assert narrow(short, long, cell(1, 65_536, 50, 55)) == [(1, 16_384)]  # faster there


def test_wide_buffers_alone_do_not_decide_about_narrow_ones():
    wide = [cell(1, c, 100, 50, width=262_144) for c in (4096, 8192)]
    cells = [cell(1, 4096, 50, 60), cell(1, 8192, 50, 50), *wide]
    assert longest(*cells) == [(1, 0, 8192)]
    assert longest(cell(1, 4096, 51, 50), *cells[1:]) == [(1, 8192, 8192)]


def test_narrow_and_wide_buffers():
    """In a wide one only wide ones count; a narrow one may be as wide, almost."""
    wide = cell(1, 4096, 50, 60, width=262_144)
    assert longest(cell(1, 4096, 60, 50), wide) == [(1, 0, 0)]
    fast = cell(1, 4096, 60, 50, width=262_144)
    assert longest(cell(1, 4096, 50, 60), fast) == [(1, 0, 4096)]
    assert longest(cell(1, 4096, 60, 50), fast) == [(1, 4096, 4096)]
    assert longest(cell(1, 262_144, 60, 50)) == [(1, 131_072, 262_144)]


def test_rows_are_told_apart():
    cells = [cell(1, 4096, 50, 60), cell(64, 4096, 60, 50), cell(8, 4096, 60, 50)]
    assert narrow(*cells) == [(1, 0), (8, 4096), (64, 4096)]


@pytest.mark.parametrize("wrong,most", [(4096, 0), (8192, 4096), (16_384, 8192)])
def test_a_kernel_that_is_wrong_gets_no_call_of_that_length(wrong, most):
    cells = [cell(1, 4096, 60, 50), cell(1, 8192, 60, 50)]
    hard = {"call": "vllm.decode", "k": K, "rows": 8, "columns": wrong, "engine_exact": False}
    assert narrow(*cells, exactness=(hard,)) == [(1, most)]
    other = {**hard, "call": "vllm.prefill"}
    assert narrow(*cells, exactness=(other,)) == [(1, 8192)]
    cells[1]["engine_exact"] = False
    assert narrow(*cells) == [(1, 4096)]


def test_the_logits_of_sglangs_prefill_are_those_of_the_faster_kernel():
    """SGLang's policy takes DeepGEMM's in bfloat16, as long as that is faster in every cell."""
    us: dict[Any, dict[str, float]] = {}
    for row in figures.load("h200_logits.json")["results"]:
        if row["suite"] == "prefill" and row["dtype"] == "bfloat16":
            of = us.setdefault((row["rows"], row["columns"]), {})
            of[row["implementation"].partition("_")[0]] = row["warm_us"]
    assert len(us) >= 3 and all(of["deepgemm"] <= of["dsv4"] for of in us.values())
    forward: dict[str, dict[str, float]] = {}
    for row in figures.load("h100_sglang.json")["results"]:
        if row["part"].startswith("prefill"):
            forward.setdefault(row["part"], {})[row["variant"]] = row["us"]
    plugin = "bf16 plugin" if "bf16 plugin" in next(iter(forward.values())) else "bf16 own"
    assert forward and all(of["bf16"] < of[plugin] for of in forward.values())
