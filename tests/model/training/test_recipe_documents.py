"""The documentation of recipes has one source, and what is made from it is up to date."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from model.cli.main import main
from model.cli.train import find_recipe, shipped_recipes
from model.data.problems import MEANINGS
from model.training.recipe import ProblemKind, load_recipe
from model.training.recipe_fields import annotated_yaml, recipe_fields, reference_page

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_made_from_the_fields():
    page = reference_page({name: find_recipe(name) for name in shipped_recipes()})
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == page, "docs/recipes.md is stale: python -m model recipe --page > docs/recipes.md"


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_annotated_recipe_is_the_same_recipe(name, tmp_path):
    recipe = load_recipe(find_recipe(name))
    file = tmp_path / "annotated.yaml"
    file.write_text(annotated_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_every_field_stands_in_page_and_yaml_under_its_own_text():
    fields = recipe_fields()
    recipe = load_recipe(find_recipe("igva-7b-stage1"))
    keys = {item.name for item in dataclasses.fields(recipe)}
    assert {entry.key for entry in fields if "." not in entry.key} == keys - {"model", "data", "lora", "evaluation"}
    assert all(len(entry.text) > 15 and entry.type and entry.default for entry in fields)
    text = annotated_yaml(recipe)
    flat = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    for entry in fields:
        name = entry.key.rpartition(".")[2]
        assert f"{entry.text.replace('``', '`')} ({entry.type}; " in flat
        assert f"\n{'  ' if '.' in entry.key else ''}{name}: " in "\n" + text


def test_the_command_lists_and_prints_recipes(capsys, tmp_path):
    assert main(["recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes() and all(len(line.split()) > 3 for line in lines)
    assert main(["recipe", "igva-7b-stage2", "--learning_rate=3e-5", "--data.path=mine.json"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(file) == load_recipe(find_recipe("igva-7b-stage2"), ["--learning_rate=3e-5", "--data.path=mine.json"])
    assert main(["recipe", "igva-7b-stage2", "--learning_rat=3"]) == 1
    assert "learning_rat" in capsys.readouterr().err
    assert main(["recipe", "--page"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_the_page_of_data_names_every_kind_of_problem():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == list(MEANINGS) == list(get_args(ProblemKind))


def test_the_commands_of_the_page_of_data_are_read():
    from model.cli import embed, preview

    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    igva (.*)$", page, flags=re.MULTILINE)]
    assert {command[0] for command in commands} == {"embed", "preview", "train"}
    for name, *argv in commands:
        if name == "embed":
            embed._parser().parse_args(argv)
            continue
        flags = [flag for flag in argv if flag.startswith("--data.")]
        load_recipe(find_recipe("igva-7b-stage2"), flags)
        if name == "preview":
            preview._parser().parse_known_args(argv)
