"""``igva plan``: how much memory a recipe's step takes, and the largest batch that a card holds, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.cli.train import SHIPPED_RECIPES, find_recipe, shipped_recipes

if TYPE_CHECKING:
    from rich.table import Table

    from model.training.memory_plan import MemoryPlan

_EXAMPLES = """examples:
  igva plan igva-7b-stage1
  igva plan igva-7b-stage2-lora --length=1200 --micro_batch_size=16
  igva plan recipe.yaml --card="RTX 4090" --card=100       (100: a card of 100 GB)
  igva plan igva-7b-stage2 --picture=plan.png              which layers are mixed how

Every field of the recipe is a flag --key=value that overrides it. Memory is that of one device that holds the whole
model; ZeRO and FSDP2 divide weights, gradients and optimizer states by the number of devices.
"""


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)

    from model.training.recipe import load_recipe

    recipe = load_recipe(find_recipe(arguments.recipe), overrides)

    # After the recipe is known to be right: these imports take seconds.
    from rich.console import Console

    from model.training.memory_plan import CARDS_GB, plan_memory
    from model.training.parts import architecture_of_run

    cards = {name: _gigabytes(name, CARDS_GB) for name in arguments.card or CARDS_GB}
    config, _ = architecture_of_run(recipe.model, {name: SHIPPED_RECIPES / f"{name}.yaml" for name in shipped_recipes()})
    if arguments.picture:
        from model.plan_picture import save_fusion_picture

        save_fusion_picture(config, arguments.picture, stage=recipe.stage)
    bf16 = recipe.precision != "fp32"
    plan = plan_memory(recipe, config, length=arguments.length, labels=arguments.labels, bf16=bf16)
    console = Console()
    console.print(parts_table(plan))
    console.print(cards_table(plan, cards))
    if arguments.picture:
        console.print(f"picture of the fusion in {arguments.picture}", highlight=False)
    return 0


def parts_table(plan: MemoryPlan) -> Table:
    """Memory of the recipe's step by part."""
    from rich.table import Table

    step = plan.step
    table = Table(title=f"One step on one device: {step.batch} samples of {step.length} tokens, one image each")
    table.add_column("")
    table.add_column("GB", justify="right")
    for name, size in step.weights.items():
        table.add_row(f"weights of the {name}", f"{size / 1e9:.2f}")
    table.add_row("gradients", f"{step.gradients / 1e9:.2f}")
    table.add_row("AdamW's states", f"{step.optimizer / 1e9:.2f}")
    table.add_row("activations and temporaries, at most", f"{step.activations / 1e9:.2f}", end_section=True)
    table.add_row("together", f"{step.total / 1e9:.2f}", end_section=True)
    table.add_row("each further sample", f"{plan.per_sample / 1e9:.3f}")
    return table


def cards_table(plan: MemoryPlan, cards: dict[str, float]) -> Table:
    """The largest batch of one forward pass by card."""
    from rich.table import Table

    from model.training.memory_plan import RESERVE

    table = Table(title=f"Largest micro_batch_size, with {RESERVE:.0%} of the card left free")
    table.add_column("card")
    table.add_column("GB", justify="right")
    table.add_column("samples", justify="right")
    for name, gigabytes in cards.items():
        samples = plan.largest_batch(gigabytes)
        table.add_row(name, f"{gigabytes:g}", f"{samples:,}" if samples else "none fits")
    return table


def _gigabytes(card: str, known: dict[str, float]) -> float:
    if card in known:
        return known[card]
    try:
        gigabytes = float(card)
    except ValueError:
        raise ValueError(f"no card {card!r}; there are {', '.join(known)}, or give its memory in GB") from None
    if not gigabytes > 0:
        raise ValueError(f"--card must be above 0 GB, got {card}")
    return gigabytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva plan",
        description="Memory of a recipe's step by part, and the largest batch that a card holds. Nothing is loaded: the step "
        "runs on tensors without contents, which takes up to a minute for a 7B model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a recipe that is shipped")
    parser.add_argument("--length", type=int, help="tokens of a sample, image tokens included (default: an image and 128)")
    parser.add_argument("--labels", type=int, help="tokens of a sample that are learned (default: a quarter of its text)")
    parser.add_argument("--card", action="append", help="card by name, or its memory in GB; may be repeated (default: all)")
    parser.add_argument("--picture", help="draw the fusion's plan into this file, .png or .svg; needs matplotlib")
    return parser
