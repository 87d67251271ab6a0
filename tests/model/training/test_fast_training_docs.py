"""docs/fast-training.md: its settings are fields of a recipe, and its figures are those of the log."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from model.training.callbacks import status_text

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "fast-training.md").read_text(encoding="utf-8")


def test_its_settings_make_a_recipe(make_recipe):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    fields = yaml.safe_load(block)
    recipe = make_recipe(2, **fields)
    for name, value in fields.items():
        if name != "data":
            assert getattr(recipe, name) == value
    assert recipe.data.packing


def test_its_figures_are_those_of_the_status_line():
    names = ("loss", "tokens_per_second", "samples_per_second", "tflops_per_second", "padding_share", "data_wait_share")
    values = (5.2828, 1334, 27.1, 0.000484, 0.053, 0.22)
    line = status_text(dict(zip(names, values, strict=True)) | {"peak_memory_gb": 0.6})
    assert f"\nstep 3/3  {line}\n" in TEXT
