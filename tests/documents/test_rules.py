"""What the tests see of a page: blocks, also those of lists, anchors, what is given, shapes that are not so."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import pages
from documents.commands import lines_of
from documents.pages import Page
from documents.running import run_page

TEXT = """# A page, with `code` & more

<!-- given: checkpoint, runs/mine = checkpoint -->

Text with `igva ask` and [a link](other.md#there), ![FusionPlan.layers(24, [-2, 3])](picture.svg "a title").

    igva ask CHECKPOINT \\
        picture.jpg "What?"      # a remark

1. An item

       make test

   that goes on
    with a crooked line, which is text.

```python
B, N, D = 2, 3, 4
```

```text
[no link](nowhere.md)
```

## A page, with `code` & more
"""


@pytest.fixture
def make_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)

    def make(text: str) -> Page:
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
        return Page(tmp_path / "page.md")

    return make


def test_what_stands_in_a_page(make_page) -> None:
    page = make_page(TEXT)
    assert [(block.language, block.line) for block in page.blocks] == [
        ("indented", 7),
        ("indented", 12),
        ("python", 18),
        ("text", 22),
    ]
    commands = [line for block in page.of("indented") for line in lines_of(block)]
    assert commands == [(7, 'igva ask CHECKPOINT picture.jpg "What?"      # a remark'), (12, "make test")]
    assert page.links == ["other.md#there", "picture.svg"]
    assert page.inline_code == ["code", "igva ask", "code"]
    assert page.anchors == {"a-page-with-code--more", "a-page-with-code--more-1"}
    assert page.given == {"checkpoint": "checkpoint", "runs/mine": "checkpoint"}
    assert not page.uses_the_model


@pytest.mark.parametrize(("shape", "right"), [("(B, N, 2 * D)", True), ("(B, N, D)", False)])
def test_a_stated_shape_is_checked(make_page, tmp_path: Path, shape: str, right: bool) -> None:
    code = "import torch\nB, N, D = 2, 3, 4\nfor _ in range(1):\n    out = torch.zeros(B, N, 2 * D)  # " + shape
    page = make_page(f"# Shapes\n\n```python\n{code}\n```\n")
    if right:
        assert run_page(page, tmp_path, {}.get)["out"].shape == (2, 3, 8)
    else:
        with pytest.raises(AssertionError, match="2, 3, 8"):
            run_page(page, tmp_path, {}.get)


def test_blocks_share_names_and_a_folder_with_what_is_given(make_page, tmp_path: Path) -> None:
    page = make_page(
        "<!-- given: number, runs/mine = file -->\n\n```python\nx = number\n```\n\n"
        '```python\nread = open("runs/mine").read() * x\n```\n'
    )
    (tmp_path / "file").write_text("a", encoding="utf-8")
    (tmp_path / "work").mkdir()
    names = run_page(page, tmp_path / "work", {"number": 3, "file": tmp_path / "file"}.get)
    assert names["read"] == "aaa"


def test_an_error_names_the_line_of_the_page(make_page, tmp_path: Path) -> None:
    page = make_page("# Wrong\n\n```python\nx = 1\nx.no_such_thing\n```\n")
    with pytest.raises(AttributeError) as caught:
        run_page(page, tmp_path, {}.get)
    assert caught.traceback[-1].lineno + 1 == 5
