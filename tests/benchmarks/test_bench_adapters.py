"""The benchmark of the adapters, as a dry run: every call, kind of peer, file and table."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kits.marked import between
from kits.packaging_tools import ROOT

from benchmarks.engines.command import main
from benchmarks.engines.kernels.cells import by_rounds
from benchmarks.engines.kernels.side import CELLS
from benchmarks.tables import engines as figures
from benchmarks.tables.readme import RESULTS
from dsv4_plugin.cli.bench.peers import Peers
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.decision import INERT
from dsv4_plugin.state import state

PEERS = """
import torch
from dsv4_plugin import read_indexer_cache, topk

def paged(logits, lengths, table, out, page_size, raw):
    topk(logits, lengths, out.shape[1], page_table=table, page_size=page_size, out=out, out_raw=raw)

def first_k(logits, lengths, table, out, page_size, raw):
    out.copy_(torch.arange(out.shape[1]).expand_as(out))

def decode(q, weights, seq_lens, block_table, *, topk, out, lens_out, topk_layout, **kwargs):
    if topk_layout != "logical_offsets":
        raise ValueError("logical offsets only")
    out.copy_(torch.arange(topk).expand_as(out))
    lens_out.copy_(seq_lens.clamp(max=topk))
    return out, lens_out

def available_sglang_paged():
    return {"sglang": paged, "wrong": first_k, "absent": "is not installed"}

def available_tokenspeed_decode():
    return {"tokenspeed": decode}

def available_tokenspeed_read():
    return {"loop": lambda cache, slots, block: read_indexer_cache(cache, slots, backend="torch")}
"""


def bench(*arguments: object) -> int:
    return main(["--part", "kernels", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def peers_file(tmp_path: Path) -> Path:
    file = tmp_path / "peers.py"
    file.write_text(PEERS)
    return file


def test_a_whole_run(tmp_path: Path, peers_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "adapters.json"
    code = bench("--rows", 4, "--columns", 700, "--peers", peers_file, "--json", file)
    said = capsys.readouterr().out
    assert code == 0
    document = json.loads(file.read_text())
    assert document["complete"] is True and document["what"] == "engines kernels"
    assert document["missing"] == {"absent": "is not installed"} and document["not_run"] == []
    rows = document["results"]
    assert {(r["suite"], r["call"]) for r in rows} == {
        *(("sglang", call) for call in ("paged", "paged_raw", "dsa", "prefill")),
        *(
            ("tokenspeed", call)
            for call in ("dsa_decode", "dsa_decode_slots", "dsv4_decode", "dsa_prefill", "gather",
                         "read_fp8", "read_mxfp4")
        ),
    }  # fmt: skip
    plugin = [r for r in rows if r["implementation"].startswith("dsv4")]
    assert len(plugin) == 2 + 2 + 1 + 2 + 4 * 2 + 3
    assert all(r["exact"] and r["us"] > 0 for r in plugin)
    assert all(r["lowest_index"] for r in plugin if r["k"])
    scored = [r for r in plugin if r["suite"] == "tokenspeed" and r["k"]]
    assert all(r["recall"] > 0.9 and r["recall_worst"] <= r["recall"] for r in scored)

    by = {(r["call"], r["implementation"]): r for r in rows}
    assert by["paged_raw", "sglang"]["exact"] and "lowest_index" not in by["paged", "sglang"]
    assert not by["paged", "wrong"]["exact"] and by["paged", "wrong"]["why"]
    engine = by["dsa_decode", "tokenspeed"]
    assert engine["recall"] < 0.9 and "exact" not in engine  # its scores are not seen
    refused = by["dsa_decode_slots", "tokenspeed"]
    assert refused["us"] is None and "logical offsets only" in refused["error"]
    assert by["read_fp8", "loop"]["graph"] is False and by["read_fp8", "loop"]["exact"]
    for words in ("absent is not compared: is not installed", "[  1/11] ", "wrong ", "!",
                  "rows x columns", "error ValueError: logical offsets only"):  # fmt: skip
        assert words in said, words
    assert adapter.current().decision is INERT and not state.counters


@pytest.mark.parametrize("wrong", ["slots", "an index twice", "a row's length"])
def test_a_mistake_of_the_plugin_is_seen(monkeypatch, tmp_path, wrong) -> None:
    """The judge looks at what the adapter left, and not at what it was asked for."""
    import dsv4_plugin as ops

    real = ops.topk

    def broken(logits, lengths, k, **kwargs):
        out = real(logits, lengths, k, **kwargs)
        if wrong == "slots":
            out += 64
        elif wrong == "an index twice":
            out[:, 1] = out[:, 0]
        else:
            out[:, -1] = -1
        return out

    monkeypatch.setattr(ops, "topk", broken)
    file = tmp_path / "adapters.json"
    bench("--rows", 2, "--columns", 700, "--engine", "sglang", "--json", file)
    rows = json.loads(file.read_text())["results"]
    assert rows and not any(row["exact"] for row in rows)


# The engines' functions with the parameters that they have in SGLang 0.5.23 and TokenSpeed 0.1.1.
SITE = {
    "sglang/__init__.py": "__version__ = '0.5.23'\n",
    "sglang/kernels/ops/attention/dsv4/topk.py": """
