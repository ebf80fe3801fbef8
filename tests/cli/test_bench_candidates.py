"""``bench candidates``: the dry run on a CPU, and the arguments that it refuses."""

import json

import pytest
from kits.bench_command import bench

from dsv4_plugin.cli import plots
from dsv4_plugin.cli.bench.candidates.report import table

OPS = {
    "paged_logits", "block_maxima", "block_maxima alone", "select_blocks", "candidate_logits",
    "select_candidates", "consumer", "source", "source by candidates", "step",
}  # fmt: skip


def test_a_dry_run_checks_every_answer(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, drawn = tmp_path / "results.json", tmp_path / "drawn.svg"
    small = ("--rows", 2, "--columns", 512, "--device", "cpu", "--suite", "all")
    assert bench("candidates", *small, "--json", file) == 0
    document = json.loads(file.read_text())
    assert document["complete"]
    rows = document["results"]
    assert all(row["exact"] for row in rows)
    decode = [r for r in rows if (r["suite"], r["implementation"]) == ("decode", "dsv4")]
    assert {r["op"] for r in decode} == OPS
    assert {r["dtype"] for r in decode} == {"bfloat16", "float32"}
    full = {r["op"] for r in rows if r["implementation"] == "full width"}
    assert {"consumer", "source", "step", "mask", "block selection"} <= full
    plots.draw(document, drawn)
    assert "<svg" in drawn.read_text()
    said = capsys.readouterr().out
    assert "dsv4: exact in" in said and "full width source exact" in said
    assert "decode, 2 rows, us" in "\n".join(table(rows))


def test_a_dry_run_with_fp4_keys(tmp_path):
    file = tmp_path / "results.json"
    small = ("--rows", 1, "--next-n", 1, 3, "--columns", 512, "--device", "cpu", "--suite", "all")
    assert bench("candidates", *small, "--cache", "fp4", "--json", file) == 0
    document = json.loads(file.read_text())
    assert document["complete"] and document["cache"] == "fp4"
    rows = document["results"]
    assert all(row["exact"] for row in rows)
    decode = [row for row in rows if row["suite"] == "decode"]
    assert {(row["rows"], row.get("next_n", 1)) for row in decode} == {(1, 1), (3, 3)}
    assert {row["op"] for row in decode} == OPS
    prefill = {row["op"] for row in rows if row["suite"] == "prefill"}
    assert prefill == {"paged_logits", "block_maxima", "candidate_logits", "consumer", "source"}
    assert {(row["implementation"], row["dtype"]) for row in rows} == {("dsv4", "bfloat16")}


def row(op, us, rows=1, columns=1 << 16, suite="decode", **more):
    return {
        "suite": suite, "op": op, "implementation": "dsv4", "dtype": "bfloat16", "rows": rows,
        "columns": columns, "us": us, "exact": True, **more,
    }  # fmt: skip


def test_the_table_marks_what_is_wrong_and_what_is_missing():
    lines = table([row("consumer", 8.0), row("step", 9.0, columns=1 << 20, exact=False)])
    assert lines[1].split()[-2:] == ["64K", "1024K"]
    assert lines[2].split()[-2:] == ["8.00", "-"]
    assert lines[3].split()[-2:] == ["-", "9.00!"]


@pytest.mark.parametrize(
    "options,word",
    [
        (("--k", 512), "--k"),
        (("--suite", "served"), "--suite"),
        (("--columns", 100), "--columns"),
        (("--cache", "fp4", "--dtype", "float32"), "--dtype"),
    ],
)
def test_options_that_are_not_for_it(options, word, capsys):
    assert bench("candidates", "--device", "cpu", *options) == 2
    assert word in capsys.readouterr().err
