"""The benchmark of the top-k, dry: cases, checks, bars, peers, the results file and the plot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kits.bench_command import bench
from kits.packaging_tools import ROOT
from kits.svg_curves import check_same

from dsv4_plugin import topk
from dsv4_plugin.cli.bench.topk import bars, cases, peers, report
from dsv4_plugin.cli.bench.topk.cases import Case, Problem
from dsv4_plugin.cli.bench.topk.check import Reference
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS
from dsv4_plugin.cli.shared.run import UsageError

RECORDED = ROOT / "benchmarks" / "peers" / "h200_topk_us.csv"
RESULTS = ROOT / "benchmarks" / "results" / "h200_topk.json"

PEERS = """
import torch
from dsv4_plugin import topk

def exact(logits, lengths, k, out):
    if logits.dtype != torch.float32:
        raise TypeError("needs float32")
    out.copy_(logits.topk(k, dim=1).indices)

def first_k(logits, lengths, k, out):
    out.copy_(torch.arange(k).expand_as(out))

def prefill(logits, row_starts, row_ends, k, out):
    topk(logits, row_ends - row_starts, k, row_starts=row_starts, out=out)

def available():
    return {"vllm33": exact, "wrong": first_k, "absent": "is not installed"}

def paged(logits, lengths, page_table, k, out):
    topk(logits, lengths, k, page_table=page_table, page_size=64, out=out)

def available_paged():
    return {"sglang_paged": paged}

def available_prefill():
    return {"vllm_prefill": prefill, "sglang_ragged": prefill}
"""


def test_a_whole_run(tmp_path: Path, peers_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every suite, small, with peers and recorded figures: the file and what is printed."""
    file = tmp_path / "topk.json"
    code = bench("topk", "--device", "cpu", "--suite", "all", "--k", 100, 512, "--rows", 1, 8,
                 "--columns", 8192, "--dtype", "bfloat16", "float32", "float16",
                 "--peers", peers_file, "--against", RECORDED, "--json", file)  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    document = json.loads(file.read_text())
    assert document["complete"] is True and document["what"] == "topk"
    rows = document["results"]
    assert {r["suite"] for r in rows} == set(cases.SUITES) - {"seed"}
    ours = [row for row in rows if row["implementation"] == "dsv4"]
    # decode, served, narrow, adversarial (1 x 8K only), prefill, paged; the seed's are decode's.
    assert len(ours) == 12 + 12 + 24 + 54 + 24 + 12
    assert {row["suite"] for row in rows if "served_us" in row} == {"served"}
    paged = [row for row in rows if row["implementation"] == "sglang_paged"]
    assert len(paged) == 12 and all(row["exact"] for row in paged)
    assert all(row["exact"] and row["lowest_index"] for row in ours)
    assert all(row["warm_us"] > 0 and row["ratio"] > 0 for row in ours)
    assert all(row["cold_us"] > 0 for row in ours if row["suite"] != "served")
    assert {row["suite"] for row in rows if "gb_s" in row} == {"prefill"}
    wrong = [row for row in rows if row["implementation"] == "wrong" and row["kind"] == "normal"]
    assert wrong and not any(row["exact"] for row in wrong)
    assert not any(r["implementation"] == "vllm33" and r["dtype"] == "bfloat16" for r in rows)
    known = [row for row in rows if "recorded" in row]
    assert {(r["k"], r["rows"]) for r in known} == {(512, 1), (512, 8)}
    for words in ("absent is not compared: is not installed", "vllm33 refuses bfloat16",
                  "[  1/12 ", "left] bfloat16 k 100 1 x 8192", "other run", "roof: read",
                  "in a 256,000-wide buffer", "Adversarial scores", "Prefill: us warm",
                  "Answers in pool slots: us warm", "As in a server, code and lengths from memory",
                  "Speed-up of bfloat16 over float32", "the seed's", "x one-pass floor",
                  "dsv4: exact, ties to the lowest index, in 138 of 138 cells",
                  "sglang_paged: exact in 12 of 12 cells"):  # fmt: skip
        assert words in said, words
    assert document["bars"] == [] and "Bars" not in said and "MISS" not in said
    held = bars.all_bars(rows, "vllm33")
    printed = report.bars_lines(rows, held)  # what a run on a GPU prints
    assert "PASS  cells in which ours is not exact: 0.000" in "\n".join(printed)
    assert any(line.endswith("one-pass floor") for line in printed)
    named = "\n".join(bar.name for bar in held)
    for words in ("bfloat16 warm / best upstream of any dtype, geometric mean",
                  "float32 warm / best upstream of float32, worst cell",
                  "bfloat16 warm / vLLM 0.33's own choice", "1 x 8192, us", "at natural width",
                  "one_huge_bin / N(0,1)", "bfloat16 prefill / vllm, geometric mean",
                  "bfloat16 prefill / sglang, worst cell"):  # fmt: skip
        assert words in named, words
    assert any("recorded figures" in bar.note for bar in held)


