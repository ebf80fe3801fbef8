"""``make check-site``'s script on small sites: it passes a good one, and says what is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from kits.packaging_tools import ROOT
from kits.skip_policy import NO_BROWSER

SCRIPT = ROOT / "tests" / "docs" / "check_site.py"
# Table and code scroll in their boxes on a phone; a link to the other page, and a picture.
GOOD = """<!doctype html><meta name="viewport" content="width=device-width">
<style>img { max-width: 100% } pre > code, div { display: block; overflow-x: auto }</style>
<article><h1 id="top">T</h1><pre><code>CODE</code></pre><div><table><tr><td>TABLE</table></div>
<a href="b/#there">b</a> <a href="https://elsewhere.invalid/x">not followed</a>
<img src="p.svg"></article>"""
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="1600" height="9"></svg>'


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_site", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site(folder: Path, page: str) -> Path:
    page = page.replace("CODE", "x" * 60).replace("TABLE", "y" * 90)
    (folder / "a.html").write_text(page)
    (folder / "b").mkdir()
    (folder / "b" / "index.html").write_text('<article><h1 id="there">B</h1></article>')
    (folder / "p.svg").write_text(PICTURE)
    return folder


@pytest.fixture(scope="module")
def browser() -> str:
    found = script().browser()
    if found is None:
        pytest.skip(NO_BROWSER)
    return str(found)


def test_a_good_site_passes(browser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of the browser is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "site").mkdir()
    found = script().check(site(tmp_path / "site", GOOD), browser)
    assert found == {"problems": [], "links": 1, "pages": 2}
    left = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that ends meanwhile
            left += [file] if str(tmp_path).encode() in file.read_bytes() else []
    assert not left


def test_everything_wrong_is_said(browser: str, tmp_path: Path) -> None:
    page = GOOD.replace("CODE", "c" * 300).replace("p.svg", "gone.svg")
    page = page.replace("#there", "#nowhere")
    page = page.replace("</article>", f'<a href="gone.html">g</a><p>{"w" * 100}</p></article>')
    problems = script().check(site(tmp_path, page), browser)["problems"]
    patterns = (
        r"/a.html at 390 pixels: the page is \d+ pixels wide",
        r"/a.html at 390 pixels: ends at pixel \d+: <p> w+",
        r"/a.html at 390 pixels: a picture does not load: gone.svg",
        r"/a.html at 1400 pixels: a picture does not load: gone.svg",
        r"/a.html at 1400 pixels: \d+ pixels in a box of \d+: <code> c+",
        r"/a.html: no #nowhere in /b/",
        r"/a.html: dead link to /gone.html",
    )
    assert len(problems) == len(patterns), problems
    for pattern in patterns:
        assert [p for p in problems if re.fullmatch(pattern, p)], (pattern, problems)


def test_what_hides_its_end_is_said(browser: str, tmp_path: Path) -> None:
    """The page is as wide as the screen, and the reader cannot reach the rest of the line."""
    page = GOOD.replace("overflow-x: auto", "overflow-x: hidden")
    problems = script().check(site(tmp_path, page), browser)["problems"]
    assert any("at 390 pixels: ends at pixel" in p and "<td> y" in p for p in problems), problems
    assert not any("the page is" in p for p in problems), problems


def test_a_site_without_pages_fails(tmp_path: Path) -> None:
    assert script().check(tmp_path, "no-browser")["problems"] == [f"no page in {tmp_path}"]


def test_a_browser_that_ends_is_a_failure(tmp_path: Path) -> None:
    (problem,) = script().check(site(tmp_path, GOOD), "false")["problems"]
    assert "gave no report" in problem


def test_ci_has_a_browser_and_checks_the_site_that_it_built() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    steps = ("apt-get install", "\nmake docs", "\nmake check-site", 'wait "$site" || failed')
    assert sorted(steps, key=ci.index) == [*steps]
    recipe = re.search(r"^check-site:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe and "tests/docs/check_site.py build/site" in recipe[1]