from typing import Optional
import torch
from dsv4_plugin import topk

def plan_topk_v2(seq_lens, static_threshold=-1, *, out=None):
    return torch.full((len(seq_lens) + 1, 2), 7, dtype=torch.int32)

def topk_transform_paged_v2(scores, seq_lens, page_tables: Optional[torch.Tensor],
                            out_page_indices, page_size, metadata, out_raw_indices=None):
    assert metadata.shape == (len(seq_lens) + 1, 2) and (metadata == 7).all()
    topk(scores, seq_lens, out_page_indices.shape[1], page_table=page_tables, page_size=page_size,
         out=out_page_indices, out_raw=out_raw_indices)
""",
    "tokenspeed/__init__.py": "__version__ = '0.1.1'\n",
    "tokenspeed/runtime/layers/attention/deepseek_v4_ops.py": """
from dsv4_plugin import read_indexer_cache

def read_deepseek_v4_indexer_fp8_cache(cache_2d, slot_mapping, block_size=64):
    return read_indexer_cache(cache_2d, slot_mapping, backend="torch")
""",
    "tokenspeed_kernel/__init__.py": "",
    "tokenspeed_kernel/ops/attention/dsa/__init__.py": """
from dsv4_plugin.engines.shared.decision import Selection
from dsv4_plugin.engines.tokenspeed import kernels

OWN = Selection("fp32", "torch", False, "plugin")

def dsa_decode_topk(q, weights, seq_lens, block_table, *, page_size, topk, softmax_scale,
                    batch_invariant, q_len_per_req=1, topk_layout="global_slots",
                    index_k_cache=None, out=None, lens_out=None, slot_order, solution=None):
    assert slot_order == "selection" and batch_invariant is False
    return kernels.dsa_decode(OWN, q, weights, seq_lens, block_table, page_size=page_size,
                              topk=topk, softmax_scale=softmax_scale, topk_layout=topk_layout,
                              index_k_cache=index_k_cache, out=out, lens_out=lens_out)

def dsa_prefill_topk(q, weights, kv_workspace_slots, row_starts, row_ends, *, topk, softmax_scale,
                     batch_invariant, index_k_cache=None, page_size=None, out=None, lens_out=None,
                     slot_order, solution=None):
    assert slot_order == "selection" and batch_invariant is False
    return kernels.dsa_prefill(OWN, q, weights, kv_workspace_slots, row_starts, row_ends,
                               topk=topk, softmax_scale=softmax_scale, page_size=page_size,
                               index_k_cache=index_k_cache, out=out, lens_out=lens_out)
""",
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SGLang and TokenSpeed as installed packages; of TokenSpeed the facades of V4 are missing."""
    for name, text in SITE.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = set(sys.modules)
    yield tmp_path / "site"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("sglang", "tokenspeed", "tokenspeed_kernel"):
            del sys.modules[name]


