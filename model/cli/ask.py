"""``igva ask``: one question about one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_EXAMPLES = """examples:
  igva ask runs/mine picture.jpg "What colour is the car?"
  igva ask runs/mine picture.jpg "Describe the picture." --max_new_tokens=200
"""

_BAR_WIDTH = 30


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from model.answering import Conversation
    from model.cli.checkpoint import load_checkpoint
    from model.data.images import open_image

    image = open_image(arguments.image)
    checkpoint = load_checkpoint(arguments.checkpoint)
    conversation = Conversation(checkpoint.model, checkpoint.processor)
    conversation.show(image)
    answer, weights = conversation.ask(arguments.question, max_new_tokens=arguments.max_new_tokens)
    print(answer)
    if weights is None:
        print("\n(this checkpoint mixes its layers in a fixed way: there are no weights to show)")
    else:
        print("\n" + weight_bars(weights, checkpoint.model.config.fusion_plan(stage=2).groups))
    return 0


def weight_bars(weights: Sequence[float], groups: Sequence[Sequence[int]]) -> str:
    """One line for each layer group: its layers, its weight, and a bar as long as the weight."""
    lines = []
    for weight, group in zip(weights, groups, strict=True):
        layers = f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0])
        lines.append(f"layers {layers:>7}  {weight:.2f}  {'█' * round(_BAR_WIDTH * weight)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva ask",
        description="Answer a question about a picture, and show how much each group of the vision tower's layers weighed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens (default: %(default)s)")
    return parser
