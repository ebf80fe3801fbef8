"""The README as a page of the site, links that leave ``docs/``, and links to the engines' issues.

Called by MkDocs (``hooks`` in mkdocs.yml).

In the repository's own view such links work. The site has the README as its page ``overview.md``.
It has no other page from outside ``docs/``, so a link there becomes its text and the path; an image
is brought along.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

__all__ = ["issues", "on_files", "on_page_markdown", "outside", "overview", "split"]

_OVERVIEW = "overview.md"
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)#\s]+)(?P<anchor>[^)]*)\)"
)
# Whose issues have a link. Others stay text.
_TRACKERS = {
    "flashinfer": "flashinfer-ai/flashinfer",
    "sglang": "sgl-project/sglang",
    "tensorrt-llm": "NVIDIA/TensorRT-LLM",
    "vllm": "vllm-project/vllm",
}
_ISSUE = re.compile(rf"(?<![\w/\[-])(?P<name>{'|'.join(_TRACKERS)}) ?#(?P<number>\d+)\b", re.I)
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`|\[[^\]]*\]\([^)]*\)|^    .*?$)", re.M | re.S)
_FENCED = re.compile(r"^(```.*?^```)", re.M | re.S)


def outside(page: str, target: str) -> str | None:
    """Return where a link of ``page`` (a path in ``docs/``) leads in the repository, if outside."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def overview(readme: str) -> str:
    """Return the README with its links as they are seen from ``docs/``."""
    parts = _FENCED.split(readme)
    parts[::2] = [
        re.sub(r"\]\((?!\w+:|#)", "](../", part).replace("](../docs/", "](") for part in parts[::2]
    ]
    return "".join(parts)


def issues(markdown: str) -> str:
    """Return the page with links at ``vllm#51782`` and the like, outside of code and of links."""

    def linked(issue: re.Match[str]) -> str:
        tracker = _TRACKERS[issue["name"].lower()]
        return f"[{issue[0]}](https://github.com/{tracker}/issues/{issue['number']})"

    parts = _CODE.split(markdown)
    parts[::2] = [_ISSUE.sub(linked, part) for part in parts[::2]]
    return "".join(parts)


def split(markdown: str, page: str) -> tuple[str, dict[str, str]]:
    """Return the page without links that leave ``docs/``.

    The second value maps the images, by their places on the site, to their paths in the repository.
    """
    images: dict[str, str] = {}
    up = "../" * page.count("/")

    def replaced(link: re.Match[str]) -> str:
        path = outside(page, link["target"])
        if path is None:
            return link[0]
        if path == "README.md":
            return f"[{link['text']}]({up}{_OVERVIEW}{link['anchor']})"
        if link["image"]:
            images[f"outside/{path}"] = path
            return f"![{link['text']}]({up}outside/{path})"
        shown = link["text"].strip("`")
        return f"`{path}`" if shown in path else f"{link['text']} (`{path}`)"

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts), images


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Called by MkDocs with the files of ``docs/``."""
    from mkdocs.structure.files import File

    readme = Path(config.config_file_path).parent / "README.md"
    text = overview(readme.read_text(encoding="utf-8"))
    files.append(File.generated(config, _OVERVIEW, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any, **_: Any) -> str:
    """Called by MkDocs with every page, before its links are checked."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    markdown, images = split(issues(markdown), page.file.src_uri)
    for place, path in images.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(root / path)))
    return markdown
