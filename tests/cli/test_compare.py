"""The ratios at the end of a benchmark: the best correct peer of a cell, and the mean of cells."""

from __future__ import annotations

import pytest

from dsv4_plugin.cli.checks.compare import Ratio, best_peers, geomean, ratios, right, sound


def row(implementation: str, us: float, **more: object) -> dict[str, object]:
    return {"suite": "decode", "dtype": "bfloat16", "k": 512, "rows": 1, "columns": 8192,
            "kind": "normal", "width": 8192, "windows": "full", "implementation": implementation,
            "warm_us": us, "cold_us": None, "exact": True, **more}  # fmt: skip


def find(results: list[dict[str, object]], words: str, **engines: str) -> Ratio:
    (one,) = [one for one in ratios(results, **engines) if words in one.name]
    return one


def test_the_best_peer_of_a_cell() -> None:
    results = [
        row("dsv4", 3.0), row("a", 4.0), row("vllm33", 6.0, dtype="float32"),
        row("wrong", 0.1, exact=False), row("bad", 0.1, right=False),
        row("dsv4", 8.0, columns=65_536), row("a", 40.0, columns=65_536),
        row("b", 10.0, columns=65_536, dtype="float32"),
        row("dsv4", 12.0, columns=65_536, dtype="float32"),
    ]  # fmt: skip
    one = find(results, "decode bfloat16 warm / best peer of any dtype")
    assert one.mean == pytest.approx((0.75 * 0.8) ** 0.5) and one.cells == 2
    assert one.worst == pytest.approx(0.8) and one.where == "k 512, 1 x 65536, against b"
    assert str(one).endswith(
        "0.77 in the geometric mean of 2 cells, worst 0.80 (k 512, 1 x 65536, against b)"
    )
    assert find(results, "float32 warm / best peer of float32").worst == 1.2
    own = find(results, "bfloat16 warm / vllm's own", vllm="vllm33")
    assert (own.mean, own.cells) == (0.5, 1)
    assert best_peers(results, "bfloat16")[512, 1, 8192]["implementation"] == "a"
    assert best_peers(results, "float32")[512, 1, 8192]["implementation"] == "vllm33"


def test_cold_and_served_figures_have_ratios_of_their_own() -> None:
    results = [
        row("dsv4", 3.0, cold_us=5.0), row("a", 4.0, cold_us=4.0), row("b", 2.0),
        row("dsv4", 3.0, suite="served", served_us=6.0),
        row("a", 1.0, suite="served", served_us=8.0),
    ]  # fmt: skip
    assert find(results, "decode bfloat16 warm").worst == 1.5
    assert find(results, "decode bfloat16 cold").worst == 1.25
    assert find(results, "served bfloat16 /").worst == 0.75


def test_cells_that_differ_in_more_than_their_shape_are_not_mixed() -> None:
    results = [
        row("dsv4", 10.0, suite="prefill"), row("dsv4", 5.0, suite="prefill", windows="causal"),
        row("a", 20.0, suite="prefill"), row("a", 4.0, suite="prefill", windows="causal"),
        row("dsv4", 3.0, suite="narrow"), row("dsv4", 6.0, suite="narrow", width=256_000),
        row("a", 3.0, suite="narrow"), row("a", 5.0, suite="narrow", width=256_000),
        row("dsv4", 2.0, suite="adversarial"), row("a", 4.0, suite="adversarial"),
        row("dsv4", 9.0, suite="adversarial", kind="all_equal"),
        row("dsv4", 3.0, suite="next_n", next_n=2, k=0), row("a", 2.0, suite="next_n", k=0),
    ]  # fmt: skip
    prefill = find(results, "prefill")
    assert prefill.worst == 1.25 and prefill.where == "k 512, 1 x 8192, causal, against a"
    narrow = find(results, "narrow")
    assert narrow.cells == 2 and narrow.where == "k 512, 1 x 8192, in 256000, against a"
    assert find(results, "adversarial").worst == 0.5
    assert not [one for one in ratios(results) if "next_n" in one.name]


def test_an_engine_s_chain_is_the_one_that_ends_with_its_top_k() -> None:
    results = [
        row("dsv4", 10.0), row("a + vllm33", 19.0, dtype="float32"),
        row("b + vllm33", 18.5, dtype="float32"),
        row("c + vllm33", 1.0, dtype="float32", exact=False),
        row("a + sglang_v2", 13.0, dtype="float32"),
        row("a + sglang_v2_nopdl", 1.0, dtype="float32"),
    ]  # fmt: skip
    engines = {"vllm": "vllm33", "sglang": "sglang_v2"}
    vllm = find(results, "warm / vllm's own", **engines)
    assert vllm.worst == pytest.approx(10 / 18.5) and vllm.where.endswith("against b + vllm33")
    assert find(results, "warm / sglang's own", **engines).worst == pytest.approx(10 / 13)


def test_what_is_wrong_is_neither_sound_nor_right() -> None:
    assert right(row("dsv4", 1.0)) and sound(row("dsv4", 1.0))
    assert not right(row("dsv4", 1.0, exact=False)) and not sound(row("dsv4", 1.0, right=False))
    ties = row("dsv4", 1.0, lowest_index=False)
    assert sound(ties) and not right(ties)
    assert ratios([row("dsv4", 1.0, exact=False), row("a", 2.0)]) == []
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)


@pytest.mark.parametrize("us", [0.0, -0.2])
def test_a_difference_that_is_no_time_is_not_compared(us: float) -> None:
    assert ratios([row("dsv4", us), row("a", 2.0)]) == []
    assert find([row("dsv4", 2.0), row("a", us), row("b", 4.0)], "any dtype").worst == 0.5