def test_a_killed_run_leaves_a_valid_file(tmp_path: Path) -> None:
    file = tmp_path / "topk.json"
    command = [sys.executable, "-m", "dsv4_plugin.cli", "bench", "topk", "--device", "cpu",
               "--json", str(file), "--k", "512", "1024", "2048", "--dtype", "float32", "bfloat16",
               "--rows", "32", "64", "96", "128", "--columns", "65536", "256000"]  # fmt: skip
    program = f"from dsv4_plugin.cli.main import main; main({command[3:]!r})"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            if file.exists() and json.loads(file.read_text())["results"]:
                break
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    document = json.loads(file.read_text())
    assert document["complete"] is False
    assert document["results"] and document["results"][0]["implementation"] == "dsv4"


def test_a_spent_budget_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "topk.json"
    assert bench("topk", "--device", "cpu", "--budget", 0, "--json", file) == 0
    assert "--budget 0 s is spent: 4 cells are not measured" in capsys.readouterr().out
    assert json.loads(file.read_text())["complete"] is False


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["plot", "{tmp}/none.json", "--plot", "{tmp}/x.svg"], "none.json is no results file"),
        (["plot"], "needs a results file and --plot"),
        (["plot", "{root}/pyproject.toml", "--plot", "{tmp}/x.svg"], "is no results file"),
        (["plot", "{results}", "--plot", "{tmp}/x.svg", "--k", "7"], "--k.*512.*got 7"),
        (["topk", "--device", "cpu", "--peers", "{tmp}/none.py"], "--peers.*none.py"),
        (["topk", "--device", "cpu", "--peers", "{root}/tests/kits/oracles.py"], "available"),
        (["topk", "--device", "cpu", "--against", "{tmp}/none.csv"], "--against.*none.csv"),
        (["topk", "--device", "cpu", "--against", "{root}/README.md"], "--against.*columns"),
        (["topk", "--device", "cpu", "--against", "torch,vlm"], "--against must be.*got 'vlm'"),
        (["topk", "--device", "cpu", "--against", ""], "--against must be.*got ''"),
        (["topk", "--device", "cpu", "--json", "{tmp}/no/x.json"], "--json cannot be written"),
    ],
)
def test_what_the_user_can_repair(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(tmp=tmp_path, root=ROOT, results=RESULTS) for a in arguments]
    assert bench(*filled) == 2
    said = capsys.readouterr().err
    assert said.startswith("dsv4-plugin bench: ") and len(said.splitlines()) == 1
    assert re.search(words, said), said


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """By --help, and in benchmarks/README.md."""
    with pytest.raises(SystemExit):
        bench("--help")
    said = capsys.readouterr().out
    page = (ROOT / "benchmarks" / "README.md").read_text()
    options = set(re.findall(r"--[a-z-]+", said)) - {"--help"}
    assert {"--suite", "--against", "--budget", "--plot"} <= options
    assert {option for option in options if option not in page} == set()
    assert all(f"`{name}`" in page for name in cases.SUITES)


def test_a_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for what in (["plot", RESULTS], ["topk", "--device", "cpu"]):
        assert bench(*what, "--plot", tmp_path / "x.svg") == 2
        said = capsys.readouterr()
        assert "--plot needs matplotlib" in said.err and "dsv4-plugin[bench]" in said.err
        assert "decode: " not in said.out, "measured before it was said"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_of_a_committed_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.{suffix}"
    assert bench("plot", RESULTS, "--plot", file) == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        text = data.decode()
        for words in ("128 rows", "dsv4 bfloat16", "vllm33 float32", "sglang_v2 float32"):
            assert words in text, words


def test_the_committed_plot_is_drawn_from_the_committed_file(tmp_path: Path) -> None:
    file = tmp_path / "x.svg"
    assert bench("plot", RESULTS, "--plot", file) == 0
    check_same(file, RESULTS.with_suffix(".svg"))


