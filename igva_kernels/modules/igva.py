"""IGVA as one module: hidden states and an instruction to the map that the projector takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.functional import (
    GroupMeans,
    HiddenStates,
    Implementation,
    Summary,
    fuse,
    group_summaries_and_states,
    mix,
)
from igva_kernels.modules.allocator import WeightAllocator
from igva_kernels.output_norm import OutputNorm
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
        self,
        hidden_states: HiddenStates | GroupMeans,
        instruction_embeds: Tensor | None,
        *,
        num_prefix_tokens: int | None = None,
        image_to_sentence: Tensor | None = None,
        output_norm: OutputNorm | None = None,
    ) -> IGVAFusionOutput:
        """Fuse the hidden states of a tower, or what a streaming tower has kept of them.

        Args:
            hidden_states: as for :func:`igva_kernels.fuse`; or the group means of this module's plan and kind of summary, from
                :func:`igva_kernels.towers.stream_group_means` or :func:`igva_kernels.reduce_groups`. With means in float32 the
                result is the same.
            instruction_embeds: (B, E), one sentence embedding an image, or with ``image_to_sentence`` (sentences, E). None
                gives every group the weight 1/K, which for equal groups is the plain average of stage 1.
            num_prefix_tokens: P; needed for hidden states, not read for group means, which have no prefix.
            image_to_sentence: (B,) in int64, the row of ``instruction_embeds`` that each image belongs to: the tiles of one
                picture, or several pictures of one question, share a sentence. Each is weighed by its own summaries.
            output_norm: a norm that follows, as for :func:`igva_kernels.fuse`: that of a projector, say.

        Raises:
            TypeError: ``image_to_sentence`` is not int64.
            ValueError: as :func:`igva_kernels.fuse`, :func:`igva_kernels.group_summaries`, :func:`igva_kernels.mix` and
                :class:`WeightAllocator`; hidden states without ``num_prefix_tokens``; a map without sentences, or of another
                shape than (B,).
            IndexError: a row that is not there (on a GPU: an assertion on the device).
        """
        if isinstance(hidden_states, GroupMeans):
            if hidden_states.summaries is None:
                raise ValueError("group_means has no summaries: it is of a plan without weighted groups; reduce with this plan")
            weights = self._weights(hidden_states.summaries, instruction_embeds, image_to_sentence)
            return IGVAFusionOutput(mix(hidden_states, self.plan, weights, output_norm=output_norm, impl=self.impl), weights)
        if num_prefix_tokens is None:
            raise ValueError(
                "num_prefix_tokens is None: hidden states need the number of CLS and register tokens before the patches; "
                "igva_kernels.towers.num_prefix_tokens_of(tower.config) tells it"
            )
        summaries, hidden_states = group_summaries_and_states(
            hidden_states, self.plan, num_prefix_tokens=num_prefix_tokens, summary=self.summary, impl=self.impl
        )
        weights = self._weights(summaries, instruction_embeds, image_to_sentence)
        fused = fuse(
            hidden_states,
            self.plan,
            weights,
            num_prefix_tokens=num_prefix_tokens,
            output_norm=output_norm,
            impl=self.impl,
        )
        return IGVAFusionOutput(fused, weights)

    def mix(
        self, group_means: GroupMeans, instruction_embeds: Tensor | None, *, image_to_sentence: Tensor | None = None
    ) -> IGVAFusionOutput:
        """:meth:`forward` for group means, hooks of the module included."""
        return self(group_means, instruction_embeds, image_to_sentence=image_to_sentence)

    def _weights(self, summaries: Tensor, instruction_embeds: Tensor | None, image_to_sentence: Tensor | None) -> Tensor:
        if image_to_sentence is not None:
            instruction_embeds = sentence_of_each_image(instruction_embeds, image_to_sentence, summaries.shape[0])
        if instruction_embeds is None:
            num_groups = self.plan.num_groups
            return summaries.new_full((summaries.shape[0], num_groups), 1.0 / num_groups, dtype=_wide(summaries))
        return self.allocator(summaries, instruction_embeds)

    def extra_repr(self) -> str:
        return f"num_layers={self.plan.num_layers}, num_groups={self.plan.num_groups}, summary={self.summary!r}"


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def sentence_of_each_image(instruction_embeds: Tensor | None, image_to_sentence: Tensor, num_images: int) -> Tensor:
    """(sentences, E) to (B, E)."""
    if instruction_embeds is None:
        raise ValueError("image_to_sentence given without instruction_embeds: there are no sentences to point at; pass both")
    if image_to_sentence.dtype != torch.int64:
        raise TypeError(f"image_to_sentence must be int64, got {image_to_sentence.dtype}; convert it with .long()")
    if tuple(image_to_sentence.shape) != (num_images,):
        raise ValueError(
            f"image_to_sentence has the shape {tuple(image_to_sentence.shape)}, expected (B,) = ({num_images},): "
            "the row of instruction_embeds for each image or tile"
        )
    return instruction_embeds.index_select(0, image_to_sentence)
