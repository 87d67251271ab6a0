"""IGVA as one module: hidden states and an instruction to the map that the projector takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.functional import HiddenStates, Implementation, Summary, fuse, group_summaries_and_states
from igva_kernels.modules.allocator import WeightAllocator
from igva_kernels.plan import FusionPlan


class IGVAFusionOutput(NamedTuple):
    """Args:
    fused: (B, N, S*D) in the dtype of the hidden states; S = 2 for IGVA.
    weights: (B, K), the weight of each group for each image, in float32.
    """

    fused: Tensor
    weights: Tensor


class IGVAFusion(nn.Module):
    """Instruction-guided fusion (arXiv 2501.08443): summaries → weights → one fused pass over the hidden states.

    Args:
        plan: a plan with weighted groups, :meth:`FusionPlan.igva`.
        allocator: computes the weights; its ``num_groups`` must be the plan's.
        summary: ``"cls"``, or ``"mean_patch"`` for towers without a CLS token.
        impl: as for :func:`igva_kernels.fuse`.

    Raises:
        ValueError: the allocator has another number of groups than the plan.
    """

    def __init__(
        self,
        plan: FusionPlan,
        allocator: WeightAllocator,
        *,
        summary: Summary = "cls",
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        if plan.num_groups != allocator.num_groups:
            raise ValueError(
                f"the plan has {plan.num_groups} weighted groups, the allocator gives {allocator.num_groups} weights; "
                "make both with the same num_groups"
            )
        self.plan, self.summary, self.impl = plan, summary, impl
        self.allocator = allocator

    def forward(
        self, hidden_states: HiddenStates, instruction_embeds: Tensor | None, *, num_prefix_tokens: int
    ) -> IGVAFusionOutput:
        """Fuse.

        Args:
            hidden_states: as for :func:`igva_kernels.fuse`.
            instruction_embeds: (B, E), one sentence embedding an image. None gives every group the weight 1/K, which for equal
                groups is the plain average of stage 1.
            num_prefix_tokens: P.

        Raises:
            ValueError: as :func:`igva_kernels.fuse`, :func:`igva_kernels.group_summaries` and :class:`WeightAllocator`.
        """
        summaries, hidden_states = group_summaries_and_states(
            hidden_states, self.plan, num_prefix_tokens=num_prefix_tokens, summary=self.summary, impl=self.impl
        )
        if instruction_embeds is None:
            num_groups = self.plan.num_groups
            weights = summaries.new_full((summaries.shape[0], num_groups), 1.0 / num_groups, dtype=_wide(summaries))
        else:
            weights = self.allocator(summaries, instruction_embeds)
        fused = fuse(hidden_states, self.plan, weights, num_prefix_tokens=num_prefix_tokens, impl=self.impl)
        return IGVAFusionOutput(fused, weights)

    def extra_repr(self) -> str:
        return f"num_layers={self.plan.num_layers}, num_groups={self.plan.num_groups}, summary={self.summary!r}"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
