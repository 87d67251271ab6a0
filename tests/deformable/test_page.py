"""docs/deformable-attention.md: what its table names exists."""

import re
from pathlib import Path

import igva_kernels
from igva_kernels import modules

PAGE = (Path(__file__).parents[2] / "docs" / "deformable-attention.md").read_text(encoding="utf-8")


def test_what_stands_in_the_table_exists():
    (table,) = re.findall(r"\| your call \| ours \|\n(.*?)\n\n", PAGE, re.DOTALL)
    replacements = [row.split(" | ")[1] for row in table.splitlines()[1:]]
    named = [re.match(r"`([\w.]+)", text)[1].removeprefix("igva_kernels.modules.") for text in replacements]
    assert len(named) == 5
    assert not [name for name in named if not (hasattr(igva_kernels, name) or hasattr(modules, name))]
