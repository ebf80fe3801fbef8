"""The benchmarks of the logits and the chain, as dry runs: cases, checks, peers, files, plots."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from kits.bench_command import bench
from kits.logits_cases import _score
from kits.packaging_tools import ROOT

from benchmarks.tables import readme as figures
from benchmarks.tables.logits import markdown
from dsv4_plugin import paged_logits, ragged_logits
from dsv4_plugin.cli import plots
from dsv4_plugin.cli.bench.logits import cases
from dsv4_plugin.cli.bench.logits.cases import Case, Paged, Ragged
from dsv4_plugin.cli.bench.logits.chain import shared
from dsv4_plugin.cli.bench.logits.check import Sample
from dsv4_plugin.cli.bench.logits.report import lines
from dsv4_plugin.cli.checks import compare

PEERS = """
import torch
from dsv4_plugin import paged_logits, ragged_logits, topk

def right(q, cache, weights, lengths, block_table, dtype):
    assert lengths.shape == q.shape[:2] and lengths.dtype == torch.int32
    return paged_logits(q, cache, weights, lengths, block_table, dtype=dtype)

def wrong(q, cache, weights, lengths, block_table, dtype):
    return right(q, cache, weights, lengths, block_table, dtype) * 1.01

def one_query(q, cache, weights, lengths, block_table, dtype):
    if q.shape[1] > 1:
        raise ValueError("takes one query")
    return right(q, cache, weights, lengths, block_table, dtype)

def ragged(q, k, k_scale, weights, row_starts, row_ends, dtype):
    return ragged_logits(q, k, k_scale, weights, row_starts, row_ends, dtype=dtype)

def exact(logits, lengths, k, out):
    topk(logits, lengths, k, out=out)

def first_k(logits, lengths, k, out):
    out.copy_(torch.arange(k).expand_as(out))

def available():
    return {"vllm33": exact, "sglang_v2": first_k, "another": exact}

def available_logits():
    return {"gemm": right, "wrong": wrong, "narrow": one_query, "absent": "is not installed"}

def available_ragged_logits():
    return {"gemm": ragged}
"""


def test_a_run_of_the_logits(
    tmp_path: Path, peers_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every suite, small, with peers: the file, what is printed, and the plot."""
    file, drawn = tmp_path / "logits.json", tmp_path / "logits.svg"
    code = bench("logits", "--device", "cpu", "--suite", "all", "--rows", 1, 3, "--columns", 200,
                 "--peers", peers_file, "--json", file)  # fmt: skip
    document = json.loads(file.read_text())
    said = "\n".join([capsys.readouterr().out, *lines(document["results"])])
    assert code == 0
    plots.draw(document, drawn)
    assert document["complete"] is True and document["what"] == "logits"
    rows = document["results"]
    plugin = [row for row in rows if row["implementation"] == "dsv4"]
    assert len(plugin) == 4 + 12 + 4 + 4  # decode, next_n, varied, prefill
    assert all(row["right"] and row["warm_us"] > 0 and row["floor_us"] > 0 for row in plugin)
    assert all((row["cold_us"] is None) == (row["suite"] == "prefill") for row in plugin)
    gemm = [row for row in rows if row["implementation"] == "gemm"]
    assert len(gemm) == len(plugin) and all(row["right"] for row in gemm)
    wrong = [row for row in rows if row["implementation"] == "wrong"]
    assert len(wrong) == 20 and not any(row["right"] for row in wrong)
    assert all("sampled scores of row 0" in row["why"] for row in wrong)
    assert {row["next_n"] for row in rows if row["implementation"] == "narrow"} == {1}
    for words in ("absent is not compared: is not installed",
                  "narrow refuses bfloat16 1 x 200 next_n 2: takes one query",
                  "decode: 4 cells", "[  1/12 ",
                  "bfloat16: us warm | / best peer", "x the keys' bytes at the read rate",
                  "Several queries per request", "Lengths from 1", "Prefill: causal windows",
                  "TFLOP/s  WRONG",
                  "dsv4: right in 24 of 24 cells", "wrong: right in 0 of 20 cells"):  # fmt: skip
        assert words in said, words
    assert "geometric mean" not in said, "times of a CPU are compared"
    named = "\n".join(one.name for one in compare.ratios(rows))
    for words in ("decode bfloat16 warm / best peer of any dtype",
                  "decode float32 cold / best peer of float32",
                  "prefill float32 warm / best peer of float32"):  # fmt: skip
        assert words in named, words
    text = drawn.read_text()
    for words in ("Index logits", "3 rows", "dsv4 float32", "best upstream", "bytes of the keys"):
        assert words in text, words


