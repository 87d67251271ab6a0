"""``igva recipe``: the recipes that are shipped, and one with the documentation of every field as comments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from model.cli.train import SHIPPED_RECIPES, find_recipe, shipped_recipes
from model.training.recipe import load_recipe
from model.training.recipe_fields import annotated_yaml, reference_page, summary

_EXAMPLES = """examples:
  igva recipe
  igva recipe igva-7b-stage2 > mine.yaml
  igva recipe igva-7b-stage2 --data.path=data.json --learning_rate=1e-5 > mine.yaml
  igva train mine.yaml --dry_run
"""


def main(argv: Sequence[str]) -> int:
    arguments, overrides = _parser().parse_known_args(argv)
    paths = {name: SHIPPED_RECIPES / f"{name}.yaml" for name in shipped_recipes()}
    if arguments.page:
        print(reference_page(paths), end="")
    elif arguments.recipe is None:
        width = max(len(name) for name in paths)
        for name, path in paths.items():
            print(f"{name:{width}}  {summary(path)}")
    else:
        print(annotated_yaml(load_recipe(find_recipe(arguments.recipe), overrides)), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva recipe",
        description="List the recipes that are shipped; or print one, with --key=value applied, as YAML with every field under "
        "its documentation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or the name of a recipe that is shipped")
    parser.add_argument("--page", action="store_true", help="print the page docs/recipes.md, which documents all fields")
    return parser
