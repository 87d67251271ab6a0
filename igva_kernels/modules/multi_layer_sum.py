"""RAEv2's encoder output: a mean of normalised layers, and the mean patch of the last."""

from __future__ import annotations

from torch import Tensor, nn

from igva_kernels.functional import HiddenStates, Implementation, fuse
from igva_kernels.plan import FusionPlan
from igva_kernels.slots import Mean


class MultiLayerSum(nn.Module):
    """``x[n] = mean_l LN(h_l[n]) + mean_m LN(h_last[m])``, LN without parameters (arXiv 2605.18324).

    nanovisionx/RAEv2, ``src/encoders/vision_encoder.py``, ``DINOv3MultiLayerSimpleAddEncoder``. It has no parameters. The first
    mean is one fused pass; for the second the last layer is read once more.

    Args:
        plan: :meth:`FusionPlan.mean_of_normalised_layers`.
        impl: as for :func:`igva_kernels.fuse`.

    Raises:
        ValueError: the plan is not one mean of normalised layers.
    """

    def __init__(self, plan: FusionPlan, *, impl: Implementation = "auto") -> None:
        super().__init__()
        slot = plan.slots[0]
        if plan.num_slots != 1 or not isinstance(slot, Mean) or slot.norm is None:
            raise ValueError(
                f"plan must hold one mean of normalised layers, got {plan.slots}; use FusionPlan.mean_of_normalised_layers(...)"
            )
        self.plan, self.impl = plan, impl
        # Of each normalised patch of the last layer: the same norm as in the mean, over a group of one.
        self._last = FusionPlan(plan.num_layers, (Mean(slot.layers[-1:], slot.norm),))

    def forward(self, hidden_states: HiddenStates, *, num_prefix_tokens: int) -> Tensor:
        """(B, N, D) in the dtype of the hidden states; arguments and Raises as for :func:`igva_kernels.fuse`."""
        mean = fuse(hidden_states, self.plan, num_prefix_tokens=num_prefix_tokens, impl=self.impl)
        last = fuse(hidden_states, self._last, num_prefix_tokens=num_prefix_tokens, impl=self.impl)
        return mean + last.mean(dim=1, keepdim=True)