def test_a_run_of_the_chain(
    tmp_path: Path, peers_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, drawn = tmp_path / "chain.json", tmp_path / "chain.svg"
    code = bench("chain", "--device", "cpu", "--rows", 1, 2, "--columns", 300, "--k", 40, 64,
                 "--peers", peers_file, "--json", file)  # fmt: skip
    document = json.loads(file.read_text())
    said = "\n".join([capsys.readouterr().out, *lines(document["results"])])
    assert code == 0
    plots.draw(document, drawn)
    assert document["complete"] is True and document["what"] == "chain"
    assert document["vllm_choice"] == "vllm33" and document["sglang_choice"] == "sglang_v2"
    rows = document["results"]
    plugin = [row for row in rows if row["implementation"] == "dsv4"]
    assert len(plugin) == 8
    assert all(row["exact"] and row["right"] and row["lowest_index"] for row in plugin)
    names = {row["implementation"] for row in rows}
    assert names == {"dsv4"} | {
        f"{first} + {last}" for first in ("gemm", "wrong", "narrow")
        for last in ("vllm33", "sglang_v2")
    }  # fmt: skip
    by_name = {name: [row for row in rows if row["implementation"] == name] for name in names}
    assert all(row["dtype"] == "float32" for name in names - {"dsv4"} for row in by_name[name])
    assert all(row["exact"] and row["right"] for row in by_name["gemm + vllm33"])
    assert not any(row["exact"] for row in by_name["gemm + sglang_v2"])
    assert all(row["exact"] and not row["right"] for row in by_name["wrong + vllm33"])
    for row in plugin:  # with what is right only
        assert set(row["agreement"]) == {"gemm + vllm33", "narrow + vllm33"}
        mean = row["agreement"]["gemm + vllm33"]["mean"]
        assert mean == 1.0 if row["dtype"] == "float32" else 0.8 < mean <= 1.0
    for words in ("absent is not compared", "decode: 8 cells", "bfloat16, k 40: us warm",
                  "dsv4 float32 shares 100.000% of its indices with gemm + vllm33",
                  "dsv4: exact, ties to the lowest index, in 8 of 8 cells",
                  "gemm + sglang_v2: exact in 0 of 4 cells"):  # fmt: skip
        assert words in said, words
    text = drawn.read_text()
    for words in ("Index logits and exact top-k, k = 40", "gemm + vllm33 float32"):
        assert words in text, words
    plots.draw(document, drawn, k=64)
    assert "k = 64" in drawn.read_text()


def test_a_choice_that_no_peer_has_is_said(
    peers_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("chain", "--device", "cpu", "--rows", 1, "--columns", 70, "--k", 8, "--peers",
                 peers_file, "--sglang-choice", "nobody", "--dtype", "float32") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "nobody is not compared: it is not among the peers" in said and "gemm + vllm33" in said


def test_a_spent_budget_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what, count in (("logits", 2), ("chain", 4)):
        file = tmp_path / f"{what}.json"
        assert bench(what, "--device", "cpu", "--budget", 0, "--json", file) == 0
        assert f"--budget 0 s is spent: {count} cells are not" in capsys.readouterr().out
        assert json.loads(file.read_text())["complete"] is False


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["logits", "--suite", "paged"], "--suite: invalid choice: 'paged'.*next_n"),
        (["chain", "--suite", "prefill"], "unrecognized arguments: --suite prefill"),
        (["logits", "--k", "512"], "unrecognized arguments: --k 512"),
        (["chain", "--against", "x.csv"], "--against must be of .*torch.*got 'x.csv'"),
        (["chain", "--against", "torch,vlm"], "--against must be of .*torch.*got 'vlm'"),
        (["logits", "--peers", "{root}/tests/kits/oracles.py"], r"available_logits\(\)"),
        (["logits", "--json", "{tmp}/no/x.json"], "--json cannot be written"),
    ],
)
def test_what_the_user_can_repair(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(tmp=tmp_path, root=ROOT) for a in arguments]
    assert bench(*filled, "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert said.startswith("dsv4-plugin bench: ") and len(said.splitlines()) == 1
    assert re.search(words, said), said


# ---- Cases ---------------------------------------------------------------------------------------


def test_the_suites_have_the_cells_of_the_project() -> None:
    count = {name: len(cases.suite(name)) for name in cases.SUITES}
    assert count == {"decode": 48, "next_n": 24, "varied": 8, "prefill": 6}
    assert len(cases.chain()) == 13 * 3 * 2
    every = [case for name in cases.SUITES for case in cases.suite(name)]
    assert max(case.cache_bytes for case in every) == 128 * 256_000 * 132 < 40 << 30
    assert cases.suite("decode", rows=[2048], columns=[1 << 20]) == []
    assert cases.suite("prefill", dtypes=["float16"], rows=[8192]) == [
        Case("prefill", "float16", 8192, 8192, lengths="causal")
    ]
    with pytest.raises(ValueError, match="suite must be one of decode.*got 'nope'"):
        cases.suite("nope")


def test_cells_of_one_data_stand_together() -> None:
    lists = {name: cases.suite(name) for name in cases.SUITES} | {"chain": cases.chain()}
    for name, some in lists.items():
        keys = [case.data for case in some]
        groups = [key for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
        assert len(groups) == len(set(groups)), name


def test_a_paged_case_draws_what_it_says() -> None:
    case = Case("varied", "bfloat16", 5, 200, next_n=2, lengths="varied")
    problem = case.make()
    assert isinstance(problem, Paged)
    assert problem.q.shape == (5, 2, 64, 128) and problem.weights.shape == (10, 64)
    assert problem.cache.shape == (20, 64, 1, 132) and problem.cache.is_contiguous()
    assert problem.block_table.flatten().sort().values.tolist() == list(range(20))
    assert problem.block_table.flatten().tolist() != list(range(20)), "pages are shuffled"
    n = problem.lengths
    assert n[0].tolist() == [199, 200] and bool((n[:, 1] - n[:, 0] == 1).all())
    assert len(set(n[:, 1].tolist())) > 1 and int(n.min()) >= 1
    assert case.keys_read == int(n[:, 1].sum()) and case.scores == int(n.sum())
    assert case.operations == case.scores * 64 * 256
    assert not bool(problem.cache.view(-1)[: 64 * 128].view(torch.float8_e4m3fn).isnan().any())


def test_a_prefill_case_draws_what_it_says() -> None:
    case = Case("prefill", "bfloat16", 4, 10, lengths="causal")
    problem = case.make()
    assert isinstance(problem, Ragged)
    assert problem.row_starts.tolist() == [0] * 4 and problem.row_ends.tolist() == [7, 8, 9, 10]
    assert case.keys_read == 10 and case.scores == 34
    assert Case("prefill", "bfloat16", 3, 2, lengths="causal").ends().tolist() == [0, 1, 2]


# ---- The check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("suite", ["varied", "prefill"])
def test_the_check_accepts_the_reference_only(suite: str, dtype: str) -> None:
    case = Case(suite, dtype, 4, 150, lengths="causal" if suite == "prefill" else "varied")
    p, kind = case.make(), cases.DTYPES[dtype]
    if isinstance(p, Paged):
        out = paged_logits(p.q, p.cache, p.weights, p.lengths, p.block_table, dtype=kind)
    else:
        out = ragged_logits(p.q, p.k, p.k_scale, p.weights, p.row_starts, p.row_ends, dtype=kind)
    sample = Sample(p)
    assert sample.why_wrong(out) == ""
    last = int(p.n[3]) - 1
    for bad in (float(out[3, last]) * 1.02 + 10.0, float("nan"), float("inf")):
        spoilt = out.clone()
        spoilt[3, last] = bad
        words = f"1 of {last + 1} sampled scores of row 3; first: column {last}"
        assert words in sample.why_wrong(spoilt)
    past = out.clone()
    past[0, int(p.n[0]) :] = torch.nan
    assert sample.why_wrong(past) == ""


def test_the_check_is_that_of_the_tests() -> None:
    """The benchmark's float64 scores are those of the tests' own oracle."""
    p = Case("varied", "float32", 2, 100, lengths="varied").make()
    for row, columns, score, size in Sample(p)._parts:
        keys, scale = p.keys(row, columns)
        want = _score(p.queries(row), keys, scale, p.weights[row])
        assert torch.allclose(score, want[0], rtol=1e-12, atol=0.0)
        assert torch.allclose(size, want[1], rtol=1e-12, atol=0.0)


def test_a_long_row_is_sampled_with_its_ends() -> None:
    columns = Sample(Case("decode", "float32", 1, 64).make())._columns(100_000)
    assert len(columns) == 4096 and {0, 63, 99_936, 99_999} <= set(columns.tolist())
    assert int(columns.max()) < 100_000


def test_the_shared_indices_are_counted() -> None:
    plugin = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [-1] * 4, [-1] * 4], dtype=torch.int32)
    peer = torch.tensor([[3, 2, 9, 8], [5, 4, -1, -1], [7, 0, -1, -1], [-1] * 4], dtype=torch.int32)
    assert shared(plugin[:2], peer[:2]) == (0.75, 0.5)
    assert shared(plugin, peer) == (0.625, 0.0)
    assert shared(plugin[3:], peer[3:]) == (1.0, 1.0)


