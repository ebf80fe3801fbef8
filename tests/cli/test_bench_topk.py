"""The benchmark of the top-k, as a dry run: cases, checks, peers, the results file and the plot."""

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
from kits.topk_edges import plateau

from dsv4_plugin import topk
from dsv4_plugin.cli.bench.command import WHAT
from dsv4_plugin.cli.bench.topk.check import judge
from dsv4_plugin.cli.bench.topk.report import lines
from dsv4_plugin.cli.checks import compare
from dsv4_plugin.cli.checks import topk_cases as cases
from dsv4_plugin.cli.checks.inputs import DISTRIBUTIONS
from dsv4_plugin.cli.checks.topk_cases import Case, Problem

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
    """Every suite, small, with peers: the file and what is printed."""
    file = tmp_path / "topk.json"
    code = bench("topk", "--device", "cpu", "--suite", "all", "--k", 100, 512, "--rows", 1, 8,
                 "--columns", 8192, "--dtype", "bfloat16", "float32", "float16",
                 "--peers", peers_file, "--json", file)  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    document = json.loads(file.read_text())
    assert document["complete"] is True and document["what"] == "topk"
    rows = document["results"]
    assert {r["suite"] for r in rows} == set(cases.SUITES)
    plugin = [row for row in rows if row["implementation"] == "dsv4"]
    # decode, served, narrow, adversarial (1 x 8K only), prefill, paged.
    assert len(plugin) == 12 + 12 + 24 + 54 + 24 + 12
    assert {row["suite"] for row in rows if "served_us" in row} == {"served"}
    paged = [row for row in rows if row["implementation"] == "sglang_paged"]
    assert len(paged) == 12 and all(row["exact"] for row in paged)
    assert all(row["exact"] and row["lowest_index"] for row in plugin)
    assert all(row["warm_us"] > 0 and row["ratio"] > 0 for row in plugin)
    assert all(row["cold_us"] > 0 for row in plugin if row["suite"] != "served")
    assert {row["suite"] for row in rows if "gb_s" in row} == {"prefill"}
    wrong = [row for row in rows if row["implementation"] == "wrong" and row["kind"] == "normal"]
    assert wrong and not any(row["exact"] for row in wrong)
    assert not any(r["implementation"] == "vllm33" and r["dtype"] == "bfloat16" for r in rows)
    roof = {"read_gb_s": 4000.0, "copy_gb_s": 3000.0}
    said += "\n".join(lines(rows, roof))  # which a run on a GPU prints
    for words in ("absent is not compared: is not installed", "vllm33 refuses bfloat16",
                  "[  1/12 ", "left] bfloat16 k 100 1 x 8192", "in a 256,000-wide buffer",
                  "Adversarial scores", "Prefill: us warm",
                  "Answers in pool slots: us warm", "As in a server, code and lengths from memory",
                  "x one-pass floor",
                  "dsv4: exact, ties to the lowest index, in 138 of 138 cells",
                  "sglang_paged: exact in 12 of 12 cells"):  # fmt: skip
        assert words in said, words
    assert "geometric mean" not in said, "times of a CPU are compared"
    named = "\n".join(map(str, compare.ratios(rows, vllm="vllm33")))  # what a GPU's run prints
    for words in ("decode bfloat16 warm / best peer of any dtype: ",
                  "decode float32 cold / best peer of float32: ",
                  "decode bfloat16 warm / vllm's own: ", "served float32 / vllm's own: ",
                  "prefill bfloat16 warm / best peer of any dtype: ",
                  "paged bfloat16 warm / best peer"):  # fmt: skip
        assert words in named, words


