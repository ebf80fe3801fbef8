"""The documentation site: it contains every page, and the log lines that it quotes are in the code.

`make docs` builds it, with warnings as errors; test_readme checks the links that leave docs/.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from types import ModuleType

import pytest
from kits.marked import between
from kits.packaging_tools import ROOT

from benchmarks.tables import readme as figures
from dsv4_plugin import metrics

DOCS = ROOT / "docs"
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
VARIES = "\0"
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.M)) == sorted([*PAGES, "overview.md"])


def test_a_warning_ends_the_build() -> None:
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe and "mkdocs build --strict" in recipe[1]
    assert "-q" not in recipe[1]  # MkDocs 1.6 counts no warning that it does not show


def test_the_site_is_built_without_torch() -> None:
    """Its environment has the tools of one group, and the hook needs none but them."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^docs: \$\(DOCS_ENV\)/.ready ", makefile, re.M)
    (group,) = re.findall(r"pip install -q --group (.*)", makefile)
    listed = re.search(rf"^\[dependency-groups\]\n{group} = \[(.*)\]", PYPROJECT, re.M)
    assert listed and re.findall(r'"([\w-]+)', listed[1]) == ["mkdocs-material"]
    tree = ast.parse((DOCS / "hooks.py").read_text())
    used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    tops = {str(name).partition(".")[0] for name in used}
    assert tops - set(sys.stdlib_module_names) == {"mkdocs"}


@pytest.mark.parametrize(
    "page, markdown, want",
    [
        ("a.md", "[b](b.md) [c](https://c.d/../e)", "[b](b.md) [c](https://c.d/../e)"),
        ("a.md", "[SECURITY.md](../SECURITY.md)", "`SECURITY.md`"),
        ("a.md", "[README](../README.md#undo)", "[README](overview.md#undo)"),
        ("notes/a.md", "[README](../../README.md)", "[README](../overview.md)"),
        ("a.md", "[`x.cuh`](../csrc/x.cuh#y)", "`csrc/x.cuh`"),
        ("a.md", "[the results](../benchmarks/r.json)", "the results (`benchmarks/r.json`)"),
        ("notes/a.md", "[b](../b.md) [c](../../c)", "[b](../b.md) `c`"),
        ("notes/a.md", "![p](../../r/p.svg)", "![p](../outside/r/p.svg)"),
        ("a.md", "```\n[x](../x)\n```\n", "```\n[x](../x)\n```\n"),
    ],
)
def test_a_link_that_leaves_the_pages_becomes_its_path(page: str, markdown: str, want: str) -> None:
    got, images = hooks().split(markdown, page)
    assert got == want
    assert images == ({"outside/r/p.svg": "r/p.svg"} if "![" in markdown else {})


def test_the_issues_of_engines_are_links_on_the_site() -> None:
    vllm, sglang = "https://github.com/vllm-project/vllm", "https://github.com/sgl-project/sglang"
    got = hooks().issues("a vllm#12, vLLM #34 (sglang#5)\n`vllm#1` [vllm#2](x) omlx#3 x-vllm#4\n")
    want = f"a [vllm#12]({vllm}/issues/12), [vLLM #34]({vllm}/issues/34) "
    want += f"([sglang#5]({sglang}/issues/5))\n`vllm#1` [vllm#2](x) omlx#3 x-vllm#4\n"
    assert got == want
    block = "```\nvllm#1\n```\n"
    assert hooks().issues(block) == block


def test_the_readme_is_a_page_of_the_site() -> None:
    block = "```\n[x](y)\n```\n"
    text = f"[a](docs/a.md#b) [S](SECURITY.md) [c](https://c.d) [e](#e) ![p](r/p.svg)\n{block}"
    want = f"[a](a.md#b) [S](../SECURITY.md) [c](https://c.d) [e](#e) ![p](../r/p.svg)\n{block}"
    assert hooks().overview(text) == want


