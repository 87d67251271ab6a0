"""``igva preview``: samples as a recipe sees them, with the tokens that are learned in colour."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from model.cli.train import find_recipe
from model.training.recipe import load_recipe

_EXAMPLES = """examples:
  igva preview igva-7b-stage2 --data.path=data.json --model.checkpoint=runs/igva-7b-stage1
  igva preview data.json --recipe=igva-7b-stage2 --model.checkpoint=runs/igva-7b-stage1 --limit=20
  igva preview recipe.yaml --id=000000033471
  igva preview recipe.yaml --random=5 --data.aspect_ratio=anyres --data.max_length=4096
"""


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    recipe_name = arguments.source
    if arguments.source.endswith((".json", ".jsonl")):
        if arguments.recipe is None:
            parser.error("a data file needs --recipe, which says how samples are prepared")
        recipe_name = arguments.recipe
        overrides.append(f"--data.path={arguments.source}")
    elif arguments.recipe is not None:
        parser.error("give one recipe: RECIPE, or --recipe with a data file")
    for name in ("limit", "random"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    recipe = load_recipe(find_recipe(recipe_name), overrides)

    # After the arguments are known to be right: these imports take seconds.
    from rich.console import Console

    from model.data.preview import preview
    from model.training.data import plain_dataset
    from model.training.parts import load_processor

    data, problems = plain_dataset(recipe, load_processor(recipe.model))
    console = Console(force_terminal={"always": True, "never": False}.get(arguments.color), no_color=arguments.color == "never")
    marks = console.color_system is None or console.no_color
    failed = 0
    for index in _chosen([sample.id for sample in data.samples], arguments):
        try:
            console.print(preview(data, index, recipe.data.instruction_policy).render(marks=marks), soft_wrap=True)
        except ValueError as error:
            failed += 1
            console.print(f"{error}\n", style="bold red", markup=False)
    if problems.counts():
        console.print(problems.table())
    return 1 if failed or problems.counts() else 0


def _chosen(ids: Sequence[str], arguments: argparse.Namespace) -> list[int]:
    if arguments.id:
        unknown = [name for name in arguments.id if name not in ids]
        if unknown:
            raise ValueError(f"no sample {unknown[0]!r} among the {len(ids):,} that can be read")
        return [index for index, name in enumerate(ids) if name in arguments.id]
    if arguments.random is not None:
        return random.Random(arguments.seed).sample(range(len(ids)), min(arguments.random, len(ids)))
    return list(range(min(arguments.limit or 3, len(ids))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva preview",
        description="Show samples as a recipe sees them: the rendered text with the tokens that are learned in green (between "
        "⟦ and ⟧ where there are no colours), pictures, counts of tokens, the instruction. Every field of the recipe is a "
        "flag. No weights are loaded. Exits with 1 where a sample cannot be used, and counts such samples by kind.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RECIPE", help="recipe (YAML file or shipped name); or a data file with --recipe")
    parser.add_argument("--recipe", help="with a data file in place of RECIPE: the recipe")
    parser.add_argument("--id", action="append", help="show the samples of this id; may be repeated")
    parser.add_argument("--limit", type=int, help="how many samples to show, from the first (default: 3)")
    parser.add_argument("--random", type=int, metavar="N", help="show N samples drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s")
    return parser
