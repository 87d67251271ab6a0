"""Which samples share an optimizer step, and which of them share a forward pass.

A step takes ``batch_size`` samples over all ranks, and its loss is a sum over their tokens (:mod:`model.loss`). So how the
samples of a step are dealt to ranks and forward passes changes speed and memory, never the gradient: a packed run takes the
very steps of a padded one.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch.utils.data import Sampler

Grouping = Literal["modality_length", "random"]


class StepBatchSampler(Sampler[list[int]]):
    """Deals the samples of each optimizer step to the forward passes of this rank; every rank gets equally many.

    *Which samples share a step* is drawn from ``seed`` and the epoch. ``random``: any. ``modality_length``: samples with
    images and samples without them do not share a step (LLaVA's ``group_by_modality_length``; haotian-liu/LLaVA:
    llava/train/llava_trainer.py), so that no step waits for few long rows; what is left over of both, below two steps, is
    mixed.

    *Which samples share a forward pass*, in a step of n samples and m passes over all ranks:

    * padded, ``random``: n / m in the order drawn. ``modality_length``: n / m neighbours in the order of length.
    * packed: longest first, each sample goes to the pass with the fewest tokens so far, the first of several. A pass is one
      row then. As a rule, rows differ by less than one sample; none is longer than ``micro_batch_size`` of the longest sample,
      the size of a padded pass (a row gets more samples than that only while it is the shortest, and some other has fewer).

    Passes are sorted by their tokens, so that ranks which wait for one another have like work. The last step of an epoch
    takes what is left; where that is less than a sample for each rank, samples of the first step fill it up.

    Args:
        lengths: tokens of each sample, or an estimate: it balances, and need not be right.
        has_images: whether each sample has images.
        batch_size: samples of a step, over all ranks; a multiple of ``micro_batch_size`` x ``num_ranks``.
        micro_batch_size: samples in one forward pass on one rank, or on average where they are packed.
        packing: whether the samples of a pass share one row.
        grouping: see above.
        seed: of the order.
        rank, num_ranks: this process among all.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_images: Sequence[bool],
        *,
        batch_size: int,
        micro_batch_size: int,
        packing: bool = False,
        grouping: Grouping = "modality_length",
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if grouping not in get_args(Grouping):
            raise ValueError(f"grouping must be one of {', '.join(get_args(Grouping))}, got {grouping!r}")
        if not lengths or len(lengths) != len(has_images):
            raise ValueError(f"lengths and has_images must have one entry a sample, got {len(lengths)} and {len(has_images)}")
        if batch_size % (micro_batch_size * num_ranks):
            raise ValueError(f"batch_size {batch_size} is no multiple of {micro_batch_size} samples x {num_ranks} ranks")
        self._lengths = lengths
        self._has_images = torch.tensor(has_images, dtype=torch.bool)
        self._step_size = batch_size
        self._pass_size = micro_batch_size
        self._packing = packing
        self._grouping = grouping
        self._seed = seed
        self._epoch = 0
        self._rank, self._num_ranks = rank, num_ranks

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Forward passes of this rank in an epoch."""
        whole, rest = divmod(len(self._lengths), self._step_size)
        return (whole * self._num_passes(self._step_size) + self._num_passes(rest)) // self._num_ranks

    def __iter__(self) -> Iterator[list[int]]:
        first: list[int] = []
        for step in self._steps():
            first = first or step
            num_passes = self._num_passes(len(step))
            if len(step) < num_passes:
                step = step + [first[index % len(first)] for index in range(num_passes - len(step))]
            yield from self._passes(step, num_passes)[self._rank :: self._num_ranks]

    def _num_passes(self, num_samples: int) -> int:
        """Forward passes over all ranks for the samples of a step."""
        return self._num_ranks * math.ceil(num_samples / (self._pass_size * self._num_ranks))

    def _steps(self) -> list[list[int]]:
        """Samples of each step; all have ``batch_size`` samples but the last."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator)
        groups = [order]
        if self._grouping == "modality_length":
            groups = [order[self._has_images[order]], order[~self._has_images[order]]]
        size = self._step_size
        whole = [group[: len(group) // size * size] for group in groups]
        rest = torch.cat([group[len(used) :] for group, used in zip(groups, whole, strict=True)])
        steps = [step for used in whole for step in used.split(size) if len(step)]
        steps += [step for step in rest.split(size) if len(step)]
        last = [steps.pop()] if len(steps[-1]) < size else []
        shuffled = [steps[index] for index in torch.randperm(len(steps), generator=generator).tolist()]
        return [step.tolist() for step in shuffled + last]

    def _passes(self, step: list[int], num_passes: int) -> list[list[int]]:
        by_length = sorted(step, key=lambda sample: -self._lengths[sample])
        if self._packing:
            return self._packed(by_length, num_passes)
        samples = step if self._grouping == "random" else by_length
        bounds = [index * len(samples) // num_passes for index in range(num_passes + 1)]
        return [samples[start:end] for start, end in itertools.pairwise(bounds)]

    def _packed(self, by_length: list[int], num_passes: int) -> list[list[int]]:
        emptiest = [(0, index) for index in range(num_passes)]  # a heap of (tokens, pass)
        passes: list[list[int]] = [[] for _ in range(num_passes)]
        for sample in by_length:
            tokens, index = heapq.heappop(emptiest)
            passes[index].append(sample)
            heapq.heappush(emptiest, (tokens + self._lengths[sample], index))
        tokens_of = {index: tokens for tokens, index in emptiest}
        return [passes[index] for index in sorted(range(num_passes), key=lambda index: (-tokens_of[index], index))]


class HeldOutBatchSampler(Sampler[list[int]]):
    """Deals held-out samples to this rank in their order; every rank gets equally many batches.

    Ranks that share sharded weights must run equally many forward passes. What ranks lack is filled up with batches that have
    come before; of this rank's batches the first :attr:`num_counted` count, the rest are fillers.

    Args:
        num_samples: held-out samples.
        batch_size: samples in one forward pass on one rank.
        rank, num_ranks: this process among all.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        batches = [list(range(start, min(start + batch_size, num_samples))) for start in range(0, num_samples, batch_size)]
        own = batches[rank::num_ranks]
        self.num_counted = len(own)
        self._batches = own + batches[: math.ceil(len(batches) / num_ranks) - len(own)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
