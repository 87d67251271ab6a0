"""From samples to one batch. Legend: B samples, T tokens of the longest, S tokens of all, I images of all, E sentence width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.loss import IGNORE_INDEX


class ImageTextCollator:
    """Pads on the right and puts the images of all samples in one row.

    Args:
        pad_token_id: token for the padding; masked in attention and loss.

    A batch holds ``input_ids``, ``attention_mask``, ``labels`` (B, T) and, if it has images, ``pixel_values``
    (I, 3, H, W), ``image_to_sample`` (I,) int64, and ``instruction_embeds`` (I, E) float32 if the samples have them, one row
    per image. Where a sample brings one row for several images (the tiles of a picture, the pictures of a question), there are
    as many rows as sentences, and ``image_to_sentence`` (I,) int64 names the row of each image.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX),
            **_images(samples),
        }


class PackingCollator:
    """Puts the samples end to end in one row, without padding; which samples share a row is the batch sampler's choice.

    A batch holds ``input_ids``, ``labels``, ``position_ids`` and ``sample_ids`` (1, S) int64: positions restart with each
    sample, and ``sample_ids`` numbers the samples from 0. The first token of a sample has no label, since nothing of the sample
    comes before it. For attention that takes boundaries, in the names of transformers' FlashAttentionKwargs: ``cu_seq_lens_q``
    and ``cu_seq_lens_k`` (B + 1,) int32, and ``max_length_q`` and ``max_length_k``, integers. There is no ``attention_mask``:
    every position is real. Images as in :class:`ImageTextCollator`; ``image_to_sample`` counts samples, not rows.
    """

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        ends = lengths.cumsum(0)
        labels = torch.cat([sample["labels"] for sample in samples])
        labels[ends - lengths] = IGNORE_INDEX
        boundaries = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        return {
            "input_ids": torch.cat([sample["input_ids"] for sample in samples])[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
            "sample_ids": torch.arange(len(samples)).repeat_interleave(lengths)[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            **_images(samples),
        }


def _images(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    owners = [index for index, sample in enumerate(samples) if sample.get("pixel_values") is not None]
    if not owners:
        return {}
    counts = torch.tensor([len(samples[index]["pixel_values"]) for index in owners])
    images = {
        "pixel_values": torch.cat([samples[index]["pixel_values"] for index in owners]),
        "image_to_sample": torch.tensor(owners).repeat_interleave(counts),
    }
    if samples[owners[0]].get("instruction_embeds") is None:
        return images
    sentences = [samples[index]["instruction_embeds"] for index in owners]
    images["instruction_embeds"] = torch.cat(sentences)
    rows = torch.tensor([len(sentence) for sentence in sentences])
    if not torch.equal(rows, counts):
        starts = (rows.cumsum(0) - rows).tolist()
        images["image_to_sentence"] = torch.cat(
            [
                torch.full((count,), start) if row == 1 else torch.arange(start, start + row)
                for start, row, count in zip(starts, rows.tolist(), counts.tolist(), strict=True)
            ]
        )
    return images
