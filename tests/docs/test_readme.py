"""The README and the pages of docs/: the names in them exist, and their example runs."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kits import marked
from kits.packaging_tools import ROOT, check

from benchmarks.tables import candidates, engines_v41, expected, picture, readme, settings
from dsv4_plugin import envs

README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
GAIN = ROOT / "docs" / "gain.svg"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def between(mark: str, page: str = "README.md") -> str:
    return marked.between(ROOT / page, mark)


def test_the_settings_table_is_the_generated_one() -> None:
    assert between("settings", "docs/settings.md").strip() == settings.table().replace(
        "(docs/", "("
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_variable_that_is_named_exists(page: Path) -> None:
    text = page.read_text()
    known = {v.name for v in envs.VARIABLES} | set(envs.OTHER_VARIABLES)
    known |= set(re.findall(r"nothing reads (DSV4_\w+) \(did you mean", text))  # shown as a mistake
    assert set(re.findall(r"\bDSV4_[A-Z_]+[A-Z]\b", text)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "mark,page",
    [
        (mark, "docs/results.md")
        for mark in (
            "v41-server",
            "v41-step",
            "v41-layers",
            "figures",
            "server",
            "served",
            "reads",
            "engines",
            "sglang-server",
        )
    ],
)
def test_what_stands_between_marks_names_its_file(mark: str, page: str) -> None:
    """It is a claim, and a claim has its file."""
    files = re.findall(r"benchmarks/results/[\w./-]*\w", between(mark, page))
    assert files and [name for name in files if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    blocks = re.findall(r"^```python\n(.*?)^```", PYTHON, re.M | re.S)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/python.md", "exec"), names)  # noqa: S102  # our own text
    return names


def test_the_readmes_example_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) == 1 and "assert" in blocks[0]
    exec(compile(blocks[0], "README.md", "exec"), {})  # noqa: S102  # our own text


def test_the_program_of_the_examples_runs() -> None:
    done = check([sys.executable, ROOT / "examples" / "ops.py"], ROOT, {"PYTHONPATH": str(ROOT)})
    assert re.search(r"request 0: 512 of 2000 keys.*\nrequest 1: 300 of 300 keys", done.stdout)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


def test_the_picture_is_made_from_the_results(tmp_path: Path) -> None:
    made = tmp_path / "gain.svg"
    assert picture.main([str(made)]) == 0
    shown = [re.findall(r">([^<>]*\d[^<>]*)</text>", f.read_text()) for f in (GAIN, made)]
    assert shown[0] == shown[1]
    values = [
        f"{us:.1f}" for _, *times in picture.bars(readme.load(candidates.SERVER)) for us in times
    ]
    assert [text for text in shown[0] if text in values] == values


def test_the_example_gives_what_its_comments_say(example: dict[str, Any]) -> None:
    assert example["keys"].shape == (3, 128) and example["keys"].dtype == torch.bfloat16
    assert example["values"].shape == (130, 128)
    assert example["values"].dtype == torch.float8_e4m3fn
    assert example["scales"].shape == (130,) and example["scales"].dtype == torch.float32
    indices = example["indices"]
    assert indices.shape == (2, 512) and indices.dtype == torch.int32
    assert indices[1].tolist() == [*range(300), *[-1] * 212]
    assert example["scores"].shape == (2, 128) and example["scores"].dtype == torch.bfloat16
    assert example["best"][1].tolist() == [*range(30), *[-1] * 482]
    assert example["windows"].shape == (2, 130)
    assert example["scores4"].shape == (6, 128) and example["scores4"].dtype == torch.bfloat16
    best = example["logits"][0, :4000].float().topk(512).values.sort().values
    got = example["logits"][0].float()[indices[0].long()].sort().values
    assert torch.equal(got, best)


def test_the_figures_are_made_from_the_results() -> None:
    assert between("figures", "docs/results.md").strip() == readme.readme()


def test_the_figures_of_the_server_are_made_from_the_results() -> None:
    assert between("server", "docs/results.md").strip() == readme.server()


def test_the_gain_of_the_server_is_made_from_the_results() -> None:
    assert between("gain", "docs/results.md").strip() == readme.gain()


def test_the_expected_gain_is_made_from_the_results() -> None:
    assert between("expected").strip() == expected.expected()


@pytest.mark.parametrize(
    "mark,page,text",
    [
        ("v41-server", "docs/results.md", candidates.server),
        ("v41-step", "docs/results.md", candidates.step),
        ("v41-layers", "docs/results.md", candidates.layers),
        ("v41-fp4", "docs/results.md", candidates.fp4),
        ("sglang-v41", "docs/results.md", engines_v41.sglang),
        ("sglang-publish", "docs/results.md", engines_v41.publish),
        ("tokenspeed-v41", "docs/results.md", engines_v41.tokenspeed),
    ],
)
def test_the_figures_of_v41_are_made_from_the_results(
    mark: str, page: str, text: Callable[[], str]
) -> None:
    assert between(mark, page).strip() == text()


def test_the_figures_of_v41_follow_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slower or a wrong answer in the file is seen in the text."""
    document = copy.deepcopy(readme.load(candidates.CANDIDATES))
    cell = ("decode", "step", "dsv4", "bfloat16", 64, 1 << 20)
    names = ("suite", "op", "implementation", "dtype", "rows", "columns")
    (row,) = [r for r in document["results"] if tuple(r[n] for n in names) == cell]
    row.update(us=18_500.0, exact=False)
    real = candidates.load
    monkeypatch.setattr(
        candidates, "load", lambda name: document if name == candidates.CANDIDATES else real(name)
    )
    text = candidates.step()
    assert "| 18,500 / " in text and "to 1.2" in text and "SOME ARE WRONG" in text


def test_the_first_screen_has_what_people_ask_for() -> None:
    screen = README.partition("\n## ")[0]
    for words in ("V4.1", "<!-- expected -->", "For whom", "Proven on", "Not proven", "Undo"):
        assert words in screen, words


def test_what_it_does_not_do_has_what_people_ask_for() -> None:
    section = README.partition("## What it does not do\n")[2].partition("\n## ")[0]
    for words in ("V3.2", "context parallelism", "Blackwell"):
        assert words in section, words
