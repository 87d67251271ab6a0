"""Sums over the steps between two log entries. Legend: I images, K groups."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.configuration import IgvaLlavaConfig
from model.training.callbacks import FUSION_WEIGHT_KEY


class StepMeter:
    """Counts tokens, padding and samples and watches the fusion; sums stay on the device, so that no step waits for them.

    Args:
        config: the model's.
        device: where the model runs.
    """

    def __init__(self, config: IgvaLlavaConfig, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # tokens, positions, samples
        num_groups = config.fusion["num_groups"] if config.fusion.get("stage") == 2 else 0
        # Images, sum of each weight, balance: of full size on every rank, also on one that sees no image.
        self._fusion = torch.zeros(num_groups + 2, device=device) if num_groups else None
        self._start = time.perf_counter()
        self._paused = 0.0

    @torch.no_grad()
    def update(self, inputs: dict[str, Any], fusion_weights: Tensor | None, balance: Tensor | None) -> None:
        """Take in one forward pass.

        Args:
            inputs: the batch, of :class:`model.data.collator.ImageTextCollator` or ``PackingCollator``.
            fusion_weights: (I, K), or None.
            balance: the balance term of the pass as its share of the step's, a scalar; None where there are no weights.
        """
        input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
        positions = torch.tensor(input_ids.numel(), device=self._device)
        tokens = positions if attention_mask is None else attention_mask.sum()
        packed = inputs.get("cu_seq_lens_q")
        num_samples = len(input_ids) if packed is None else len(packed) - 1
        self._counts += torch.stack([tokens, positions, torch.tensor(num_samples, device=self._device)])
        if self._fusion is None or fusion_weights is None or balance is None:
            return
        num_images = torch.tensor([float(len(fusion_weights))], device=self._device)
        self._fusion += torch.cat([num_images, fusion_weights.float().sum(0), balance.float()[None]])

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
        tokens, positions, samples = sum_over_ranks(self._counts).tolist()
        if positions:
            logs["padding_share"] = 1 - tokens / positions
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
