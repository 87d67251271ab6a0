"""Links, anchors, pictures and paths of all pages exist."""

from __future__ import annotations

import re

import pytest
from documents.pages import LANGUAGES, PAGE_BY_PATH, PAGES, ROOT, Page

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

_PATH = re.compile(
    r"^(?:(?:igva_kernels|model|benchmarks|tests|docs)/[\w./*-]*|(?:setup|pyproject|Makefile|constraints)[\w.]*)$"
)
MADE_LATER = ("benchmarks/results/DEVICE-PART.json",)
"""Paths with a word to fill in."""


@EVERY_PAGE
def test_links_and_anchors(page: Page) -> None:
    missing = []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        anchors = PAGE_BY_PATH[target].anchors if target in PAGE_BY_PATH else {anchor}
        if not target.exists() or (anchor and anchor not in anchors):
            missing.append(link)
    assert not missing


@EVERY_PAGE
def test_paths_of_this_repository(page: Page) -> None:
    """In the text; a path of a page in docs/ may be given from the root or from the page."""
    named = [text for text in page.inline_code if _PATH.match(text) and text not in MADE_LATER]
    missing = [path for path in named if not any([*ROOT.glob(path.rstrip("/")), *page.path.parent.glob(path.rstrip("/"))])]
    assert not missing


@EVERY_PAGE
def test_fences_name_their_language(page: Page) -> None:
    assert not [f"line {block.line}: {block.language!r}" for block in page.blocks if block.language not in LANGUAGES]


@EVERY_PAGE
def test_every_page_is_reached_from_the_readme_or_the_index(page: Page) -> None:
    reached, waiting = set(), [ROOT / "README.md", ROOT / "docs" / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in PAGE_BY_PATH:
            continue
        reached.add(path)
        files = (link.partition("#")[0] for link in PAGE_BY_PATH[path].links if not re.match(r"[a-z]+:", link))
        waiting += [(path.parent / file).resolve() for file in files if file]
    assert page.path in reached
