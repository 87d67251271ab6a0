"""``igva train``: a training run from a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from model.training.recipe import TrainRecipe, load_recipe, recipe_parser

_EXAMPLES = """examples:
  igva train recipe.yaml
  igva train igva-7b-stage1 --data.path=blip_laion_cc_sbu_558k.json --data.image_folder=images
  igva train igva-7b-stage2 --model.checkpoint=runs/igva-7b-stage1 --language_model_training=lora --learning_rate=2e-4
  igva train recipe.yaml --smoke
  igva train igva-7b-stage2 --data.path=data.json --dry_run --num_processes=8
"""

SHIPPED_RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.help:
        parser.print_help()
        print(f"\nrecipes that are shipped: {', '.join(shipped_recipes())}\n")
        recipe_parser(with_help=True).print_help()
        return 0
    if arguments.recipe is None:
        parser.error(f"no recipe given; give a YAML file or one of {', '.join(shipped_recipes())}")
    if arguments.smoke:
        overrides.append("--smoke=true")
    recipe = load_recipe(find_recipe(arguments.recipe), overrides)
    if arguments.num_processes < 1:
        parser.error(f"--num_processes must be at least 1, got {arguments.num_processes}")
    if arguments.dry_run:
        return _dry_run(recipe, arguments.num_processes)

    from model.training.run import train  # after the recipe is known to be right: the import takes seconds

    train(recipe)
    return 0


def _dry_run(recipe: TrainRecipe, num_processes: int) -> int:
    from rich.console import Console

    from model.training.dry_run import dry_run

    found = dry_run(recipe, num_processes, {name: SHIPPED_RECIPES / f"{name}.yaml" for name in shipped_recipes()})
    console = Console()
    for table in found.tables():
        console.print(table)
    for text in found.notes:
        console.print(f"note: {text}", markup=False, highlight=False)
    for text in found.obstacles:
        console.print(f"obstacle: {text}", markup=False, highlight=False, style="bold red")
    if not found.obstacles:
        console.print("nothing found that would stop this run", highlight=False)
    return 1 if found.obstacles else 0


def shipped_recipes() -> list[str]:
    """Names of the recipes in ``model/recipes``."""
    return sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe that was given as a path or by its name.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in shipped_recipes():
        return SHIPPED_RECIPES / f"{name}.yaml"
    raise FileNotFoundError(f"no recipe file {name}, and none of that name is shipped ({', '.join(shipped_recipes())})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva train",
        description="Train a model from a recipe; every field of the recipe is a flag --key=value that overrides it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or the name of a recipe that is shipped")
    parser.add_argument("--smoke", action="store_true", help="the same run cut to ten steps, into OUTPUT_DIR-smoke")
    parser.add_argument("--dry_run", action="store_true", help="check the recipe and its data without loading a weight")
    parser.add_argument("--num_processes", type=int, default=1, help="with --dry_run: processes of the run (default: 1)")
    parser.add_argument("-h", "--help", action="store_true", help="show this and every field of a recipe")
    return parser