# ---- Figures -------------------------------------------------------------------------------------


def row(implementation: str, us: float, **more: object) -> dict[str, object]:
    return {"suite": "decode", "dtype": "bfloat16", "batch": 1, "next_n": 1, "rows": 1,
            "columns": 8192, "lengths": "full", "implementation": implementation, "warm_us": us,
            "cold_us": None, "right": True, "floor_us": 1.0, "ratio": us, **more}  # fmt: skip


def at(batch: int, columns: int) -> dict[str, object]:
    return {"batch": batch, "rows": batch, "columns": columns}


def chained(implementation: str, us: float, batch: int, columns: int, **more: object):
    return row(implementation, us, **at(batch, columns), k=512,
               **{"exact": True, "lowest_index": True, **more})  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of a run that never was."""
    scores = [
        row("dsv4", 3.0), row("gemm", 4.0), row("dsv4", 6.0, dtype="float32"),
        row("dsv4", 20.0, **at(8, 65_536), floor_us=16.04),
        row("gemm", 16.0, **at(8, 65_536)), row("dsv4", 9.0, suite="next_n", next_n=2),
    ]  # fmt: skip
    chain = [
        chained("dsv4", 10.0, 1, 65_536), chained("dsv4", 12.0, 1, 65_536) | {"k": 2048},
        chained("gemm + vllm33", 20.0, 1, 65_536, dtype="float32"),
        chained("gemm + vllm33", 10.0, 1, 65_536, dtype="float32") | {"k": 2048},
        chained("gemm + sglang_v2", 12.5, 1, 65_536, dtype="float32"),
    ]  # fmt: skip
    about = {"machine": {"gpu": "GPU"}}
    both = {
        "h200_logits.json": {**about, "results": scores},
        "h200_chain.json": {
            **about, "vllm_choice": "vllm33", "sglang_choice": "sglang_v2", "results": chain,
        },
    }  # fmt: skip
    for name, document in both.items():
        (tmp_path / name).write_text(json.dumps(document))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    return tmp_path


def test_the_figures_are_made_from_the_results(results: Path) -> None:
    text = markdown()
    for words in (
        "Index logits on one GPU", "the plugin / gemm / the keys' bytes", "| requests | 8K | 64K |",
        "| 1 | 3.0 / 4.0 / 1.0 |  |", "| 8 |  | 20.0 / 16.0 / 16.0 |",
        "over 2 cells is 0.97; the plugin is slower in 1 (worst 1.25). "
        "The plugin is within the stated bound",
        "k = 512: the plugin in bfloat16 / vLLM 0.33's / SGLang 0.5.23's in float32",
        "| 1 | 10.0 / 20.0 / 12.5 |",
        "Against vLLM 0.33's chain the geometric mean of the ratio over 2 cells is 0.77; "
        "the plugin is slower in 1 (worst 1.20).",
        "Against SGLang 0.5.23's chain the geometric mean of the ratio over 1 cells is 0.80",
        "The plugin is exact in every cell.",
    ):  # fmt: skip
        assert words in text, words
    assert "`benchmarks/results/h200_chain.json`" in text


def test_a_wrong_cell_is_in_the_figures(results: Path) -> None:
    for name, key, words in (
        ("h200_logits.json", "right", "NOT within"), ("h200_chain.json", "exact", "NOT exact"),
    ):  # fmt: skip
        document = json.loads((results / name).read_text())
        document["results"][0][key] = False
        (results / name).write_text(json.dumps(document))
        assert words in markdown()


def test_the_documents_figures_are_the_generated_ones() -> None:
    """Where a page has the figures, they are those of the committed files."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pattern = r"<!-- logits-figures -->\n(.*?)<!-- /logits-figures -->"
    found = [text.strip() for page in pages for text in re.findall(pattern, page.read_text(), re.S)]
    assert found == [markdown() for _ in found]