# ---- Cases ---------------------------------------------------------------------------------------


def test_the_suites_have_the_cells_of_the_project() -> None:
    count = {name: len(cases.suite(name)) for name in cases.SUITES}
    assert count == {"decode": 180, "served": 48, "narrow": 60, "adversarial": 180, "prefill": 48,
                     "paged": 54, "seed": 108}  # fmt: skip
    some = cases.suite("decode", dtypes=["float16"], ks=[512], rows=[8], columns=[8192])
    assert some == [Case("decode", "float16", 512, 8, 8192)]
    with pytest.raises(ValueError, match="suite must be one of decode.*got 'nope'"):
        cases.suite("nope")


def test_cells_of_one_data_stand_together() -> None:
    """Tensors are made once a group; a group that came twice would be drawn twice."""
    for name in cases.SUITES:
        keys = [case.data for case in cases.suite(name)]
        groups = [key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
        assert len(groups) == len(set(groups)), name


def test_a_case_draws_what_it_says() -> None:
    wide = Case("narrow", "bfloat16", 512, 3, 100, width=400).make()
    assert wide.logits.shape == (3, 400) and wide.logits.dtype == torch.bfloat16
    assert bool(wide.logits[:, 100:].isnan().all()) and not bool(wide.logits[:, :100].isnan().any())
    assert wide.lengths.tolist() == [100] * 3 and wide.row_starts is None
    causal = Case("prefill", "float32", 512, 8, 40, windows="causal")
    problem = causal.make()
    assert problem.starts.tolist() == [0] * 4 + [20] * 4
    assert problem.lengths.tolist() == [17, 18, 19, 20] * 2
    assert problem.row_ends.tolist() == [17, 18, 19, 20, 37, 38, 39, 40]
    assert causal.bytes_read == 4 * 2 * (17 + 18 + 19 + 20)
    many = Case("prefill", "float32", 512, 80, 40, windows="causal").make()
    assert int(many.lengths.min()) == 1 and int(many.lengths.max()) == 20
    assert int((many.row_ends > 40).sum()) == 0
    with pytest.raises(ValueError, match="windows.*'full' or 'causal', got 'odd'"):
        Case("decode", "float32", 1, 1, 8, windows="odd").make()


def test_a_plateau_has_the_ties_it_says() -> None:
    rows = cases.plateau([0, 1, 700, 1000], 1000, torch.bfloat16)
    assert (rows == 2.0).sum(1).tolist() == [0, 1, 700, 1000]
    assert float(rows.max()) == 2.0


# ---- The check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in DISTRIBUTIONS if kind != "special"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_check_accepts_the_reference(kind: str, dtype: str) -> None:
    problem = Case("decode", dtype, 64, 5, 700, kind=kind).make()
    problem = Problem(problem.logits, torch.tensor([700, 65, 64, 10, 0]))
    reference = Reference(problem, 128)
    for k in (1, 64, 128):
        for sort in (False, True):
            out = topk(problem.logits, problem.lengths, k, sort=sort)
            verdict = reference.judge(out, k, ties=True)
            assert verdict.exact and verdict.ties, verdict


def test_the_check_with_windows() -> None:
    problem = Case("prefill", "bfloat16", 16, 40, 100, kind="relu_sum", windows="causal").make()
    out = topk(problem.logits, problem.lengths, 16, row_starts=problem.row_starts)
    assert Reference(problem, 16).judge(out, 16, ties=True).ties
    shifted = torch.where(out >= 0, out + problem.starts[:, None], -1)
    assert not Reference(problem, 16).judge(shifted, 16).exact


def test_the_check_refuses_every_kind_of_wrong() -> None:
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0, 0.0]])
    problem = Problem(logits, torch.tensor([5]))
    reference = Reference(problem, 3)

    def judge(*index: int) -> str:
        verdict = reference.judge(torch.tensor([index], dtype=torch.int32), 3, ties=True)
        return verdict.why if not (verdict.exact and verdict.ties) else ""

    assert judge(0, 1, 2) == "" and judge(2, 0, 1) == ""
    assert "lowest index" in judge(0, 1, 3)
    assert "largest" in judge(0, 1, 4)
    assert "twice" in judge(0, 1, 1)
    assert "outside" in judge(0, 1, 5) and "outside" in judge(0, 1, -2)
    assert "few" in judge(0, 1, -1)


