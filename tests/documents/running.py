"""Runs the Python of a page, one block after the other, in one namespace and in a folder of its own."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from documents.pages import Block, Page

_SHAPE = re.compile(r"^( *)(\w+) = .*  # (\(B, .*\))$")


def run_page(page: Page, folder: Path, provide: Callable[[str], Any]) -> dict[str, Any]:
    """Run all blocks of a page.

    Args:
        folder: the working folder.
        provide: the value for a name that the page's comment gives. A file of the working folder becomes a link to it.

    Returns:
        The namespace at the end.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for name, provided in page.given.items():
        value = provide(provided)
        if name.isidentifier():
            names[name] = value
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(value)
    torch.manual_seed(0)
    with contextlib.chdir(folder):
        for block in page.of("python"):
            exec(compile(_with_shapes_checked(page, block), str(page.path), "exec"), names)
    return names


def _with_shapes_checked(page: Page, block: Block) -> str:
    """The code, at its place in the page, with a check behind each assignment whose comment states a shape.

    Shapes are read on pages that give the letters values.
    """
    lines = block.text.splitlines()
    if any(re.search(r"^B, N, D = ", other.text, re.MULTILINE) for other in page.of("python")):
        for at, line in enumerate(lines):
            if (stated := _SHAPE.match(line)) and _is_code(stated[3]):
                code = line.rpartition("  # ")[0]
                lines[at] = f"{code}; assert {stated[2]}.shape == {stated[3]}, {stated[2]}.shape"
    return "\n" * (block.line - 1) + "\n".join(lines) + "\n"


def stated_shapes(page: Page) -> int:
    """How many shapes a page states that are checked."""
    return sum(bool(_SHAPE.match(line)) for block in page.of("python") for line in block.text.splitlines())


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
