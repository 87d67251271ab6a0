"""docs/plans.md: every list of slots that it states is true, no preset is missing, and each plan has its picture and formula.

That its blocks run and give the shapes that they state is shown in tests/documents.
"""

import re
from pathlib import Path

import pytest

import igva_kernels
from igva_kernels import FusionPlan, Layer, Mean
from igva_kernels.presets import Presets

PATH = Path(__file__).parents[2] / "docs" / "plans.md"
PAGE = PATH.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(FusionPlan\..*?)` \| `(\[.*?\])` \| (\S+) \|", PAGE, flags=re.MULTILINE)
PICTURES = re.findall(r"^!\[(FusionPlan\..*)\]\((\S+?)(?: \"(.*)\")?\)$", PAGE, flags=re.MULTILINE)


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


def test_every_plan_of_the_table_has_a_picture():
    assert sorted(code for code, _, _ in PICTURES) == sorted(code for code, _, _ in ROWS)
    for code, file, title in PICTURES:
        assert (PATH.parent / file).is_file(), file
        assert bool(title) == bool(eval(code, vars(igva_kernels)).num_groups), code


def test_every_picture_stands_below_a_formula():
    sections = re.split(r"^#+ ", PAGE, flags=re.MULTILINE)
    shown = [section for section in sections if "](pictures/plans/" in section]
    assert len(shown) >= len({code.split(".")[1].split("(")[0] for code, _, _ in ROWS}) - 1  # llava and layers share one
    assert not [section.splitlines()[0] for section in shown if "```math" not in section.partition("](pictures/plans/")[0]]
