"""Sums over the steps between two log entries. Legend: B samples, T tokens, I images, K groups."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.configuration import IgvaLlavaConfig
from model.loss import IGNORE_INDEX, negative_entropy
from model.training.callbacks import FUSION_WEIGHT_KEY


class StepMeter:
    """Counts tokens and samples and watches the fusion; sums stay on the device, so that no step waits for them.

    Args:
        config: the model's.
        device: where the model runs.
    """

    def __init__(self, config: IgvaLlavaConfig, device: torch.device) -> None:
        self._device = device
        self._legacy_double_softmax = config.legacy_double_softmax
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, samples
        num_groups = config.fusion["num_groups"] if config.fusion.get("stage") == 2 else 0
        # Images, sum of each weight, balance: of full size on every rank, also on one that sees no image.
        self._fusion = torch.zeros(num_groups + 2, device=device) if num_groups else None
        self._start = time.perf_counter()
        self._paused = 0.0

    @torch.no_grad()
    def update(self, inputs: dict[str, Any], fusion_weights: Tensor | None, num_items: Tensor | int | None) -> None:
        """Take in one forward pass.

        Args:
            inputs: the batch, with ``attention_mask`` and ``labels`` (B, T), and ``image_to_sample`` (I,) where it has
                images.
            fusion_weights: (I, K), or None.
            num_items: labels of the whole optimizer step, all ranks together; None: of this batch.
        """
        num_samples = torch.tensor(len(inputs["labels"]), device=self._device)
        self._counts += torch.stack([inputs["attention_mask"].sum(), num_samples])
        if self._fusion is None or fusion_weights is None:
            return
        labels_per_sample = inputs["labels"][:, 1:].ne(IGNORE_INDEX).sum(1)
        if num_items is None:
            num_items = labels_per_sample.sum()
        image_to_sample = inputs["image_to_sample"]
        images_per_sample = torch.bincount(image_to_sample, minlength=len(labels_per_sample))
        # The share of an image in the loss's balance term: loss - weight * balance is then exactly the cross-entropy.
        share = labels_per_sample[image_to_sample] / images_per_sample[image_to_sample]
        balance = negative_entropy(fusion_weights, legacy_double_softmax=self._legacy_double_softmax)
        num_images = torch.tensor([float(len(fusion_weights))], device=self._device)
        self._fusion += torch.cat([num_images, fusion_weights.float().sum(0), ((balance * share).sum() / num_items)[None]])

    def pause(self, seconds: float) -> None:
        """Leave seconds out of the speed, such as those of an evaluation."""
        self._paused += seconds

    def read(self, num_steps: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means and speeds of the ``num_steps`` optimizer steps counted; a collective, which all ranks must call."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        logs: dict[str, float] = {}
        if self._fusion is not None:
            num_images, *weights, balance = sum_over_ranks(self._fusion).tolist()
            if num_images:
                logs["balance"] = balance / num_steps
                logs |= {f"{FUSION_WEIGHT_KEY}{k}": weight / num_images for k, weight in enumerate(weights, start=1)}
        tokens, samples = sum_over_ranks(self._counts).tolist()
        logs["tokens_per_second"] = tokens / seconds
        logs["samples_per_second"] = samples / seconds
        logs["peak_memory_gb"] = peak_memory_gb()
        return logs


def peak_memory_gb() -> float:
    """Most memory held so far, in 10^9 bytes: on the GPU where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
