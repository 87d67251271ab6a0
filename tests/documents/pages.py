"""The pages that people read, as the tests see them: blocks of code, links, anchors, and what the blocks are given.

The rules that the pages keep, and that make every block of code a tested one:

* a fence names its language; ``python`` blocks run, ``bash`` blocks and indented ones hold commands;
* what is no command (output, formulas) stands in a fence of another language, such as ``text``;
* what the Python blocks need beside themselves stands in one comment, ``<!-- given: checkpoint, runs/mine = checkpoint -->``:
  names, and files of the working folder, that the tests provide.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]

LANGUAGES = ("python", "bash", "yaml", "json", "text", "math", "mermaid", "indented")
"""Those that a fence may name, and the name here of a block without a fence."""

_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_CODE, _CODE_IN_A_LIST = 4, 6
_HEADING = re.compile(r"^#{1,6} +(.*?) *#*$")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_SOURCE = re.compile(r"<(?:img|source|a)\b[^>]*?\b(?:src|srcset|href)=\"([^\"]+)\"")
_GIVEN = re.compile(r"<!-- given: (.*?) -->")
_IMPORT = re.compile(r"^\s*(?:from|import) (?:model|transformers)\b", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        language: what the fence says; ``"indented"`` for a block without one.
        text: without the indentation that all lines share.
        line: number of its first line of code in the page, from 1.
    """

    language: str
    text: str
    line: int


class Page:
    """A markdown page.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.text = path.read_text(encoding="utf-8")
        self.blocks, self.prose = _split(self.text)

    def of(self, *languages: str) -> list[Block]:
        """The blocks of these languages."""
        return [block for block in self.blocks if block.language in languages]

    @property
    def uses_the_model(self) -> bool:
        """Whether its Python needs more than ``igva_kernels``."""
        return any(_IMPORT.search(block.text) for block in self.of("python"))

    @property
    def given(self) -> dict[str, str]:
        """Names of Python, or files of the working folder, to what the test provides for them."""
        found = _GIVEN.findall(self.text)
        assert len(found) <= 1, f"{self.name} says {len(found)} times what is given"
        pairs = (entry.partition(" = ")[::2] for text in found for entry in text.split(", "))
        return {name: provided or name for name, provided in pairs}

    @property
    def links(self) -> list[str]:
        """Targets of all links and pictures."""
        prose = re.sub(r"`[^`\n]*`", "", self.prose)
        return [*_LINK.findall(prose), *_SOURCE.findall(prose)]

    @property
    def inline_code(self) -> list[str]:
        """What stands between backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """Those that GitHub gives the headings."""
        seen: dict[str, int] = {}
        anchors = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", self.prose))
        for line in self.prose.splitlines():
            if heading := _HEADING.match(line):
                words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").replace("*", "")
                slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
                anchors.add(slug if slug not in seen else f"{slug}-{seen[slug]}")
                seen[slug] = seen.get(slug, 0) + 1
        return anchors


def _split(text: str) -> tuple[list[Block], str]:
    """The blocks of a page, and its text with empty lines in their places."""
    blocks, prose, lines = [], [], text.splitlines()
    at = 0
    while at < len(lines):
        begin = at
        if fence := _FENCE.match(lines[at]):
            closing = f"{fence[1]}```"
            while (at := at + 1) < len(lines) and lines[at].rstrip() != closing:
                pass
            code = [line.removeprefix(fence[1]) for line in lines[begin + 1 : at]]
            blocks.append(Block(fence[2], "\n".join(code) + "\n", begin + 2))
            at += 1
        elif _indentation(lines[at]) >= (margin := _CODE_IN_A_LIST if _in_a_list(prose) else _CODE) and not _above(lines, at):
            while at < len(lines) and (_indentation(lines[at]) >= margin or not lines[at].strip()):
                at += 1
            blocks.append(Block("indented", textwrap.dedent("\n".join(lines[begin:at])).rstrip() + "\n", begin + 1))
        else:
            prose.append(lines[at])
            at += 1
            continue
        prose.extend([""] * (at - begin))
    return blocks, "\n".join(prose)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else 0


def _above(lines: list[str], at: int) -> str:
    """The text of the line before."""
    return lines[at - 1].strip() if at else ""


def _in_a_list(before: list[str]) -> bool:
    """Whether an indented line goes on with an item of a list: the last line that is not indented begins one."""
    last = next((line for line in reversed(before) if line.strip() and not line.startswith(" ")), "")
    return bool(re.match(r"(?:[*+-]|\d+\.) ", last))


PAGES = [
    Page(path)
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "benchmarks" / "README.md",
        ROOT / "benchmarks" / "notes.md",
    )
]
PAGE_BY_PATH = {page.path: page for page in PAGES}
