"""``dsv4-plugin recall``: its figures against Python sets, its inputs, its results file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from kits.bench_command import bench
from kits.marked import between
from kits.oracles import select
from kits.packaging_tools import ROOT
from kits.svg_curves import check_same

from benchmarks.tables import readme as figures
from benchmarks.tables.recall import table as recall_table
from dsv4_plugin import topk
from dsv4_plugin.cli import main as cli
from dsv4_plugin.cli.checks.inputs import scores
from dsv4_plugin.cli.plots import recall as plot
from dsv4_plugin.cli.recall import PAPER, command, sources
from dsv4_plugin.cli.recall.measure import DTYPES, Statistics, percentile
from dsv4_plugin.cli.shared.run import UsageError

ULP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
RESULTS = ROOT / "benchmarks" / "results" / "cpu_recall.json"


def measured(x, lengths, k, dtype):
    x = torch.as_tensor(x, dtype=torch.float32)
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    found = Statistics(k, dtype)
    found.add(x, lengths, topk(x, lengths, k))
    return found.row()


def by_hand(row, n, k, dtype):
    """Overlap, gap, depth and mass of one row, by Python's sort."""
    exact = [float(v) for v in row[:n]]
    rounded = [float(v) for v in row[:n].to(DTYPES[dtype])]
    order = select(exact, n)
    s, d = set(order[:k]), set(select(rounded, k))
    low = max(d, key=order.index)
    t = exact[order[k - 1]]
    return {
        "overlap": len(s & d) / k,
        "gap": (t - exact[low]) / abs(t) if t else 0.0,
        "depth": order.index(low) + 1 - k,
        "mass": (sum(exact[i] for i in s) - sum(exact[i] for i in d))
        / sum(abs(exact[i]) for i in s),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "crowded", "relu_sum", "one_huge_bin"])
def test_against_python(kind, dtype):
    k, x = 16, scores(kind, 12, 300, torch.float32, seed=5)
    lengths = [300, 17, 16, 3, 0, 299, 250, 100, 80, 64, 40, 200]
    got = measured(x, lengths, k, dtype)
    hand = [by_hand(r, n, k, dtype) for r, n in zip(x, lengths, strict=True) if n > k]
    overlap = sorted(h["overlap"] for h in hand)
    assert (got["rows"], got["short_rows"]) == (9, 3)
    assert got["mean"] == pytest.approx(sum(overlap) / 9, abs=1e-6)
    assert got["worst"] == got["p1"] == pytest.approx(overlap[0], abs=1e-6)
    assert got["equal_rows"] == sum(o == 1 for o in overlap)
    assert got["depth_worst"] == max(h["depth"] for h in hand)
    assert got["gap_worst"] == pytest.approx(max(h["gap"] for h in hand), rel=6e-3, abs=1e-7)
    assert got["mass_lost_worst"] == pytest.approx(max(h["mass"] for h in hand), rel=6e-3, abs=1e-7)
    assert got["beyond_ties"] == 0


def test_a_difference_that_rounding_does_not_explain_would_show():
    """The counter can count: an 'exact' selection that is not is found out."""
    x = torch.arange(40.0)[None]
    wrong = Statistics(4, "bfloat16")
    wrong.add(x, torch.tensor([40], dtype=torch.int32), torch.tensor([[0, 1, 2, 3]]).int())
    assert wrong.row()["beyond_ties"] == 4 and wrong.row()["mean"] == 0


