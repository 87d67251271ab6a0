"""``igva ask``: one question about one picture, several, or none."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from model.cli.loading_arguments import add_loading_arguments, given_loading_arguments
from model.explain_report import group_name

_EXAMPLES = """examples:
  igva ask runs/mine picture.jpg "What colour is the car?"
  igva ask runs/mine before.jpg after.jpg "What is the difference?"
  igva ask runs/mine picture.jpg "Describe the picture." --max_new_tokens=200
  igva ask runs/mine "What is a vision tower?"
"""

_BAR_WIDTH = 30


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    # Intermixed: else an option before the pictures would leave them none.
    arguments = parser.parse_intermixed_args(argv)
    if os.path.isfile(arguments.question):  # pathlib's raises where a question is longer than names of files may be
        parser.error(f'{arguments.question} is a file, and no question came after it: igva ask CHECKPOINT PICTURE "QUESTION"')
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")

    # After the arguments are known to be right: these imports take seconds.
    from model.answering import Conversation
    from model.cli.checkpoint import load_checkpoint
    from model.data.images import open_image

    images = [open_image(path) for path in arguments.images]
    checkpoint = load_checkpoint(arguments.checkpoint, **given_loading_arguments(arguments))
    conversation = Conversation(checkpoint.model, checkpoint.processor)
    for image in images:
        conversation.show(image)
    answer, weights = conversation.ask(arguments.question, max_new_tokens=arguments.max_new_tokens)
    print(answer)
    if weights is not None:
        heading = f"mean over {len(images)} pictures:\n" if len(images) > 1 else ""
        print("\n" + heading + weight_bars(weights, checkpoint.model.config.fusion_plan(stage=2).groups))
    elif not images:
        print("\n(no picture was shown: the vision tower did not run, and its layers have no weights)")
    else:
        print("\n(this checkpoint mixes its layers in a fixed way: there are no weights to show)")
    return 0


def weight_bars(weights: Sequence[float], groups: Sequence[Sequence[int]]) -> str:
    """One line for each layer group: its layers, its weight, and a bar as long as the weight."""
    lines = []
    for weight, group in zip(weights, groups, strict=True):
        lines.append(f"layers {group_name(group):>7}  {weight:.2f}  {'█' * round(_BAR_WIDTH * weight)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva ask",
        usage="igva ask [options] CHECKPOINT [PICTURE ...] QUESTION",
        description="Answer a question about a picture, several or none, and show how much each group of the vision tower's "
        "layers weighed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("images", metavar="PICTURE", nargs="*", help="picture file; several are shown in this order")
    parser.add_argument("question", metavar="QUESTION", help="about all pictures; without a picture, about anything")
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="longest answer in tokens (default: %(default)s)"
    )
    add_loading_arguments(parser)
    return parser
