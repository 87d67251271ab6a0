"""Plans and inputs for the tests that need neither triton nor a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted

PLANS = {
    "igva": FusionPlan.igva(8, 4),
    "igva_base_first": FusionPlan.igva(8, 2, order="base_first"),
    "igva_average": FusionPlan.igva_average(8, 4),
    "llava": FusionPlan.llava(8),
    "one_layer": FusionPlan.igva(1, 1, base=0),
    "one_group": FusionPlan.igva(3, 1),
    "single_layer_groups": FusionPlan.igva(4, 4),
    "overlapping": FusionPlan(5, (Weighted(((0, 1, 2), (2, 3, 4), (0, 4))), Mean((1, 2)), Layer(2), Layer(0))),
    "two_weighted": FusionPlan(4, (Weighted(((1,), (2, 3))), Layer(-1), Weighted(((1, 2), (3, 4))))),
    "repeated_group": FusionPlan(4, (Weighted(((1, 2), (3, 4))), Weighted(((1, 2), (3, 4))))),
    "same_group_plain_and_weighted": FusionPlan(4, (Mean((1, 2)), Weighted(((1, 2), (3,))))),
    "plus": FusionPlan(4, (Weighted(((1,), (2, 3)), plus=2), Layer(4))),
    "norms": FusionPlan(
        5,
        (
            Weighted(((1, 2), (2, 3, 4)), plus=2, norm=Norm("layer")),
            Mean((2, 4), norm=Norm("rms", eps=1e-6)),
            Weighted(((1, 2),)),  # the same layers as a normalised group, as they are
            Layer(2),
        ),
    ),
}


@pytest.fixture(params=PLANS, ids=str)
def plan(request: pytest.FixtureRequest) -> FusionPlan:
    return PLANS[request.param]


@pytest.fixture
def make_states() -> Callable[..., list[Tensor]]:
    """L + 1 random hidden states (B, T, D)."""

    def make(plan: FusionPlan, batch: int = 3, tokens: int = 7, width: int = 6, dtype=torch.float64) -> list[Tensor]:
        return [torch.randn(batch, tokens, width, dtype=torch.float64).to(dtype) for _ in range(plan.num_layers + 1)]

    return make


@pytest.fixture
def make_weights() -> Callable[..., Tensor | None]:
    """Random weights (K,), (B, K) or (B, N, K), or None where the plan takes none."""

    def make(plan: FusionPlan, shape: str = "per_image", batch: int = 3, patches: int = 6, dtype=torch.float64):
        if not plan.num_groups:
            return None
        leading = {"shared": (), "per_image": (batch,), "per_token": (batch, patches)}[shape]
        return torch.randn(*leading, plan.num_groups, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture
def formula() -> Callable[..., Tensor]:
    """The mix written once more as a dense coefficient tensor: out[b, n, s] = sum_l C[b, n, s, l] norm_s(h_l[b, n + P]).

    It shares no code with the package beyond the plan's slots.
    """

    def normalised(stacked: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return stacked
        if norm.kind == "layer":
            stacked = stacked - stacked.mean(-1, keepdim=True)
        return stacked / (stacked.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    def dense(hidden_states: list[Tensor], plan: FusionPlan, weights: Tensor | None, num_prefix_tokens: int) -> Tensor:
        stacked = torch.stack(hidden_states)[:, :, num_prefix_tokens:]  # (L+1, B, N, D)
        layers, batch, patches, _ = stacked.shape
        if weights is not None:
            weights = weights.to(stacked.dtype)
            while weights.ndim < 3:
                weights = weights.unsqueeze(-2) if weights.ndim == 2 else weights.unsqueeze(0)
            weights = weights.expand(batch, patches, -1)
        slots, column = [], 0
        for slot in plan.slots:
            coefficients = stacked.new_zeros(batch, patches, layers)
            members, plus = stacked, 0
            if isinstance(slot, Layer):
                coefficients[..., slot.index] = 1
            elif isinstance(slot, Mean):
                members = normalised(stacked, slot.norm)
                coefficients[..., list(slot.layers)] = 1 / len(slot.layers)
            else:
                members = normalised(stacked, slot.norm)
                plus = 0 if slot.plus is None else stacked[slot.plus]
                for group in slot.groups:
                    share = torch.zeros(layers, dtype=stacked.dtype)
                    share[list(group)] = 1 / len(group)
                    coefficients = coefficients + weights[..., column, None] * share
                    column += 1
            slots.append(torch.einsum("bnl,lbnd->bnd", coefficients, members) + plus)
        return torch.cat(slots, dim=-1)

    return dense
