"""igva_kernels against outputs and gradients of the released IGVA code (README.md here says how they were made).

Rule: in float64 the results agree to rounding. In float32 our largest error against the official float64 result is at
most twice the largest error of the official float32 result, plus a tolerance in units of ``eps * max|expected|``
(``ULPS_*`` below). Our sums run in another order (group sum, one scale, one mix), so that the two roundings are independent
draws of the same size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from igva_kernels import FusionPlan, fuse, group_summaries, mix, reduce_groups
from igva_kernels.modules import IGVAFusion, WeightAllocator

FOLDER = Path(__file__).parent
CASES = ("equal_groups", "clip_depth", "named_groups")
ORDERS = ("base_first", "fused_first")
IMPLS = ("reference", "torch")
DTYPES = (torch.float32, torch.float64)

ULPS_MIX = 4
"""A mean of up to eight maps and a sum of up to four: at most three more roundings than the official order."""

ULPS_DOT = 32
"""dL/dw sums N*D <= 288 products; a sum of M terms in another order moves by about sqrt(M) = 17 roundings of its size."""

ULPS_ALLOCATOR = 128
"""Four blocks of matrix products, softmax and two norms each, forward and backward: the official float32 gradients are up to 55
units from its float64 ones. A wrong term is thousands of units away."""

RTOL_FLOAT64 = 2e-13
"""About a thousand roundings of float64: any wrong term, index or order is far above it."""


@dataclass(frozen=True)
class Golden:
    """One file: its tensors, and the sizes from its metadata."""

    tensors: dict[str, Tensor]
    sizes: dict

    def inputs(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.tensors[f"input.{name}"].to(dtype, copy=True)

    def hidden_states(self, dtype: torch.dtype) -> list[Tensor]:
        """L + 1 separate leaves that record their gradient."""
        return [state.clone().requires_grad_() for state in self.inputs("hidden_states", dtype)]

    def plan(self, order: str) -> FusionPlan:
        sizes = self.sizes
        return FusionPlan.igva(
            sizes["num_layers"], len(sizes["groups"]), groups=sizes["groups"], base=sizes["base"], order=order
        )

    def allocator(self, dtype: torch.dtype) -> WeightAllocator:
        names = ("vision_dim", "text_dim", "hidden_dim", "num_blocks", "num_heads")
        allocator = WeightAllocator(num_groups=len(self.sizes["groups"]), **{name: self.sizes[name] for name in names})
        prefix = "input.aggregator."
        official = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        allocator.load_state_dict(official, strict=True)
        return allocator.to(dtype)

    def check(self, actual: Tensor, key: str, ulps: float) -> None:
        """``actual`` against the official result of the same dtype, by the rule of this module."""
        exact = self.tensors[f"float64.{key}"]
        assert actual.shape == exact.shape
        scale = exact.abs().max().item()
        error = (actual.detach().double() - exact).abs()
        if actual.dtype == torch.float64:
            allowed = RTOL_FLOAT64 * scale
        else:
            official_error = (self.tensors[f"float32.{key}"].double() - exact).abs().max().item()
            allowed = 2 * official_error + ulps * torch.finfo(torch.float32).eps * scale
        worst = error.max().item()
        assert worst <= allowed, f"{key}: error {worst:.3e} exceeds the allowance {allowed:.3e} (scale {scale:.3e})"


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(FOLDER / f"{request.param}.safetensors", framework="pt") as file:
        return Golden({key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["case"]))  # noqa: SIM118


def base_first(output: Tensor, order: str) -> Tensor:
    """An output in the channel order of the released code; applied to the cotangent it is its own inverse."""
    if order == "base_first":
        return output
    first, second = output.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def gradients(hidden_states: list[Tensor]) -> Tensor:
    return torch.stack([torch.zeros_like(h) if h.grad is None else h.grad for h in hidden_states])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
def test_fuse_with_given_weights(golden: Golden, order: str, impl: str, dtype: torch.dtype) -> None:
    hidden_states = golden.hidden_states(dtype)
    weights = golden.inputs("weights", dtype).requires_grad_()
    output = fuse(hidden_states, golden.plan(order), weights, num_prefix_tokens=1, impl=impl)
    output.backward(base_first(golden.inputs("cotangent", dtype), order))

    golden.check(base_first(output, order), "given.output", ULPS_MIX)
    golden.check(weights.grad, "given.grad.weights", ULPS_DOT)
    golden.check(gradients(hidden_states), "given.grad.hidden_states", ULPS_MIX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_fuse_with_a_frozen_tower_gives_the_same_weight_gradient(golden: Golden, impl: str, dtype: torch.dtype) -> None:
    hidden_states = list(golden.inputs("hidden_states", dtype))
    weights = golden.inputs("weights", dtype).requires_grad_()
    output = fuse(hidden_states, golden.plan("base_first"), weights, num_prefix_tokens=1, impl=impl)
    output.backward(golden.inputs("cotangent", dtype))
    golden.check(output, "given.output", ULPS_MIX)
    golden.check(weights.grad, "given.grad.weights", ULPS_DOT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_then_mix(golden: Golden, order: str, dtype: torch.dtype) -> None:
    hidden_states = golden.hidden_states(dtype)
    weights = golden.inputs("weights", dtype).requires_grad_()
    plan = golden.plan(order)
    output = mix(reduce_groups(hidden_states, plan, num_prefix_tokens=1), plan, weights)
    output.backward(base_first(golden.inputs("cotangent", dtype), order))
    golden.check(base_first(output, order), "given.output", ULPS_MIX)
    golden.check(weights.grad, "given.grad.weights", ULPS_DOT)
    golden.check(gradients(hidden_states), "given.grad.hidden_states", ULPS_MIX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
def test_stage_one_average(golden: Golden, order: str, impl: str, dtype: torch.dtype) -> None:
    hidden_states = golden.hidden_states(dtype)
    groups = golden.sizes["groups"]
    if len({len(group) for group in groups}) == 1:
        plan = FusionPlan.igva_average(
            golden.sizes["num_layers"], len(groups), groups=groups, base=golden.sizes["base"], order=order
        )
        weights = None
    else:  # unequal groups: the mean of means is not the mean of all layers, so the weights carry 1/K
        plan = golden.plan(order)
        weights = torch.full((len(groups),), 1 / len(groups), dtype=dtype)
    output = fuse(hidden_states, plan, weights, num_prefix_tokens=1, impl=impl)
    output.backward(base_first(golden.inputs("cotangent", dtype), order))
    golden.check(base_first(output, order), "average.output", ULPS_MIX)
    golden.check(gradients(hidden_states), "average.grad.hidden_states", ULPS_MIX)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_group_summaries(golden: Golden, impl: str, dtype: torch.dtype) -> None:
    hidden_states = list(golden.inputs("hidden_states", dtype))
    summaries = group_summaries(hidden_states, golden.plan("base_first"), num_prefix_tokens=1, summary="cls", impl=impl)
    golden.check(summaries, "whole.summaries", ULPS_MIX)


@pytest.mark.parametrize("dtype", DTYPES)
def test_allocator_with_the_official_state_dict(golden: Golden, dtype: torch.dtype) -> None:
    allocator = golden.allocator(dtype)
    summaries = golden.tensors[f"{str(dtype).removeprefix('torch.')}.whole.summaries"]
    embeds = golden.inputs("instruction_embeds", dtype).requires_grad_()
    weights = allocator(summaries, embeds)
    golden.check(weights, "whole.weights", ULPS_ALLOCATOR)

    weights.backward(golden.tensors[f"{str(dtype).removeprefix('torch.')}.whole.grad.weights"].to(weights.dtype))
    golden.check(embeds.grad, "whole.grad.instruction_embeds", ULPS_ALLOCATOR)
    check_parameter_gradients(golden, allocator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_igva_fusion_end_to_end(golden: Golden, order: str, dtype: torch.dtype) -> None:
    hidden_states = golden.hidden_states(dtype)
    embeds = golden.inputs("instruction_embeds", dtype).requires_grad_()
    fusion = IGVAFusion(golden.plan(order), golden.allocator(dtype))
    output, weights = fusion(hidden_states, embeds, num_prefix_tokens=1)
    weights.retain_grad()
    output.backward(base_first(golden.inputs("cotangent", dtype), order))

    golden.check(base_first(output, order), "whole.output", ULPS_ALLOCATOR)
    golden.check(weights, "whole.weights", ULPS_ALLOCATOR)
    golden.check(weights.grad, "whole.grad.weights", ULPS_ALLOCATOR)
    golden.check(embeds.grad, "whole.grad.instruction_embeds", ULPS_ALLOCATOR)
    golden.check(gradients(hidden_states), "whole.grad.hidden_states", ULPS_ALLOCATOR)
    check_parameter_gradients(golden, fusion.allocator)


def check_parameter_gradients(golden: Golden, allocator: WeightAllocator) -> None:
    names = [key.removeprefix("input.aggregator.") for key in golden.tensors if key.startswith("input.aggregator.")]
    parameters = dict(allocator.named_parameters())
    assert sorted(parameters) == sorted(names)
    for name in names:
        golden.check(parameters[name].grad, f"whole.grad.aggregator.{name}", ULPS_ALLOCATOR)


def test_the_check_can_fail(golden: Golden) -> None:
    """One wrong element, by a thousandth of the scale, is refused in both dtypes; so is the other channel order."""
    for dtype in DTYPES:
        right = golden.tensors[f"{str(dtype).removeprefix('torch.')}.given.output"]
        golden.check(right, "given.output", ULPS_MIX)
        wrong = right.clone()
        wrong[0, 0, 0] += 1e-3 * right.abs().max()
        with pytest.raises(AssertionError, match="exceeds the allowance"):
            golden.check(wrong, "given.output", ULPS_MIX)
        with pytest.raises(AssertionError, match="exceeds the allowance"):
            golden.check(base_first(right, "fused_first"), "given.output", ULPS_MIX)
