"""docs/plans.md: every block runs, every shape and every list of slots that it states is true, and no preset is missing."""

import re
from pathlib import Path

import pytest
import torch

import igva_kernels
from igva_kernels import FusionPlan, Layer, Mean
from igva_kernels.presets import Presets

PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ROWS = re.findall(r"^\| `(FusionPlan\..*?)` \| `(\[.*?\])` \| (\S+) \|", PAGE, flags=re.MULTILINE)
SHAPE = re.compile(r"^ *(\w+) = .*  # (\(B, .*\))$")


@pytest.fixture(scope="module")
def namespace():
    """The names that the first block defines, which all others use."""
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(BLOCKS[0], "docs/plans.md, block 1", "exec"), names)
    return names


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_blocks_run_and_give_the_shapes_that_they_state(number, namespace):
    names = dict(namespace)
    # Behind every line that states a shape, one that checks it: a name may be bound several times in a block.
    lines = []
    for line in BLOCKS[number].splitlines():
        lines.append(line)
        if stated := SHAPE.match(line):
            indent = " " * (len(line) - len(line.lstrip()))
            lines.append(f"{indent}assert {stated[1]}.shape == {stated[2]}, {stated[1]}.shape")
    exec(compile("\n".join(lines), f"docs/plans.md, block {number + 1}", "exec"), names)
    assert names["out"].isfinite().all()


def _span(layers):
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"h{layers[0]}..h{layers[-1]}"
    return ", ".join(f"h{layer}" for layer in layers)


def _normed(text, norm):
    return text if norm is None else {"layer": "LN", "rms": "RMS"}[norm.kind] + f"({text})"


def _written(slot):
    if isinstance(slot, Layer):
        return f"h{slot.index}"
    if isinstance(slot, Mean):
        return f"mean({_normed(_span(slot.layers), slot.norm)})"
    if all(len(group) == 1 for group in slot.groups):
        terms = "w·" + _normed(_span(tuple(layer for (layer,) in slot.groups)), slot.norm)
    else:
        terms = ", ".join(f"w·mean({_normed(_span(group), slot.norm)})" for group in slot.groups)
    return f"sum({terms})" + ("" if slot.plus is None else f" + h{slot.plus}")


@pytest.mark.parametrize(("code", "slots", "weights"), ROWS, ids=[code for code, _, _ in ROWS])
def test_the_table_says_what_the_plans_hold(code, slots, weights):
    plan = eval(code, vars(igva_kernels))
    assert slots == "[" + ", ".join(map(_written, plan.slots)) + "]"
    assert weights == (str(plan.num_groups) if plan.num_groups else "–")


def test_every_preset_is_in_the_table():
    presets = {name for name, value in vars(Presets).items() if isinstance(value, classmethod)}
    assert presets == {code.split(".")[1].split("(")[0] for code, _, _ in ROWS}
    assert all(hasattr(FusionPlan, name) for name in presets)


def test_there_are_shapes_to_check():
    assert sum(bool(SHAPE.match(line)) for block in BLOCKS for line in block.splitlines()) >= 20