@pytest.mark.parametrize("kind", sources.KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_differs_ties_after_rounding(kind, dtype):
    """The set changes by no more than a rounding of the threshold, at any scale."""
    (batch,) = sources.drawn(kind, 4, 4096, seed=3)
    for scale in (1.0, 1e-3, 37.0):
        got = measured(batch.scores * scale, batch.lengths, 512, dtype)
        assert got["beyond_ties"] == 0 and got["mean"] > 0.9
        assert 0 <= got["gap_worst"] <= ULP[dtype]


def test_float16_overflows_to_ties():
    x = torch.linspace(60_000, 90_000, 1000)[None]
    got = measured(x, [1000], 100, "float16")
    assert got["mean"] < 0.5 and got["beyond_ties"] == 0


def test_scores_that_are_exact_in_the_dtype_lose_nothing():
    x = scores("relu_sum", 3, 2000, torch.float32).bfloat16().float()
    got = measured(x, [2000] * 3, 512, "bfloat16")
    assert (got["mean"], got["worst"], got["equal_rows"]) == (1, 1, 3)
    assert got["gap_worst"] == got["depth_worst"] == got["mass_lost_worst"] == 0


def test_percentile_is_the_nearest_rank():
    values = torch.arange(1.0, 201.0)
    assert percentile(values, 1) == 2 and percentile(values[:99], 1) == 1
    assert percentile(values, 100) == 200


def test_relu_sum_is_the_indexers_formula():
    """The scores against a loop over heads, on keys read one by one from the same draw."""
    g = torch.Generator().manual_seed(7)
    keys = sources._keys(100, g, "cpu")
    (batch,) = sources.drawn("relu_sum", 2, 100, seed=7)
    for row in range(2):
        query = torch.randn(64, 128, generator=g).to(torch.float8_e4m3fn).double()
        weights = torch.rand(64, generator=g).double()
        want = sum(w * (q @ keys.double().T).relu() for w, q in zip(weights, query, strict=True))
        assert torch.allclose(batch.scores[row].double(), want, rtol=1e-5)


def test_batches_are_cut_and_drawn_once(monkeypatch):
    monkeypatch.setattr(sources, "_ELEMENTS", 1000)
    batches = list(sources.drawn("normal", 7, 300, seed=1))
    assert [len(b.scores) for b in batches] == [3, 3, 1]
    assert not torch.equal(batches[0].scores, batches[1].scores)


# ---- Captured scores ----------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    torch_of = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

    def write(**tensors: torch.Tensor) -> Path:
        file = tmp_path / "scores.safetensors"
        torch_of.save_file({n.replace("__", "."): t for n, t in tensors.items()}, file)
        return file

    return write


def test_captured_scores_with_lengths(save, capsys, tmp_path):
    x = scores("normal", 5, 700, torch.float32)
    x[1, 600:] = float("nan")  # past its length
    file = save(layer3=x, layer9=x[:2].clone(), lengths=torch.tensor([700, 600, 512, 513, 9]),
                layer9__lengths=torch.tensor([700, 600]))  # fmt: skip
    out = tmp_path / "r.json"
    assert cli.main(["recall", "--scores", str(file), "--k", "512", "--device", "cpu",
                     "--json", str(out)]) == 0  # fmt: skip
    results = json.loads(out.read_text())["results"]
    found = {r["scores"]: r for r in results if r["dtype"] == "bfloat16"}
    assert set(found) == {f"{file.name}: layer3", f"{file.name}: layer9"}
    assert [(r["rows"], r["short_rows"]) for r in found.values()] == [(3, 2), (2, 0)]
    assert all(r["beyond_ties"] == 0 for r in results)
    assert str(tmp_path) not in out.read_text()
    assert "99.7 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": torch.zeros(2, 600).bfloat16()}, "x must be float32 [rows, columns], got torch.bf"),
        ({"x": torch.zeros(600)}, "x must be float32 [rows, columns]"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, "no tensor of scores"),
        ({"x": torch.zeros(2, 600), "lengths": torch.zeros(3).int()}, "lengths of x must be int"),
        ({"x": torch.zeros(2, 600), "lengths": torch.tensor([1, 601])}, "must be 0 … 600"),
        ({"x": torch.full((2, 600), torch.nan)}, "x has NaN inside its rows"),
    ],
    ids=["bf16", "one dimension", "none", "shape of lengths", "lengths too long", "NaN"],
)
def test_a_captured_file_of_another_form_is_an_error(save, capsys, tensors, said):
    assert cli.main(["recall", "--scores", str(save(**tensors)), "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert cli.main(["recall", "--scores", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "pip install safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "4096"], "--k must be a whole number from 1 to 2048, got '4096'"),
        (["--k", "0"], "--k must be a whole number from 1 to 2048, got '0'"),
        (["--columns", "0"], "--columns must be a whole number from 1"),
        (["--scores", "x", "--rows", "3"], "--scores has its own rows"),
        (
            ["--json", "no/such/folder/r.json", "--rows", "1", "--columns", "64"],
            "there is no folder",
        ),
    ],
)
def test_wrong_options(options, said, capsys):
    assert cli.main(["recall", "--device", "cpu", *options]) == 2
    assert said in capsys.readouterr().err


