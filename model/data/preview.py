"""A sample as training sees it: its text with the learned tokens marked, its pictures, its counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from model.data.dataset import LlavaDataset
from model.data.images import image_size
from model.instruction import instruction_texts
from model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from rich.console import RenderableType

Part = Literal["prompt", "learned", "image"]

#: How the parts look on a terminal, and the marks around learned text where there are no colours.
_STYLES: dict[Part, str] = {"prompt": "", "learned": "bold green", "image": "dim cyan"}
LEARNED_MARKS = ("⟦", "⟧")


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one part; ``text`` is empty for an image."""

    part: Part
    num_tokens: int
    text: str


@dataclass(frozen=True)
class Preview:
    """What a run takes of one sample.

    ``pictures`` holds the width and height of each picture and the images of the tower that it becomes;
    ``instruction`` the texts whose mean embedding weighs the layers, empty without pictures; ``tokens_cut`` the tokens that did
    not fit into ``max_length``.
    """

    sample_id: str
    segments: tuple[Segment, ...]
    pictures: tuple[tuple[int, int, int], ...]
    instruction: tuple[str, ...]
    tokens_cut: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model gets."""
        return sum(segment.num_tokens for segment in self.segments)

    def count(self, part: Part) -> int:
        """Tokens of a part."""
        return sum(segment.num_tokens for segment in self.segments if segment.part == part)

    def render(self, *, marks: bool = False) -> RenderableType:
        """For a terminal.

        Args:
            marks: put learned text between ``⟦`` and ``⟧`` as well, for where there are no colours.
        """
        from rich.console import Group
        from rich.rule import Rule
        from rich.text import Text

        text = Text()
        for segment in self.segments:
            content = f"<image> x {segment.num_tokens:,}" if segment.part == "image" else segment.text
            if marks and segment.part == "learned":
                content = content.join(LEARNED_MARKS)
            text.append(content, _STYLES[segment.part])
        return Group(Rule(Text(f"sample {self.sample_id}")), text, Text("\n".join(self._facts()), "dim"))

    def _facts(self) -> Iterator[str]:
        yield ""
        learned = self.count("learned")
        cut = f"; {self.tokens_cut:,} more were cut off" if self.tokens_cut else ""
        yield (
            f"{self.num_tokens:,} tokens: {learned:,} learned ({100 * learned / max(self.num_tokens, 1):.0f} %), "
            f"{self.count('image'):,} of images, {self.count('prompt'):,} of the prompt{cut}"
        )
        for width, height, views in self.pictures:
            tiles = f": the whole and {views - 1} tiles" if views > 1 else ""
            yield f"picture of {width} x {height} pixels{tiles}"
        if self.instruction:
            yield "instruction: " + " / ".join(repr(text) for text in self.instruction)


def preview(data: LlavaDataset, index: int, policy: Any = "mean_of_turns") -> Preview:
    """What a run takes of a sample of its dataset.

    Args:
        data: the dataset, without skipping: a sample that cannot be used is to be seen, not passed over.
        index: of the sample.
        policy: which turns stand for the instruction.

    Raises:
        ValueError: the sample cannot be used; the message names it.
    """
    sample = data.samples[index]
    item = data[index]
    input_ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
    whole = data.tokenized(sample)
    counts = data.view_counts(sample)
    sizes = [image_size(path, data.max_image_pixels) for path in sample.images]
    return Preview(
        sample.id,
        tuple(_segments(data.processor, input_ids, labels)),
        tuple((*size, views) for size, views in zip(sizes, counts, strict=True)),
        tuple(instruction_texts(sample.human_turns, policy)) if sample.images else (),
        len(whole["input_ids"]) - len(input_ids),
    )


def _segments(processor: Any, input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[Segment]:
    def part(position: int) -> Part:
        if input_ids[position] == processor.image_token_id:
            return "image"
        return "prompt" if labels[position] == IGNORE_INDEX else "learned"

    def text_until(end: int) -> str:
        return processor.tokenizer.decode(input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before, end = "", 0
    for kind, positions in groupby(range(len(input_ids)), part):
        length = len(list(positions))
        end += length
        # By differences: a tokenizer that is asked for a part alone drops the blank before it.
        text = text_until(end)
        yield Segment(kind, length, "" if kind == "image" else text[len(before) :])
        before = text
