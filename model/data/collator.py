"""From samples to one batch. Legend: B samples, T tokens of the longest, I images of all samples, E sentence width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from model.loss import IGNORE_INDEX


class ImageTextCollator:
    """Pads on the right and puts the images of all samples in one row.

    Args:
        pad_token_id: token for the padding; masked in attention and loss.

    A batch holds ``input_ids``, ``attention_mask``, ``labels`` (B, T) and, if it has images, ``pixel_values``
    (I, 3, H, W), ``image_to_sample`` (I,) int64, and ``instruction_embeds`` (I, E) float32 if the samples have them: one row
    per image, not per sample, so that a model needs no rule for samples with several images, or none.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
        }
        owners = [index for index, sample in enumerate(samples) if sample.get("pixel_values") is not None]
        if not owners:
            return batch
        batch["pixel_values"] = torch.cat([samples[index]["pixel_values"] for index in owners])
        counts = torch.tensor([len(samples[index]["pixel_values"]) for index in owners])
        batch["image_to_sample"] = torch.tensor(owners).repeat_interleave(counts)
        if samples[owners[0]].get("instruction_embeds") is not None:
            batch["instruction_embeds"] = torch.cat([samples[index]["instruction_embeds"] for index in owners])
        return batch
