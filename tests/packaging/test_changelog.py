"""CHANGELOG.md and the tags: each release has a section, and each section has a release."""

from __future__ import annotations

import datetime
import re
import shutil
import sys
from pathlib import Path

import pytest
from kits.packaging_tools import ROOT, check, run

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
NONE_YET = "There is no release yet."


def problems(text: str, tags: list[str]) -> list[str]:
    """What is wrong with a changelog beside the release tags of its history (``v1.2.3``)."""
    found: list[str] = []
    sections = re.split(r"^## ", text, flags=re.M)
    titles = [section.splitlines()[0] for section in sections[1:]]
    releases: list[tuple[int, ...]] = []
    for title, section in zip(titles, sections[1:], strict=True):
        if not section.partition("\n")[2].strip():
            found.append(f"{title}: says nothing")
        if title == "Unreleased":
            continue
        match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", title)
        if match is None:
            found.append(f"{title}: is neither Unreleased nor VERSION (YYYY-MM-DD)")
            continue
        datetime.date.fromisoformat(match[4])
        releases.append((int(match[1]), int(match[2]), int(match[3])))
    if "Unreleased" in titles[1:]:
        found.append("Unreleased is not at the top")
    if releases != sorted(set(releases), reverse=True):
        found.append("the newest release is not first")
    if (NONE_YET in text) != (not releases):
        found.append(f"{NONE_YET!r} {'stands beside a release' if releases else 'is missing'}")
    tagged = {
        (int(m[1]), int(m[2]), int(m[3]))
        for tag in tags
        if (m := re.fullmatch(r"v(\d+)\.(\d+)\.(\d+)", tag))
    }
    found += [f"tag {version} has no section" for version in sorted(tagged - set(releases))]
    # The newest may be about to be tagged; a shallow clone has no tags at all.
    if tagged:
        found += [f"{version} has no tag" for version in releases[1:] if version not in tagged]
    return found


def test_the_changelog_has_the_releases_that_were_tagged() -> None:
    done = run(["git", "tag", "--list", "v*"], ROOT)
    assert problems(CHANGELOG, done.stdout.split() if done.returncode == 0 else []) == []


def test_the_tag_of_the_newest_section_is_the_version(tmp_path: Path) -> None:
    """As docs/packaging.md says it, in a repository that has the settings of this one."""
    newest = re.search(r"^## (\d+\.\d+\.\d+) ", CHANGELOG, re.M)
    assert newest
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]

    def version(*command: str) -> str:
        check([*git, *command], tmp_path)
        return check([sys.executable, "-m", "setuptools_scm"], tmp_path).stdout.split()[-1]

    check(["git", "init", "-q", "."], tmp_path)
    (tmp_path / ".gitignore").write_text("dsv4_plugin\n")  # the file with the version
    (tmp_path / "dsv4_plugin").mkdir()
    check(["git", "add", "."], tmp_path)
    assert re.fullmatch(r"0\.1(\.0)?\.dev1\+g\w+", version("commit", "-qm", "first"))
    assert version("tag", "-a", f"v{newest[1]}", "-m", "x") == newest[1]
    major, minor, patch = map(int, newest[1].split("."))
    later = version("commit", "--allow-empty", "-qm", "second")
    assert re.fullmatch(rf"{major}\.{minor}\.{patch + 1}\.dev1\+g\w+", later)
    (tmp_path / "pyproject.toml").open("a").write("# changed\n")
    assert re.fullmatch(rf"{re.escape(later)}\.d\d{{8}}", version("status"))


GOOD = """# Changelog

## Unreleased

- x

## 0.2.0 (2026-02-01)

- y

## 0.1.0 (2026-01-01)

- z
"""


def test_a_good_changelog() -> None:
    assert problems(GOOD, ["v0.1.0", "v0.2.0"]) == []
    assert problems(GOOD, ["v0.1.0"]) == []  # 0.2.0 is the commit to be tagged
    assert problems(GOOD, []) == []
    assert problems(f"# C\n\n{NONE_YET}\n\n## Unreleased\n\n- x\n", ["nightly"]) == []


@pytest.mark.parametrize(
    ("text", "tags", "said"),
    [
        (GOOD, ["v0.3.0", "v0.1.0"], "tag (0, 3, 0) has no section"),
        (GOOD, ["v0.2.0"], "(0, 1, 0) has no tag"),
        (GOOD.replace("- y", ""), [], "0.2.0 (2026-02-01): says nothing"),
        (GOOD.replace("0.2.0 (2026-02-01)", "0.2"), [], "0.2: is neither"),
        (GOOD.replace("0.2.0", "0.0.2"), [], "the newest release is not first"),
        (GOOD + "\n## Unreleased\n\n- w\n", [], "Unreleased is not at the top"),
        (GOOD + NONE_YET, [], "stands beside a release"),
        ("# C\n\n## Unreleased\n\n- x\n", [], "is missing"),
    ],
)
def test_what_is_wrong_is_said(text: str, tags: list[str], said: str) -> None:
    (problem,) = problems(text, tags)
    assert said in problem
