"""The official IGVA code (YiZheng-zy/IGVA at 6fa8d84, ``llava/model/llava_arch.py``): its ``encode_images``."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from igva_kernels.functional import Implementation, fuse, group_summaries
from igva_kernels.patching.report import Replacement
from igva_kernels.plan import FusionPlan

NUM_PREFIX_TOKENS = 1
"""The official code takes row 0 as the CLS token and the others as patches."""


def igva(module: Any, impl: Implementation) -> Replacement | str | None:
    """A model whose config names ``vit_aggregate_groups`` and whose ``encode_images`` mixes them."""
    if not (callable(getattr(module, "encode_images", None)) and callable(getattr(module, "get_model", None))):
        return None
    config = getattr(module.get_model(), "config", None)
    if not hasattr(config, "vit_aggregate_groups"):
        return None
    tower = module.get_model().get_vision_tower()
    model_type = str(getattr(getattr(tower, "config", None), "model_type", ""))
    if model_type.startswith("siglip"):
        return "a SigLIP tower has no CLS token: the official code drops its first patch and takes it for the CLS token"

    def encode_images(self: Any, images: Tensor, sentence_embeds: Tensor | None = None) -> Tensor:
        """(B, N, H) image features of (B, 3, height, width); ``sentence_embeds`` (B, E), or (1, E) for all images."""
        model = self.get_model()
        settings = model.config
        hidden_states = model.get_vision_tower()(images)
        plan = _plan(len(hidden_states) - 1, _hashable(settings.vit_aggregate_groups), settings.vit_base_layer)
        if settings.aggregate_by_average:
            weights = hidden_states[-1].new_full((plan.num_groups,), 1.0 / plan.num_groups, dtype=torch.float32)
        else:
            if sentence_embeds is None:
                raise ValueError(
                    "sentence_embeds is None, but this model weighs its layers by the instruction; pass (B, E), one sentence "
                    "embedding an image, or set config.aggregate_by_average for equal weights"
                )
            summaries = group_summaries(hidden_states, plan, num_prefix_tokens=NUM_PREFIX_TOKENS, impl=impl)
            sentences = sentence_embeds.to(device=summaries.device, dtype=summaries.dtype)
            sentences = sentences.expand(summaries.shape[0], -1)  # tiles and images of one request share their sentence
            weights = model.vision_aggregator(cls_features=summaries, sentence_embed=sentences)
        fused = fuse(hidden_states, plan, weights, num_prefix_tokens=NUM_PREFIX_TOKENS, impl=impl)
        return model.mm_projector(fused)

    return Replacement("encode_images", encode_images, "group means, weighted sum and concatenation in one pass (base first)")


def _hashable(groups: str | Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    parsed = ast.literal_eval(groups) if isinstance(groups, str) else groups
    return tuple(tuple(group) for group in parsed)


@lru_cache(maxsize=64)
def _plan(num_layers: int, groups: tuple[tuple[int, ...], ...], base: int) -> FusionPlan:
    return FusionPlan.igva(num_layers, groups=groups, base=base, order="base_first")