def test_a_killed_run_leaves_a_valid_file(tmp_path: Path) -> None:
    file = tmp_path / "topk.json"
    command = [sys.executable, "-m", "dsv4_plugin", "bench", "topk", "--device", "cpu",
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
        (["plot"], "required: RESULTS.json, --plot"),
        (["plot", "{results}"], "required: --plot"),
        ([], "required: WHAT"),
        (["adapters"], "invalid choice: 'adapters'.*topk"),
        (["topk", "--suite", "varied"], "--suite: invalid choice: 'varied'.*paged"),
        (["plot", "{root}/pyproject.toml", "--plot", "{tmp}/x.svg"], "is no results file"),
        (["plot", "{results}", "--plot", "{tmp}/x.svg", "--k", "7"], "--k.*512.*got 7"),
        (["topk", "--device", "cpu", "--peers", "{tmp}/none.py"], "--peers.*none.py"),
        (["topk", "--device", "cpu", "--peers", "{root}/tests/kits/oracles.py"], "available"),
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
    page = (ROOT / "benchmarks" / "README.md").read_text()
    with pytest.raises(SystemExit):
        bench("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert all(f" {what} {about}" in said for what, about in WHAT.items())
    options = {}
    for what in WHAT:
        with pytest.raises(SystemExit):
            bench(what, "--help")
        options[what] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert {option for option in options[what] if option not in page} == set()
    assert {"--suite", "--against", "--budget", "--plot"} <= options["topk"]
    assert options["plot"] == {"--plot", "--k"}
    assert "--k" not in options["logits"] | options["candidates"] | options["read"]
    assert "--sglang-choice" in options["chain"] - options["topk"]
    assert all(f"`{name}`" in page for name in cases.SUITES)


def test_a_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for what in (["plot", RESULTS], ["topk", "--device", "cpu"]):
        assert bench(*what, "--plot", tmp_path / "x.svg") == 2
        said = capsys.readouterr()
        assert "--plot needs matplotlib" in said.err and "pip install matplotlib" in said.err
        assert "decode: " not in said.out, "measured before it was said"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_of_a_committed_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.{suffix}"
    assert bench("plot", RESULTS, "--plot", file) == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        text = data.decode()
        for words in ("128 rows", "dsv4 bfloat16", "vllm33 float32", "best upstream kernel"):
            assert words in text, words
        assert "sglang_v2" not in text  # of fourteen peers those that a reader compares with


def test_the_committed_plot_is_drawn_from_the_committed_file(tmp_path: Path) -> None:
    file = tmp_path / "x.svg"
    assert bench("plot", RESULTS, "--plot", file) == 0
    check_same(file, RESULTS.with_suffix(".svg"))


# ---- Cases ---------------------------------------------------------------------------------------


def test_the_suites_have_the_cells_of_the_project() -> None:
    count = {name: len(cases.suite(name)) for name in cases.SUITES}
    assert count == {"decode": 180, "served": 48, "narrow": 60, "adversarial": 180, "prefill": 48,
                     "paged": 54}  # fmt: skip
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
    rows = plateau([0, 1, 700, 1000], 1000, torch.bfloat16)
    assert (rows == 2.0).sum(1).tolist() == [0, 1, 700, 1000]
    assert float(rows.max()) == 2.0


# ---- The check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in DISTRIBUTIONS if kind != "special"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_check_accepts_the_reference(kind: str, dtype: str) -> None:
    problem = Case("decode", dtype, 64, 5, 700, kind=kind).make()
    problem = Problem(problem.logits, torch.tensor([700, 65, 64, 10, 0]))
    for k in (1, 64, 128):
        for sort in (False, True):
            out = topk(problem.logits, problem.lengths, k, sort=sort)
            verdict = judge(problem, out, ties=True)
            assert verdict.exact and verdict.ties, verdict


def test_the_check_with_windows() -> None:
    problem = Case("prefill", "bfloat16", 16, 40, 100, kind="relu_sum", windows="causal").make()
    out = topk(problem.logits, problem.lengths, 16, row_starts=problem.row_starts)
    assert judge(problem, out, ties=True).ties
    shifted = torch.where(out >= 0, out + problem.starts[:, None], -1)
    assert not judge(problem, shifted).exact


def test_the_check_refuses_every_kind_of_wrong() -> None:
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0, 0.0]])
    problem = Problem(logits, torch.tensor([5]))

    def why(*index: int) -> str:
        verdict = judge(problem, torch.tensor([index], dtype=torch.int32), ties=True)
        return verdict.why if not (verdict.exact and verdict.ties) else ""

    assert why(0, 1, 2) == "" and why(2, 0, 1) == ""
    assert "lowest index" in why(0, 1, 3)
    assert "larger score was left out" in why(0, 1, 4)
    assert "twice" in why(0, 1, 1)
    assert "outside" in why(0, 1, 5) and "number of indices" in why(0, 1, -2)
    assert "number of indices" in why(0, 1, -1)
    peers = judge(problem, torch.tensor([[0, 1, 3]], dtype=torch.int32))
    assert peers.exact and not peers.why, "a peer promises no tie rule"
