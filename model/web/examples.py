"""Pictures and questions on board of the web page, made from the quickstart's sprites.

Their compositions (thing, background, number) are among those that the quickstart holds out of training, so that what a
model of the quickstart says about them is no memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from model.quickstart.pictures import BACKGROUNDS, SPRITES, compose

COMPOSITIONS = (("tiger", "yellow", 3), ("penguin", "blue", 1), ("rocket", "gray", 3))

QUESTIONS = ("What color is the background?", "What object is shown?", "How many objects are there?")


@dataclass(frozen=True)
class Example:
    """A picture and something to ask about it."""

    picture: Path
    question: str


def make_examples(folder: Path) -> list[Example]:
    """Write the pictures into an existing folder, and pair each with two questions."""
    examples = []
    for index, (thing, background, number) in enumerate(COMPOSITIONS):
        with Image.open(SPRITES / f"{thing}.png") as sprite:
            picture = compose(sprite.convert("RGBA"), BACKGROUNDS[background], number, random.Random(index))
        path = folder / f"{thing}.png"
        picture.save(path)
        examples += [Example(path, QUESTIONS[(index + turn) % len(QUESTIONS)]) for turn in range(2)]
    return examples
