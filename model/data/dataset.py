"""Samples to tensors, one by one and only when asked for.

Legend: T tokens, I images of the tower for the sample (views of its pictures), E sentence width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.data.images import ANYRES_GRIDS, MAX_IMAGE_PIXELS, image_size, num_views, open_image, views
from model.data.llava_json import Sample
from model.data.problems import Problems, SampleError
from model.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from model.processing import IgvaLlavaProcessor


class LlavaDataset(Dataset):
    """Training tensors of checked samples.

    Args:
        samples: from :func:`model.data.llava_json.read_llava_json`.
        processor: tokenizes and normalises.
        embed: from the human turns of n conversations to (n, E) float32, such as
            :meth:`model.instruction_store.InstructionStore.embed`; None gives samples without ``instruction_embeds``.
        aspect_ratio: ``pad``, ``crop``, ``stretch`` or ``anyres``, see :func:`model.data.images.views`.
        anyres_grids: rows and columns that ``anyres`` may cut a picture into.
        chat_template: name of a template of the processor, or a template; None: the default.
        max_length: longest sequence; a longer one is cut at its end.
        max_image_pixels: larger pictures are problems.
        problems: what to do about samples that cannot be used; None raises.

    An item holds ``input_ids`` and ``labels`` (T,) int64 and, where the sample has images, ``pixel_values``
    (I, 3, H, W) float32 and ``instruction_embeds`` (1, E) float32, the one instruction of all of them. A sample that is skipped
    becomes an item of two tokens without labels: it adds nothing to loss and gradients, and the steps of the run stay as dealt.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: IgvaLlavaProcessor,
        *,
        embed: Callable[[Sequence[Sequence[str]]], Tensor] | None = None,
        aspect_ratio: str = "pad",
        anyres_grids: Sequence[Sequence[int]] = ANYRES_GRIDS,
        chat_template: str | None = None,
        max_length: int = 2048,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        problems: Problems | None = None,
    ) -> None:
        self.samples = samples
        self.processor = processor
        self.embed = embed
        self.aspect_ratio = aspect_ratio
        self.anyres_grids = anyres_grids
        self.chat_template = chat_template
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.problems = problems or Problems()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The tensors of one sample.

        Raises:
            ValueError: a damaged or vanished image, a sample without a token to learn, or one whose image would be cut, where
                such samples are not to be skipped; or labels that do not fit the text. The message names the sample.
        """
        sample = self.samples[index]
        try:
            return self._item(sample)
        except SampleError as error:
            self.problems.meet(error.of_sample(sample.id), file=sample.file, record=sample.record)
            return self._nothing()
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {sample.id}: {error}") from error

    def estimated_lengths(self) -> list[int]:
        """About how many tokens each sample has, without tokenizing it: four bytes of text a token, and its image tokens.

        A picture of ``anyres`` is taken to have the most tiles: reading all headers would take minutes.
        """
        tokens_per_image = self.processor.num_image_tokens()
        if self.aspect_ratio == "anyres":
            tokens_per_image *= 1 + max(rows * columns for rows, columns in self.anyres_grids)
        return [
            min(
                self.max_length,
                1 + sum(len(turn.text.encode()) for turn in sample.turns) // 4 + len(sample.images) * tokens_per_image,
            )
            for sample in self.samples
        ]

    def view_counts(self, sample: Sample) -> list[int]:
        """How many images of the tower each picture of a sample becomes."""
        return view_counts(sample, self.processor, self.aspect_ratio, self.anyres_grids, max_pixels=self.max_image_pixels)

    def tokenized(self, sample: Sample) -> dict[str, list[int]]:
        """The tokens of a sample before any are cut off; see ``tokenize_conversation`` of the processor."""
        return self.processor.tokenize_conversation(
            messages(sample), chat_template=self.chat_template, view_counts=self.view_counts(sample)
        )

    def _item(self, sample: Sample) -> dict[str, Any]:
        item: dict[str, Any] = self._tokens(sample)
        if sample.images:
            item["pixel_values"] = load_images(
                sample, self.processor, self.aspect_ratio, self.anyres_grids, max_pixels=self.max_image_pixels
            )
            if self.embed is not None:
                item["instruction_embeds"] = self.embed([sample.human_turns])
        return item

    def _nothing(self) -> dict[str, Tensor]:
        input_ids = torch.full((2,), self.processor.tokenizer.pad_token_id or 0)
        return {"input_ids": input_ids, "labels": torch.full((2,), IGNORE_INDEX)}

    def _tokens(self, sample: Sample) -> dict[str, Tensor]:
        counts = self.view_counts(sample)
        encoded = self.tokenized(sample)
        input_ids = torch.tensor(encoded["input_ids"])
        learned = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        self._check_image_tokens(sum(counts), input_ids)
        if len(input_ids) > self.max_length:
            input_ids, learned = self._cut(input_ids, learned)
        # The first token is never predicted, so a label on it would count for nothing.
        if not learned[1:].any():
            raise SampleError("not_learnable", "no token to learn: the answers are empty, or lie behind max_length")
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~learned, IGNORE_INDEX)}

    def _check_image_tokens(self, num_images: int, input_ids: Tensor) -> None:
        expected = num_images * self.processor.num_image_tokens()
        found = int((input_ids == self.processor.image_token_id).sum())
        if found != expected:
            raise ValueError(
                f"{found} image tokens in the text, but {num_images} images need {expected}; does the chat template drop turns "
                "that hold images?"
            )

    def _cut(self, input_ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
        if (input_ids[self.max_length :] == self.processor.image_token_id).any():
            raise SampleError(
                "not_learnable", f"its {len(input_ids)} tokens exceed max_length {self.max_length}, which would cut an image"
            )
        return input_ids[: self.max_length], learned[: self.max_length]


def messages(sample: Sample) -> list[dict[str, str]]:
    """The turns in the form of chat templates, ``<image>`` placeholders in the text."""
    return [{"role": turn.role, "content": turn.text} for turn in sample.turns]


def view_counts(
    sample: Sample,
    processor: IgvaLlavaProcessor,
    aspect_ratio: str,
    grids: Sequence[Sequence[int]] = ANYRES_GRIDS,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> list[int]:
    """How many images of the tower each picture of a sample becomes; with ``anyres``, their headers are read."""
    if aspect_ratio != "anyres":
        return [1] * len(sample.images)
    side = processor.output_size[0]
    return [num_views(image_size(path, max_pixels), aspect_ratio, side, grids) for path in sample.images]


def load_images(
    sample: Sample,
    processor: IgvaLlavaProcessor,
    aspect_ratio: str,
    grids: Sequence[Sequence[int]] = ANYRES_GRIDS,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Tensor:
    """The pictures of a sample as (I, 3, H, W) float32, each as :func:`model.data.images.views` says."""
    mean, side = processor.image_processor.image_mean, processor.output_size[0]
    pictures = (open_image(path, max_pixels) for path in sample.images)
    images = [view for picture in pictures for view in views(picture, aspect_ratio, mean, side, grids)]
    return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