def test_the_peers_are_the_engines_that_are_installed(site: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapters.json"
    assert bench("--rows", 4, "--columns", 700, "--json", file) == 0
    document = json.loads(file.read_text())
    missing = document["missing"]
    assert set(missing) == {"tokenspeed 0.1.1 dsv4 decode", "tokenspeed 0.1.1 gather"}
    assert "tokenspeed_kernel.ops.attention.dsv4" in missing["tokenspeed 0.1.1 dsv4 decode"]
    peers = {
        (r["call"], r["implementation"]): r
        for r in document["results"]
        if not r["implementation"].startswith("dsv4")
    }
    sglang = {(call, "sglang 0.5.23 v2") for call in ("paged", "paged_raw", "dsa", "prefill")}
    assert set(peers) == sglang | {
        ("dsa_decode", "tokenspeed 0.1.1 decode"),
        ("dsa_decode_slots", "tokenspeed 0.1.1 decode"),
        ("dsa_prefill", "tokenspeed 0.1.1 prefill"),
        ("read_fp8", "tokenspeed 0.1.1 read"),
    }
    assert all(row.get("exact", True) and "error" not in row for row in peers.values())
    assert all(peers[key]["exact"] for key in sglang)
    assert peers["dsa_prefill", "tokenspeed 0.1.1 prefill"]["recall"] > 0.9
    assert peers["dsa_decode_slots", "tokenspeed 0.1.1 decode"]["recall"] > 0.9


def test_an_engine_that_is_not_installed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--rows", 2, "--columns", 600, "--engine", "sglang") == 0
    said = capsys.readouterr().out
    assert "sglang v2 is not compared: it is not installed here" in said


def test_every_call_has_a_cell_before_any_has_a_second() -> None:
    tasks = [task for cells in CELLS.values() for task in cells("cpu", Peers(), (512,), (), ())]
    calls = {(task.about["suite"], task.about["call"]) for task in tasks}
    ordered = by_rounds(tasks)
    first = [(task.about["suite"], task.about["call"]) for task in ordered[: len(calls)]]
    assert len(calls) == 11 and set(first) == calls
    assert sorted(map(str, ordered)) == sorted(map(str, tasks))
    for call in calls:  # the shapes of one call stay in their order
        both = ([str(t) for t in x if (t.about["suite"], t.about["call"]) == call]
                for x in (tasks, ordered))  # fmt: skip
        assert len(set(map(tuple, both))) == 1


def test_a_run_that_is_cut_short_names_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "adapters.json"
    bench("--rows", 4, "--columns", 700, "--engine", "sglang", "--budget", 1e-9, "--json", file)
    document = json.loads(file.read_text())
    assert document["complete"] is False and document["results"] == []
    assert document["not_run"] == [
        f"sglang {call} k 512 4 x 700" for call in ("paged", "paged_raw", "dsa", "prefill")
    ]


PAGES = {
    "sglang": "docs/development/sglang.md",
    "tokenspeed": "docs/development/tokenspeed.md",
    "engines": "docs/results.md",
}


@pytest.mark.parametrize("mark", PAGES)
def test_the_figures_of_the_pages_are_made_from_the_results(mark: str) -> None:
    assert between(ROOT / PAGES[mark], mark).strip() == getattr(figures, mark)()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the committed files that a test may change."""
    for name in (figures.ADAPTERS, figures.SGLANG, figures.TOKENSPEED):
        shutil.copy(RESULTS / name, tmp_path)
    monkeypatch.setattr("benchmarks.tables.readme.RESULTS", tmp_path)
    return tmp_path


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_what_an_incomplete_file_has_not_is_named(results: Path) -> None:
    file = results / figures.ADAPTERS
    document = json.loads(file.read_text()) | {"complete": False}
    document.pop("not_run", None)  # as files of before it
    first = [r for r in document["results"] if r["suite"] == "sglang"]
    first += [r for r in document["results"] if (r["call"], r["rows"], r["columns"]) ==
              ("dsa_decode", 1, 8192)]  # fmt: skip
    file.write_text(json.dumps(document | {"results": first}))
    words = "**Incomplete:** the run was stopped; missing: `dsa_decode` after 1 x 8192, `dsa_decode"
    assert words in figures.tokenspeed() and words in figures.engines()
    assert "none of these calls is missing" in figures.sglang()
    words = "missing: tokenspeed gather 7 x 9."
    change(file, not_run=["tokenspeed gather 7 x 9"])
    assert words in figures.tokenspeed() and words in figures.engines()
    change(results / figures.TOKENSPEED, not_run=["read on"], complete=False)
    assert "missing: read on." in figures.tokenspeed()
    for name in (figures.ADAPTERS, figures.TOKENSPEED):
        change(results / name, complete=True)
    assert not any("ncomplete" in getattr(figures, mark)() for mark in PAGES)


def test_a_wrong_answer_is_in_the_figures_and_not_in_a_ratio(results: Path) -> None:
    file = results / figures.SGLANG
    rows = json.loads(file.read_text())["results"]
    row = next(r for r in rows if r["variant"] == "bf16 own" and r["part"].endswith("k512"))
    (off,) = (r for r in rows if (r["part"], r["variant"]) == (row["part"], "off"))
    row["us"] = 321 * off["us"]
    for right in (True, False):
        row["right"] = right
        change(file, results=rows)
        made = figures.sglang()
        assert ("the ratio from 321.00 (" in made) is right
        assert (f"| {row['us']:.1f} WRONG |" in made) is not right
        assert (f"{len(rows)} results, 1 wrong" in made) is not right


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--engine", "vllm") == 2
    assert "--engine: invalid choice: 'vllm'" in capsys.readouterr().err
    assert main(["--part", "forward", "--device", "cpu"]) == 2
    assert "--part forward is of one --engine, got sglang, tokenspeed" in capsys.readouterr().err
    assert main(["--device", "cpu"]) == 2
    assert "required: --part" in capsys.readouterr().err
