"""TGIF: the text weighs every layer of the tower, the sum joins the penultimate one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from igva_kernels.functional import HiddenStates, Implementation, fuse
from igva_kernels.modules.norms import normalised
from igva_kernels.plan import FusionPlan


class TGIFFusionOutput(NamedTuple):
    """Args:
    fused: (B, N, D) in the dtype of the norm's parameters.
    weights: (B, L), the weight of each layer for each image, in float32.
    """

    fused: Tensor
    weights: Tensor


class TGIFFusion(nn.Module):
    """``LayerNorm(h_-2 + sum_l w_l * h_l)``, ``w = softmax(Linear(ReLU(Linear(text))))`` (arXiv 2601.03100).

    Parameter names and maths are those of the official ``LayerSelector`` (Linchenchen/TGIF,
    ``llava/model/multimodal_projector/layer_selection.py``), so its state dict loads unchanged; in a checkpoint the entries
    stand under ``mm_projector.layer_selector.``, and the two Linears of the projector under ``mm_projector.mlp.``. The softmax
    runs in float32 at least. The LayerNorm is fused with the sum, see :func:`igva_kernels.modules.norms.output_norm_of`.

    Args:
        plan: :meth:`FusionPlan.tgif`.
        vision_dim: D.
        text_dim: width of the text vector, 4096 for a 7B model.
        router_dim: width of the router's middle layer.
        impl: as for :func:`igva_kernels.fuse`.

    Raises:
        ValueError: the plan has no weighted groups.
    """

    def __init__(
        self,
        plan: FusionPlan,
        vision_dim: int = 1024,
        text_dim: int = 4096,
        router_dim: int = 512,
        *,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        if not plan.num_groups:
            raise ValueError("plan has no weighted groups for the text to weigh; use FusionPlan.tgif(...)")
        self.plan, self.impl, self.text_dim = plan, impl, text_dim
        self.layer_weights_projection = nn.Sequential(
            nn.Linear(text_dim, router_dim), nn.ReLU(), nn.Linear(router_dim, plan.num_groups)
        )
        self.norm = nn.LayerNorm(plan.num_slots * vision_dim)

    def forward(self, hidden_states: HiddenStates, text_embeds: Tensor, *, num_prefix_tokens: int) -> TGIFFusionOutput:
        """Fuse.

        Args:
            hidden_states, num_prefix_tokens: as for :func:`igva_kernels.fuse`.
            text_embeds: (B, text_dim), one vector an image; cast to the dtype of the parameters. The official code takes the
                mean of the language model's token embeddings over the attention mask (``extract_text_embedding`` in
                ``llava_arch.py``), the whole prompt and, in training, the answer included; image placeholders count as token 0.

        Raises:
            ValueError: as :func:`igva_kernels.fuse`; ``text_embeds`` of another shape.
        """
        if text_embeds.ndim != 2 or text_embeds.shape[1] != self.text_dim:
            raise ValueError(
                f"text_embeds has the shape {tuple(text_embeds.shape)}, expected (B, {self.text_dim}): "
                "one vector for each image"
            )
        logits = self.layer_weights_projection(text_embeds.to(self.norm.weight.dtype))
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        return TGIFFusionOutput(self.mix(hidden_states, weights, num_prefix_tokens=num_prefix_tokens), weights)

    def mix(self, hidden_states: HiddenStates, weights: Tensor, *, num_prefix_tokens: int) -> Tensor:
        """The normalised sum (B, N, D) with given weights (B, L); arguments and Raises as for :func:`igva_kernels.fuse`."""
        return normalised(
            self.norm,
            lambda norm: fuse(
                hidden_states,
                self.plan,
                weights,
                num_prefix_tokens=num_prefix_tokens,
                output_norm=norm,
                impl=self.impl,
            ),
        )