# ---- The results file and what is made of it ----------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("recall") / "small.json"
    picture = file.with_suffix(".svg")
    options = ["--rows", "3", "--columns", "1024", "2048", "--k", "512", "1024", "--json", file]
    command_line = ["recall", "--device", "cpu", *options, "--plot", picture]
    assert cli.main([str(part) for part in command_line]) == 0
    return json.loads(file.read_text()), picture


def test_a_run_has_every_cell(small):
    document, picture = small
    cells = {(r["scores"], r["columns"], r["k"], r["dtype"]): r for r in document["results"]}
    assert len(cells) == 3 * 2 * 2 * 2
    assert document["paper"] == PAPER and document["device"] == "cpu"
    assert {"torch", "commit", "date"} <= set(document["machine"])
    short = cells["normal", 1024, 1024, "bfloat16"]
    assert (short["rows"], short["short_rows"]) == (0, 3), "k of k columns is no choice"
    assert picture.read_text().count("<svg") == 1


def test_a_plot_of_nothing_is_an_error(small, tmp_path):
    empty = [r for r in small[0]["results"] if not r["rows"]]
    with pytest.raises(UsageError, match="nothing to draw"):
        plot.draw({**small[0], "results": empty}, tmp_path / "x.svg")


def test_the_table_refuses_what_rounding_does_not_explain(small):
    assert recall_table(small[0]).startswith("| scores | k | dtype | 1K | 2K |")
    rows = [{**r, "beyond_ties": 1} if r["rows"] else r for r in small[0]["results"]]
    with pytest.raises(ValueError, match="do not tie"):
        recall_table({**small[0], "results": rows})


def test_the_committed_file_is_whole():
    document = json.loads(RESULTS.read_text())
    cells = {(r["scores"], r["columns"], r["k"], r["dtype"]) for r in document["results"]}
    want = {
        (s, c, k, d) for s in sources.KINDS for c in command.COLUMNS for k in (512, 1024, 2048)
        for d in DTYPES
    }  # fmt: skip
    assert cells == want
    assert all(r["beyond_ties"] == 0 and r["rows"] == 128 for r in document["results"])


def test_the_figures_of_the_numerics_page_are_made_from_it():
    assert between(ROOT / "docs" / "numerics.md", "recall").strip() == figures.recall()


def test_the_committed_plot_is_drawn_from_the_committed_file(tmp_path):
    file = tmp_path / "recall.svg"
    assert bench("plot", RESULTS, "--plot", file) == 0
    check_same(file, RESULTS.with_suffix(".svg"))
    text = (ROOT / "docs" / "numerics.md").read_text()
    assert f"](../{RESULTS.with_suffix('.svg').relative_to(ROOT)})" in text


def test_another_figure_is_seen_in_the_plot(tmp_path):
    document = json.loads(RESULTS.read_text())
    document["results"][0]["mean"] -= 0.002
    other, file = tmp_path / "other.json", tmp_path / "recall.svg"
    other.write_text(json.dumps(document))
    assert bench("plot", other, "--plot", file) == 0
    with pytest.raises(AssertionError):
        check_same(file, RESULTS.with_suffix(".svg"))


def test_on_a_terminal_it_says_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["recall", "--device", "cpu", "--kind", "normal", "--k", "8", "16", "--columns", "64",
           "--rows", "2", "--dtype", "bfloat16"]  # fmt: skip
    assert cli.main(few) == 0
    assert "left" not in capsys.readouterr().out, "a pipe has the table alone"
    monkeypatch.setattr(command.screen, "columns", lambda: 100)
    assert cli.main(few) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("normal ")]
    assert len(rows) == 2 and all(line.endswith("  0:00 left") for line in rows)
