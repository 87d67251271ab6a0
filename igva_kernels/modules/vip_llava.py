"""VipLlava's features: five layers beside each other and a LayerNorm over all of them."""

from __future__ import annotations

from torch import Tensor, nn

from igva_kernels.functional import HiddenStates, Implementation, fuse
from igva_kernels.modules.norms import normalised
from igva_kernels.plan import FusionPlan


class VipLlavaFusion(nn.Module):
    """``LayerNorm([h_-2, h_-5, h_-8, h_-11, h_6])`` over all S*D channels (arXiv 2312.00784).

    transformers, ``models/vipllava/modeling_vipllava.py``: there the norm is the first layer of the projector, and its
    parameters are ``multi_modal_projector.projector_layernorm.{weight,bias}``. It is fused with the concatenation, see
    :func:`igva_kernels.modules.norms.output_norm_of`.

    Args:
        plan: :meth:`FusionPlan.vip_llava`, or any other without weights whose slots are normalised together.
        vision_dim: D.
        eps: ``projector_layernorm_eps`` of the configuration.
        impl: as for :func:`igva_kernels.fuse`.
    """

    def __init__(self, plan: FusionPlan, vision_dim: int, *, eps: float = 1e-5, impl: Implementation = "auto") -> None:
        super().__init__()
        self.plan, self.impl = plan, impl
        self.projector_layernorm = nn.LayerNorm(plan.num_slots * vision_dim, eps=eps)

    def forward(self, hidden_states: HiddenStates, *, num_prefix_tokens: int) -> Tensor:
        """(B, N, S*D) in the dtype of the norm's parameters.

        Args:
            hidden_states, num_prefix_tokens: as for :func:`igva_kernels.fuse`.

        Raises:
            TypeError, ValueError: as :func:`igva_kernels.fuse`; also where ``vision_dim`` is not that of the hidden states.
        """
        return normalised(
            self.projector_layernorm,
            lambda norm: fuse(hidden_states, self.plan, num_prefix_tokens=num_prefix_tokens, output_norm=norm, impl=self.impl),
        )