# ---- Bars ----------------------------------------------------------------------------------------


def row(implementation: str, us: float, **more: object) -> dict[str, object]:
    return {"suite": "decode", "dtype": "bfloat16", "k": 512, "rows": 1, "columns": 8192,
            "kind": "normal", "width": 8192, "windows": "full", "implementation": implementation,
            "warm_us": us, "cold_us": None, "exact": True, "floor_us": 1.0, "ratio": us,
            **more}  # fmt: skip


def find(results: list[dict[str, object]], words: str) -> bars.Bar:
    (bar,) = [bar for bar in bars.all_bars(results, "vllm33") if words in bar.name]
    return bar


def test_bars_take_the_best_peer_of_a_cell() -> None:
    results = [
        row("dsv4", 3.0), row("a", 4.0), row("vllm33", 6.0, dtype="float32"),
        row("wrong", 0.1, exact=False),
        row("dsv4", 8.0, columns=65_536), row("a", 40.0, columns=65_536),
        row("b", 10.0, columns=65_536, dtype="float32"),
        row("dsv4", 12.0, columns=65_536, dtype="float32"),
    ]  # fmt: skip
    mean = find(results, "bfloat16 warm / best upstream of any dtype, geometric mean")
    assert mean.value == pytest.approx((0.75 * 0.8) ** 0.5) and not mean.met
    worst = find(results, "bfloat16 warm / best upstream of any dtype, worst")
    assert worst.value == pytest.approx(0.8) and worst.met and "against b" in worst.note
    assert find(results, "float32 warm / best upstream of float32, worst").value == 1.2
    vllm = find(results, "bfloat16 warm / vLLM 0.33's own choice")
    assert vllm.value == 0.5 and vllm.note == "1 cells"
    assert str(vllm).startswith("MISS  ") and "bar 0.450" in str(vllm)
    assert find(results, "k 512, 1 x 8192, us").most == 2.5


def test_recorded_figures_are_never_mixed_with_live_ones() -> None:
    results = [row("dsv4", 3.0), row("a", 4.0), row("r", 1.0, recorded="x.csv", exact=None)]
    found = {
        bar.note: bar.value
        for bar in bars.all_bars(results, "vllm33")
        if "best upstream of any dtype, geometric mean" in bar.name
    }
    assert found == {
        "1 cells": 0.75,
        "1 cells, recorded figures of another run included": pytest.approx(3.0),
    }


def test_bars_of_the_other_suites() -> None:
    results = [
        row("dsv4", 3.0, suite="narrow"), row("dsv4", 3.3, suite="narrow", width=256_000),
        row("dsv4", 2.0, suite="adversarial"),
        row("dsv4", 5.0, suite="adversarial", kind="all_equal"),
        row("dsv4", 10.0, suite="prefill"), row("vllm_a", 30.0, suite="prefill", dtype="float32"),
        row("sglang_b", 12.0, suite="prefill", dtype="float32"),
    ]  # fmt: skip
    narrow = find(results, "at natural width")
    assert narrow.value == pytest.approx(1.1) and not narrow.met
    assert find(results, "all_equal / N(0,1)").value == 2.5
    assert find(results, "prefill / vllm, worst").value == pytest.approx(1 / 3)
    sglang = find(results, "prefill / sglang, geometric")
    assert sglang.value == pytest.approx(10 / 12) and not sglang.met


def test_an_inexact_answer_of_ours_is_a_miss() -> None:
    assert find([row("dsv4", 1.0)], "not exact").met
    assert not find([row("dsv4", 1.0, exact=False)], "not exact").met
    assert not find([row("dsv4", 1.0, lowest_index=False)], "not exact").met


def test_the_recorded_figures_and_the_seed() -> None:
    known = peers.recorded(RECORDED)
    assert len(known) > 1300 and all("recorded" in r for r in known)
    choice = [r for r in known if peers.is_vllm_choice(r, "vllm33")]
    assert len(choice) == 90, "one kernel a cell"
    us = {(r["k"], r["rows"], r["columns"]): r["warm_us"] for r in choice}
    assert us[512, 1, 8192] == 4.44 and us[512, 128, 256_000] == 46.87
    seed = peers.seed_figures()
    assert len(seed) == 54 and seed[512, 32, 256_000] == 1.92
    with pytest.raises(UsageError, match="--peers"):
        peers.load(Path("no_such_file.py"))
