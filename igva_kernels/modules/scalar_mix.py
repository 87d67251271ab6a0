"""ELMo's scalar mix and SUPERB's featurizer: one learned weight a layer, the same for all inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from igva_kernels.functional import HiddenStates, Implementation, fuse
from igva_kernels.output_norm import OutputNorm
from igva_kernels.plan import FusionPlan


class ScalarMix(nn.Module):
    """``scale * sum_k softmax(weights)_k * h_k`` (arXiv 1802.05365), without the scale in SUPERB (arXiv 2105.01051).

    A state dict of s3prl's ``Featurizer`` (``weights``) loads as it is with ``scale=False``; one of AllenNLP's ``ScalarMix``
    (``scalar_parameters.0`` ..., ``gamma``) goes through :func:`convert_allennlp_scalar_mix`.

    Args:
        plan: :meth:`FusionPlan.scalar_mix`, or any other with weighted groups.
        scale: whether to learn AllenNLP's ``gamma``.
        impl: as for :func:`igva_kernels.fuse`.

    Attributes:
        weights: (K,) in float32, the logits, zero at first: the plain mean.
        scale: (1,) in float32, 1 at first; None without.

    Raises:
        ValueError: the plan has no weighted groups.
    """

    scale: nn.Parameter | None

    def __init__(self, plan: FusionPlan, *, scale: bool = True, impl: Implementation = "auto") -> None:
        super().__init__()
        if not plan.num_groups:
            raise ValueError("plan has no weighted groups, so there are no weights to learn; use FusionPlan.scalar_mix(...)")
        self.plan, self.impl = plan, impl
        self.weights = nn.Parameter(torch.zeros(plan.num_groups))
        self.register_parameter("scale", nn.Parameter(torch.ones(1)) if scale else None)

    def reset_parameters(self) -> None:
        """The plain mean."""
        nn.init.zeros_(self.weights)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def mixing_weights(self) -> Tensor:
        """The (K,) factors of the layers: a softmax in float32 at least, times the scale."""
        weights = self.weights.to(torch.promote_types(self.weights.dtype, torch.float32)).softmax(0)
        return weights if self.scale is None else weights * self.scale

    def forward(self, hidden_states: HiddenStates, *, num_prefix_tokens: int, output_norm: OutputNorm | None = None) -> Tensor:
        """(B, N, S*D) in the dtype of the hidden states; arguments and Raises as for :func:`igva_kernels.fuse`."""
        return fuse(
            hidden_states,
            self.plan,
            self.mixing_weights(),
            num_prefix_tokens=num_prefix_tokens,
            output_norm=output_norm,
            impl=self.impl,
        )


def convert_allennlp_scalar_mix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AllenNLP's names to those of :class:`ScalarMix`.

    Args:
        state_dict: ``scalar_parameters.{k}`` of shape (1,) for each layer and ``gamma`` of shape (1,)
            (``allennlp/modules/scalar_mix.py``), nothing else.

    Returns:
        ``weights`` (K,) and ``scale`` (1,).

    Raises:
        ValueError: other names than these; the text lists both.
    """
    num_layers = len(state_dict) - 1
    names = [f"scalar_parameters.{k}" for k in range(num_layers)]
    if not names or set(state_dict) != {*names, "gamma"}:
        raise ValueError(
            f"state_dict has the entries {sorted(state_dict)}, expected scalar_parameters.0, scalar_parameters.1, ... "
            "and gamma; strip the prefix of the module first"
        )
    return {"weights": torch.cat([state_dict[name] for name in names]), "scale": state_dict["gamma"]}
