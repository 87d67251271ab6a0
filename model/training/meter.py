"""Sums over the steps between two log entries. Legend: I images, K groups."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.configuration import IgvaLlavaConfig
from model.loss import IGNORE_INDEX
from model.training.callbacks import FUSION_WEIGHT_KEY
from model.training.flops import StepFlops

#: What is counted of the batches, as integers; "ranks" counts this process.
_COUNTS = ("tokens", "positions", "samples", "squared_lengths", "labels", "images", "wait_us", "ranks")


class StepMeter:
    """Counts tokens, padding and samples and watches the fusion; sums stay on the device, so that no step waits for them.

    Args:
        config: the model's.
        device: where the model runs.
        flops: operations of the model.
        peak_flops: what each card could do in a second; None where that is not known, and on a CPU.
    """

    def __init__(
        self, config: IgvaLlavaConfig, device: torch.device, flops: StepFlops, peak_flops: float | None = None
    ) -> None:
        self._device = device
        self._flops, self._peak_flops = flops, peak_flops
        self._counts = torch.zeros(len(_COUNTS), dtype=torch.int64, device=device)
        self._waited = 0.0
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
        boundaries = inputs.get("cu_seq_lens_q")
        if boundaries is not None:
            lengths = boundaries.diff()
        elif attention_mask is not None:
            lengths = attention_mask.sum(dim=1)
        else:
            lengths = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        lengths = lengths.to(self._device, torch.int64)
        labels = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(self._device)
        image_count = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
        known = torch.tensor([input_ids.numel(), len(lengths), image_count], device=self._device)
        of_lengths = torch.stack([lengths.sum(), lengths.square().sum(), labels])
        # In the order of _COUNTS; the last two are known when the counts are read.
        self._counts[:6] += torch.stack([of_lengths[0], known[0], known[1], of_lengths[1], of_lengths[2], known[2]])
        if self._fusion is None or fusion_weights is None or balance is None:
            return
        num_images = torch.tensor([float(len(fusion_weights))], device=self._device)
        self._fusion += torch.cat([num_images, fusion_weights.float().sum(0), balance.float()[None]])

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches themselves; the time until each of them is there counts as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield batch

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
        self._counts[6:] = torch.tensor([round(1e6 * self._waited), 1])
        count = dict(zip(_COUNTS, sum_over_ranks(self._counts).tolist(), strict=True))
        if count["positions"]:
            logs["padding_share"] = 1 - count["tokens"] / count["positions"]
        logs["data_wait_share"] = min(count["wait_us"] / 1e6 / count["ranks"] / seconds, 1.0)
        logs["tokens_per_second"] = count["tokens"] / seconds
        logs["samples_per_second"] = count["samples"] / seconds
        total = self._flops.total(count["tokens"], count["squared_lengths"], count["labels"], count["images"])
        # Of each card, not of all together: that is what a card's peak can be held against.
        logs["tflops_per_second"] = total / seconds / count["ranks"] / 1e12
        if self._peak_flops is not None:
            logs["share_of_peak"] = 1e12 * logs["tflops_per_second"] / self._peak_flops
        logs["peak_memory_gb"] = peak_memory_gb()
        return logs


def peak_memory_gb() -> float:
    """Most memory held so far, in 10^9 bytes: on the GPU where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