@functools.cache
def texts() -> str:
    """Every text of the package, with a mark where an f-string has a value."""
    found = []
    for path in (ROOT / "dsv4_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else VARIES for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("%s", VARIES)


def quoted() -> list[str]:
    """Lines in ```text blocks, and the first columns of the tables of reasons."""
    page = (DOCS / "troubleshooting.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    tables = re.findall(r"^\| reason \|.*\n((?:\|.*\n)+)", page, re.M)
    cells = [cell for table in tables for cell in re.findall(r"^\| (`[^|]*) \|", table, re.M)]
    tables = re.findall(r"^\| what \| how the line looks \|\n\|.*\n((?:\|.*\n)+)", page, re.M)
    cells += [cell for table in tables for cell in re.findall(r"\| ([^|]*) \|$", table, re.M)]
    return lines + [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def fixed_parts(line: str) -> list[str]:
    parts = re.split(r"<[^>]*>|…", line)
    return [p for p in (part.strip(" ().,;:%'") for part in parts) if len(p) > 3]


def test_there_are_lines_to_check() -> None:
    lines = quoted()
    assert len(lines) > 25
    assert all(fixed_parts(line) for line in lines)


def missing(line: str) -> list[str]:
    return [part for part in fixed_parts(line) if part not in texts()]


@pytest.mark.parametrize("line", quoted())
def test_every_quoted_line_is_in_the_code(line: str) -> None:
    assert missing(line) == []


def test_a_line_that_nobody_logs_is_noticed() -> None:
    assert missing("dsv4 engaged in <vLLM 0.33.0> at <…>: nowhere at all") == [
        "dsv4 engaged in",
        "nowhere at all",
    ]


def test_the_metrics_and_counters_of_the_page_are_those_of_the_code() -> None:
    page = (DOCS / "metrics.md").read_text()
    shown = re.findall(r"^\| `(dsv4_\w+)\{(\w+)=…\}`", page, re.M)
    assert dict(shown) == {name: label for name, (_, label) in metrics.METRICS.items()}
    counters = re.findall(r"`((?:topk|logits|candidates|gather|read)[.\w]*)`", page)
    words = {word for name in counters for word in name.split(".")} - {""}
    assert len(words) > 10
    assert [word for word in sorted(words) if word not in texts()] == []


# What was measured has a unit of time or of a rate.
MEASURED = re.compile(r"\d ?(?:µs|us|ms|ns|[GT]B/s|TFLOP/s|tokens/s)\b")


def by_hand(text: str) -> list[str]:
    """Return the lines with a measured figure that no script makes from a results file."""
    text = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", "", text, flags=re.S)
    return [line for line in text.splitlines() if MEASURED.search(line)]


@pytest.mark.parametrize("page", [p for p in PAGES if not p.startswith("notes/")])
def test_no_page_has_a_figure_that_was_written_by_hand(page: str) -> None:
    assert by_hand((DOCS / page).read_text()) == []


def test_a_figure_that_was_written_by_hand_is_noticed() -> None:
    made = "<!-- x -->\n| 3 µs |\n<!-- /x -->\n"
    assert by_hand(f"{made}It takes 4.5 µs.\n") == ["It takes 4.5 µs."]


@pytest.mark.parametrize("mark", ["served", "reads"])
def test_the_tables_are_those_of_the_results(mark: str) -> None:
    assert between(DOCS / "results.md", mark).strip() == getattr(figures, mark)()


def test_the_ratios_are_those_of_the_results() -> None:
    assert between(DOCS / "notes" / "topk.md", "ratios").strip() == figures.ratios()


@pytest.mark.parametrize("page", [p for p in PAGES if p.startswith("notes/")])
def test_the_notes_say_which_figures_have_no_file(page: str) -> None:
    """They are a lab book: figures of a script are marked, others name their results file."""
    text = (DOCS / page).read_text()
    assert "(tool)" in text.split("\n## ")[0], "the head must say what is marked (tool)"
    files = set(re.findall(r"benchmarks/results/[\w.]+\w", text))
    assert files and all((ROOT / name).exists() for name in files)
