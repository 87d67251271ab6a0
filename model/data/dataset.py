"""Samples to tensors, one by one and only when asked for.

Legend: T tokens, I images of the sample, E sentence width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.data.images import make_square, open_image
from model.data.llava_json import Sample
from model.instruction import InstructionPolicy, embed_instructions
from model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from model.processing import IgvaLlavaProcessor


class LlavaDataset(Dataset):
    """Training tensors of checked samples.

    Args:
        samples: from :func:`model.data.llava_json.read_llava_json`.
        processor: tokenizes and normalises.
        embed: from n sentences to (n, E) float32, such as ``InstructionCache.get``; None gives samples without
            ``instruction_embeds``.
        aspect_ratio: ``pad``, ``crop`` or ``stretch``, see :func:`model.data.images.make_square`.
        instruction_policy: which human turns stand for the instruction, see
            :func:`model.instruction.instruction_texts`.
        chat_template: name of a template of the processor, or a template; None: the default.
        max_length: longest sequence; a longer one is cut at its end.

    An item holds ``input_ids`` and ``labels`` (T,) int64 and, where the sample has images, ``pixel_values``
    (I, 3, H, W) float32 and ``instruction_embeds`` (I, E) float32.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: IgvaLlavaProcessor,
        *,
        embed: Callable[[list[str]], Tensor] | None = None,
        aspect_ratio: str = "pad",
        instruction_policy: InstructionPolicy = "mean_of_turns",
        chat_template: str | None = None,
        max_length: int = 2048,
    ) -> None:
        self.samples = samples
        self.processor = processor
        self.embed = embed
        self.aspect_ratio = aspect_ratio
        self.instruction_policy: InstructionPolicy = instruction_policy
        self.chat_template = chat_template
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The tensors of one sample.

        Raises:
            ValueError: a damaged or vanished image, a sample without a token to learn, or one whose image would be cut;
                the message names the sample.
        """
        sample = self.samples[index]
        try:
            item = self._tokens(sample)
            if sample.images:
                item["pixel_values"] = load_images(sample, self.processor, self.aspect_ratio)
                if self.embed is not None:
                    embed = embed_instructions([sample.human_turns], self.embed, self.instruction_policy)
                    item["instruction_embeds"] = embed.expand(len(sample.images), -1)
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {sample.id}: {error}") from error
        return item

    def estimated_lengths(self) -> list[int]:
        """About how many tokens each sample has, without tokenizing it: four bytes of text a token, and its image tokens."""
        tokens_per_image = self.processor.num_image_tokens()
        return [
            min(
                self.max_length,
                1 + sum(len(turn.text.encode()) for turn in sample.turns) // 4 + len(sample.images) * tokens_per_image,
            )
            for sample in self.samples
        ]

    def _tokens(self, sample: Sample) -> dict[str, Tensor]:
        encoded = self.processor.tokenize_conversation(messages(sample), chat_template=self.chat_template)
        input_ids = torch.tensor(encoded["input_ids"])
        learned = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        self._check_image_tokens(sample, input_ids)
        if len(input_ids) > self.max_length:
            input_ids, learned = self._cut(input_ids, learned)
        # The first token is never predicted, so a label on it would count for nothing.
        if not learned[1:].any():
            raise ValueError("no token to learn: the answers are empty, or lie behind max_length")
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~learned, IGNORE_INDEX)}

    def _check_image_tokens(self, sample: Sample, input_ids: Tensor) -> None:
        expected = len(sample.images) * self.processor.num_image_tokens()
        found = int((input_ids == self.processor.image_token_id).sum())
        if found != expected:
            raise ValueError(
                f"{found} image tokens in the text, but {len(sample.images)} images need {expected}; does the chat "
                "template drop turns that hold images?"
            )

    def _cut(self, input_ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        if (input_ids[self.max_length :] == self.processor.image_token_id).any():
            raise ValueError(f"its {len(input_ids)} tokens exceed max_length {self.max_length}, which would cut an image")
        return input_ids[: self.max_length], learned[: self.max_length]


def messages(sample: Sample) -> list[dict[str, str]]:
    """The turns in the form of chat templates, ``<image>`` placeholders in the text."""
    return [{"role": turn.role, "content": turn.text} for turn in sample.turns]


def load_images(sample: Sample, processor: IgvaLlavaProcessor, aspect_ratio: str) -> Tensor:
    """The pictures of a sample as (I, 3, H, W) float32."""
    mean = processor.image_processor.image_mean
    pictures = [make_square(open_image(path), aspect_ratio, mean) for path in sample.images]
    return processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
