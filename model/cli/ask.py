"""``igva ask``: one question about one picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from model.modeling import IgvaLlavaForConditionalGeneration
    from model.processing import IgvaLlavaProcessor

_EXAMPLES = """examples:
  igva ask runs/mine picture.jpg "What colour is the car?"
  igva ask runs/mine picture.jpg "Describe the picture." --max_new_tokens=200
"""

_BAR_WIDTH = 30


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from model.cli.checkpoint import load_checkpoint
    from model.data.images import open_image

    image = open_image(arguments.image)
    checkpoint = load_checkpoint(arguments.checkpoint)
    answer, weights = ask(checkpoint.model, checkpoint.processor, image, arguments.question, arguments.max_new_tokens)
    print(answer)
    if weights is None:
        print("\n(this checkpoint mixes its layers in a fixed way: there are no weights to show)")
    else:
        print("\n" + weight_bars(weights, checkpoint.model.config.fusion_plan(stage=2).groups))
    return 0


def ask(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    image: Image,
    question: str,
    max_new_tokens: int = 64,
) -> tuple[str, list[float] | None]:
    """Answer a question about a picture, which is prepared as in training.

    Raises:
        ValueError: an empty question, or one that is too long for the language model.

    Returns:
        The answer, and the weight of each layer group, of several tiles their mean (None where the model computes none).
    """
    from model.data.images import views
    from model.data.llava_json import IMAGE_PLACEHOLDER, Turn
    from model.evaluation import generate_answers, render_prompt
    from model.instruction import embed_instructions

    if not question.strip():
        raise ValueError("the question is empty; ask something about the picture")
    mean, side = processor.image_processor.image_mean, processor.output_size[0]
    images = views(image, processor.aspect_ratio, mean, side, processor.anyres_grids)
    pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    embeds = None
    if model.reads_instruction and processor.sentence_encoder is not None:
        embeds = embed_instructions([[question]], processor.encode_instructions, processor.instruction_policy)
        embeds = embeds.expand(len(images), -1)
    prompt = render_prompt(processor, [Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}")])
    answers, weights = generate_answers(
        model, processor, [prompt], pixel_values, embeds, max_new_tokens=max_new_tokens, view_counts=[len(images)]
    )
    return answers[0], None if weights is None else weights.mean(0).tolist()


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
