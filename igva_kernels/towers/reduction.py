"""Group means from hidden states that come one by one, in two orders with bitwise the same means.

* ``"group"`` keeps the members of a group and reduces them in one pass when the last one is there.
* ``"layer"`` adds each hidden state to a float32 accumulator as soon as it is there, while it may still lie in the GPU's L2
  cache, and drops it at once.

Bytes on paper for one group of 6 layers, with M the bytes of a 16-bit map and float32 means of 2 M:

    order    hidden states              accumulator                                     sum     kept while it is open
    group    6 M read                   in registers; 2 M written                       8 M     6 M
    layer    6 M read, from L2 if       2 M written, then 5 times 2 M read and 2 M      32 M    2 M
             they outlive the block     written; scaled in place, 2 M read and written

A whole block runs between two additions. It brings 25 MB of weights (12·D² for CLIP-L) and maps of some 10 M, so that in the 50
MB of an H100's L2 the accumulator outlives it for one image of CLIP-L/336 (M = 1.2 MB), and not for four (M = 4.7 MB).
Where it does not, the layer order moves 26 M a group even if every hidden state comes from L2. IGVA's 4 groups, at 3.0 TB/s:

    images    M           group, 32 M         layer, 104 M to 128 M
    1         1.2 MB      38 MB, 13 µs        mostly L2
    4         4.7 MB      151 MB, 50 µs       491 to 604 MB, 164 to 201 µs
    16        18.9 MB     604 MB, 201 µs      1963 to 2416 MB, 654 to 805 µs

On paper the group order wins in traffic, draws for a single image, and needs 4 launches for the means in place of 28; the layer
order wins in memory. Kept at most, against 25 M for the tuple of hidden states: 14 M in the group order with float32 means (4
means and one group, in which the base lies), 10 M with 16-bit means, 10 M in the layer order. ``"group"`` is the default.
Nothing of this has been measured: a card must decide (``python -m benchmarks --part vision``).

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · K weighted groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from igva_kernels.functional import GroupMeans, Implementation, Summary, group_summaries, reduce_groups
from igva_kernels.towers.schedule import GroupStep, Schedule

ReduceAt = Literal["group", "layer"]


class Reduction(ABC):
    """What both orders share. One object serves one run of the tower.

    Args:
        schedule: of the plan.
        num_prefix_tokens: P.
        summary: ``"cls"`` or ``"mean_patch"``.
        means_dtype: float32 (float64 for float64 hidden states), or None for the dtype of the hidden states.
        impl: as for :func:`igva_kernels.reduce_groups`.
    """

    def __init__(
        self,
        schedule: Schedule,
        num_prefix_tokens: int,
        summary: Summary,
        means_dtype: torch.dtype | None,
        impl: Implementation,
    ) -> None:
        self.schedule, self.num_prefix_tokens, self.summary, self.impl = schedule, num_prefix_tokens, summary, impl
        self.means_dtype = means_dtype
        self.states: list[Tensor | None] = [None] * (schedule.plan.num_layers + 1)
        self.means: dict[int, Tensor] = {}
        self.summaries: dict[int, Tensor] = {}
        self.copies: dict[int, Tensor] = {}
        self.dtype = torch.float32

    def take(self, layer: int, hidden: Tensor) -> None:
        """Hidden state ``layer``, (B, T, D); they come in ascending order."""
        self.dtype = hidden.dtype
        if layer in self.schedule.copies:
            self.copies[layer] = hidden[:, self.num_prefix_tokens :]
        self._reduce(layer, hidden)

    @abstractmethod
    def _reduce(self, layer: int, hidden: Tensor) -> None:
        """Bring ``hidden`` into the groups and summaries that it belongs to, and forget what is no longer needed."""

    def finish(self) -> GroupMeans:
        """The result, when the last hidden state of the schedule has been taken."""
        schedule = self.schedule
        summaries = None
        if schedule.summary_of_column:
            summaries = torch.cat([self.summaries[index] for index in schedule.summary_of_column], dim=1)
        means = tuple(self.means[group.index] for group in schedule.groups)
        return GroupMeans(means, tuple(self.copies[layer] for layer in schedule.copies), summaries, self.dtype)

    def _wide(self, hidden: Tensor) -> torch.dtype:
        return torch.promote_types(hidden.dtype, torch.float32)

    def _dtype_of_means(self, hidden: Tensor) -> torch.dtype:
        return hidden.dtype if self.means_dtype is None else self._wide(hidden)


class ReduceAtGroup(Reduction):
    """Keeps the members of the open groups."""

    def _reduce(self, layer: int, hidden: Tensor) -> None:
        schedule, states = self.schedule, self.states
        if schedule.released_after[layer] >= layer:
            states[layer] = hidden
        for group in schedule.groups:
            if group.members[-1] == layer:
                self.means[group.index] = reduce_groups(
                    states,
                    group.plan,
                    num_prefix_tokens=self.num_prefix_tokens,
                    means_dtype=self._dtype_of_means(hidden),
                    impl=self.impl,
                ).means[0]
        for index, step in enumerate(schedule.summaries):
            if step.members[-1] == layer:
                self.summaries[index] = group_summaries(
                    states, step.plan, num_prefix_tokens=self.num_prefix_tokens, summary=self.summary, impl=self.impl
                )
        for kept in range(layer + 1):
            if schedule.released_after[kept] <= layer:
                states[kept] = None


class ReduceAtLayer(Reduction):
    """Keeps one accumulator for each open group."""

    def _reduce(self, layer: int, hidden: Tensor) -> None:
        patches = hidden[:, self.num_prefix_tokens :]
        for group in self.schedule.groups:
            if layer in group.members:
                value = patches if group.norm is None else self._normalised(group, layer, hidden)
                self._add(self.means, group.index, group.members, layer, value, self._dtype_of_means(hidden))
        for index, step in enumerate(self.schedule.summaries):
            if layer in step.members:
                if self.summary == "cls":
                    row = hidden[:, :1]
                else:
                    row = patches.mean(dim=1, keepdim=True, dtype=self._wide(hidden))
                self._add(self.summaries, index, step.members, layer, row, hidden.dtype)

    def _normalised(self, group: GroupStep, layer: int, hidden: Tensor) -> Tensor:
        """(B, N, D), the patches with the group's norm, not rounded: the mean of the group if it had this one member."""
        self.states[layer] = hidden
        alone = reduce_groups(
            self.states,
            group.member_plan(layer),
            num_prefix_tokens=self.num_prefix_tokens,
            means_dtype=self._wide(hidden),
            impl=self.impl,
        )
        self.states[layer] = None
        return alone.means[0]

    def _add(
        self, sums: dict[int, Tensor], key: int, members: tuple[int, ...], layer: int, value: Tensor, dtype: torch.dtype
    ) -> None:
        """Add a member; with the last one the sum becomes the mean, rounded to ``dtype``."""
        if layer == members[0]:
            sums[key] = value.to(self._wide(value), copy=True, memory_format=torch.contiguous_format)
        else:
            sums[key].add_(value)
        if layer == members[-1]:
            total = sums[key]
            sums[key] = (total.mul_(1.0 / len(members)) if len(members) > 1 else total).to(dtype)


REDUCTIONS: dict[str, type[Reduction]] = {"group": ReduceAtGroup, "layer": ReduceAtLayer}
